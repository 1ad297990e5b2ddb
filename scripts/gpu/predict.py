"""Predict the time of each kernel of a decode step, and tokens/s, from bytes, launches, occupancy.

    python3 -m gpu.predict    writes docs/gpu/predictions.json (scripts/ is on PYTHONPATH)

    time = START + max(bytes / min(copy, in_flight / LATENCY), instructions / issued)
    in_flight = n_SM_used * warps_per_SM * BYTES_IN_FLIGHT * DUTY
    instructions = entries * (UNPACK + rows)

START is what a node of a graph costs before its first byte has come.  copy is the bandwidth of a
large copy.  warps_per_SM follows from the registers and the shared memory in docs/gpu/registers.txt
(the compiler's report), and from the number of blocks.  Nothing here is measured: the constants are
published figures and estimates, so that the first run on a GPU has something to be compared with.
"""

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from npllm.quantized.block_formats import FORMATS

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = Path(__file__).parent / "configs"
REPORT = ROOT / "docs" / "gpu" / "registers.txt"
START = 2.5e-6  # s: about 1.3 between two nodes of a graph, and the first loads of a kernel
HOST = 15e-6  # s: what the host adds to a queued step (one launch of a graph), hidden if queued
LATENCY = 0.7e-6  # s: of a load from DRAM under load
DUTY = 0.6  # part of the time in which a warp has its loads in flight
THREADS = {"rope_append": 256, "embed": 256, "embed_blocks": 256, "attend_merge": 256}  # else 128
IN_FLIGHT = {"linear": 4096, "attend_one": 4096}  # bytes a warp; 8 packs a lane
UNITS = 4 * 32  # of 32 entries that a warp of linear_blocks.cu has in flight
# Instructions that widen one entry of a weight, counted in the sources: shift, mask, subtraction,
# scale.  A multiply-add for each row of x comes on top.
UNPACK = (
    {"float": 0, "bf16": 1, "f16": 6, "i8": 2, "Q8_0": 4, "Q6_K": 6}
    | dict.fromkeys(("Q4_0", "Q4_1", "Q4_K"), 4)
    | dict.fromkeys(("Q5_0", "Q5_1", "Q5_K"), 6)
)
CLOCK, LANES, ISSUED = 1.7e9, 128, 0.7  # Hz; instructions of an SM a cycle, and the part reached
OTHERS = 512  # bytes a warp of another kernel
SPLIT = 128  # keys of attend_one.cu


SHOWN = ("Q8_0", "Q6_K", "Q4_K", "Q4_0")  # block formats of the table


# Of a prefill: operations/s of dense matrices in bfloat16 and in float32 (published, H100 and H200
# alike), and the shares that products and the attention kernel are reckoned to reach.
MATRIX = {"bf16": 989e12, "float": 67e12}
REACHED, ATTENTION_REACHED = {"bf16": 0.6, "float": 0.8}, 0.3
PREFILLS = {"bf16 activations": ("bf16", 1), "three parts": ("bf16", 3), "float32": ("float", 1)}


class Device(NamedTuple):
    """What counts of a GPU: published, and the share of the peak that a copy reaches."""

    name: str
    n_sm: int
    copy: float  # bytes/s of a large copy
    architecture: str = "sm_90"
    registers: int = 65536  # of an SM
    shared: int = 227 * 1024


DEVICES = (Device("H100", 132, 0.9 * 3.35e12), Device("H200", 132, 0.9 * 4.8e12))


class Kernel(NamedTuple):
    """One kernel of a step: which variant, how many blocks, and the bytes that it must move."""

    label: str
    kernel: str
    definitions: dict[str, Any]
    n_blocks: int
    n_bytes: float
    n_times: int  # in a step
    instructions: float = 0.0  # of all threads


def kernels(
    data: dict[str, Any], n_ctx: int, n_batch: int = 1, entry: str = "bf16", cache: str = "float"
) -> list[Kernel]:
    """List every kernel of a decode step behind n_ctx tokens, of a config.json; entry and cache:
    the types of weights, and of keys and values.
    """
    d, d_ff, n_layer = (data[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    n_head, n_kv_head = data["num_attention_heads"], data["num_key_value_heads"]
    d_head, n_vocab = d // n_head, data["vocab_size"]
    itemsize = bytes_an_entry(entry)
    suffix = "_blocks" if entry in FORMATS else ""
    rows = next(r for r in (1, 2, 4, 8) if r >= n_batch)
    outs = 4 * (4 if rows >= 4 else 2)
    seen = min(n_ctx + 1, data.get("sliding_window") or n_ctx + 1)
    capacity = 1 << max(6, n_ctx.bit_length())
    n_split = -(-min(capacity, data.get("sliding_window") or capacity) // SPLIT)

    def product(label: str, d_out: int, d_in: int, n_times: int) -> Kernel:
        variant = {"ENTRY": entry, "ROWS": rows}
        name, size = f"linear{suffix}", d_out * d_in
        work = size * (UNPACK[entry] + rows)
        return Kernel(label, name, variant, -(-d_out // outs), size * itemsize, n_times, work)

    group = 4 if n_head > n_kv_head else 1
    n_chunks = n_kv_head * -(-n_head // n_kv_head // group)
    width = (n_head + 2 * n_kv_head) * d_head
    used = n_batch * n_chunks * -(-seen // SPLIT)  # blocks that find keys
    keys = 2.0 * n_batch * n_kv_head * seen * d_head * bytes_an_entry(cache)
    parts = n_batch * n_head * n_split * (d_head + 2) * 4
    return [
        Kernel(
            "embed",
            f"embed{suffix}",
            {"ENTRY": entry},
            -(-n_batch * d // 256),
            n_batch * d * 4,
            1,
        ),
        product("qkv", width, d, n_layer),
        Kernel(
            "rope",
            "rope_append",
            {"ENTRY": cache},
            -(-n_batch * width // 256),
            n_batch * width * 8,
            n_layer,
        ),
        Kernel(
            "attention",
            "attend_one",
            {"ENTRY": cache, "GROUP": group, "HEAD": d_head},
            used,
            keys,
            n_layer,
        ),
        *(
            [Kernel("merge", "attend_merge", {"HEAD": d_head}, n_batch * n_head, parts, n_layer)]
            if n_split > 1
            else []
        ),
        product("o", d, n_head * d_head, n_layer),
        product("gate_up", 2 * d_ff, d, n_layer),
        product("down", d, d_ff, n_layer),
        product("lm_head", n_vocab, d, 1),
    ]


def bytes_an_entry(entry: str) -> float:
    """Bytes of an entry of a weight, scales included."""
    if entry in FORMATS:
        return FORMATS[entry].bits / 8
    return {"float": 4, "bf16": 2, "f16": 2, "i8": 1 + 4 / 64}[entry]


@cache
def reported() -> dict[tuple[str, str, str], tuple[int, int]]:
    """Registers and shared bytes of every variant: (architecture, kernel, definitions) -> both."""
    form = re.compile(r"\S+ \S+ (sm_\d+) (\w+) ({.*}): (\d+) registers, (\d+) bytes shared")
    found = (form.match(line) for line in REPORT.read_text(encoding="utf-8").splitlines())
    return {one.groups()[:3]: (int(one[4]), int(one[5])) for one in found if one}  # type: ignore[misc]


def warps_a_multiprocessor(kernel: Kernel, device: Device) -> float:
    """Warps of a kernel that an SM holds at once: by registers, shared memory and blocks."""
    threads = THREADS.get(kernel.kernel, 128)
    variant = str({name: kernel.definitions[name] for name in sorted(kernel.definitions)})
    registers, shared = reported()[device.architecture, kernel.kernel, variant]
    by_registers = device.registers // (threads * -(-registers // 8) * 8)
    fits = min(by_registers, device.shared // max(1, shared + 1024), 2048 // threads)
    return min(fits, kernel.n_blocks / device.n_sm) * threads / 32


def seconds(kernel: Kernel, device: Device) -> float:
    """Predicted time of one launch in a graph."""
    each = IN_FLIGHT.get(kernel.kernel, OTHERS)
    if kernel.kernel == "linear_blocks":
        each = UNITS * 32 * bytes_an_entry(kernel.definitions["ENTRY"])
    in_flight = warps_a_multiprocessor(kernel, device) * each
    rate = min(device.copy, device.n_sm * in_flight * DUTY / LATENCY)
    used = min(device.n_sm, kernel.n_blocks)
    issued = used * LANES * CLOCK * ISSUED
    return START + max(kernel.n_bytes / rate, kernel.instructions / issued)


def step(data: dict[str, Any], device: Device, n_ctx: int, **options: Any) -> dict[str, Any]:
    """Predict one decode step: seconds of each kernel, in all, and tokens/s."""
    found = kernels(data, n_ctx, **options)
    each = {one.label: seconds(one, device) for one in found}
    total = sum(each[one.label] * one.n_times for one in found)
    n_bytes = sum(one.n_bytes * one.n_times for one in found)
    return {
        "seconds": total,
        "tokens_per_second": options.get("n_batch", 1) / total,
        "launches": sum(one.n_times for one in found),
        "bytes": n_bytes,
        "share_of_copy": n_bytes / device.copy / total,
        "microseconds_of_each": {label: round(1e6 * one, 2) for label, one in each.items()},
    }


def prefill(data: dict[str, Any], n: int, kind: str, n_parts: int) -> dict[str, Any]:
    """Predict a prompt of n tokens by its operations: products on matrix units, float32 attention.

    operations = n_parts * 2 * n * weights,   4 * n**2 / 2 * d_model of each layer's attention
    """
    found = kernels(data, n)
    weights = sum(
        one.n_bytes * one.n_times
        for one in found
        if one.label != "lm_head" and (one.kernel == "linear")
    ) / bytes_an_entry("bf16")
    products = n_parts * 2 * n * weights / (MATRIX[kind] * REACHED[kind])
    pairs = 2 * n**2 * data["hidden_size"] * data["num_hidden_layers"]
    seconds_in_all = products + pairs / (MATRIX["float"] * ATTENTION_REACHED)
    return {"seconds": seconds_in_all, "tokens_per_second": n / seconds_in_all}


def predictions() -> dict[str, Any]:
    """Predict Phi-3-mini on both devices at three lengths; rows of a batch at the shortest."""
    data = json.loads((CONFIGS / "phi-3-mini.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    for device in DEVICES:
        for n_ctx in (128, 1024, 4000):
            found[f"{device.name}, bf16, context {n_ctx}"] = step(data, device, n_ctx)
        for name, entry in (("int8", "i8"), *((x, x) for x in SHOWN)):
            found[f"{device.name}, {name}, context 128"] = step(data, device, 128, entry=entry)
        found[f"{device.name}, bf16, cache bf16, context 4000"] = step(
            data, device, 4000, cache="bf16"
        )
        for name, (kind, n_parts) in PREFILLS.items():
            found[f"{device.name}, prefill 2048, {name}"] = prefill(data, 2048, kind, n_parts)
        found[f"{device.name}, bf16, context 128, 8 rows"] = step(data, device, 128, n_batch=8)
    return {"measured": False, "model": "Phi-3-mini-4k", "predictions": found}


def main() -> int:
    """Write docs/gpu/predictions.json, and print a table."""
    found = predictions()
    path = ROOT / "docs" / "gpu" / "predictions.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, one in found["predictions"].items():
        more = f"{one['share_of_copy']:.0%} of a copy" if "share_of_copy" in one else ""
        rate, milliseconds = one["tokens_per_second"], 1e3 * one["seconds"]
        print(f"{name:<36} {rate:6.0f} tok/s  {milliseconds:.2f} ms  {more}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
