"""Stage `kernels`: every variant of every CUDA kernel beside its definition in float64.

The smallest come first, and pytest is not needed.  A worker process runs the variants.  When it
dies, or the device no longer answers, the next worker continues after that variant.
"""

import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from gpu.cases import case, needs_tensor_cores, variants
from gpu.records import (
    UNUSABLE,
    Records,
    plant,
    rehearsing,
    run_recorded,
    selected,
    stage_seconds,
    supervise,
)
from npllm.kernels.cuda import launching

REPEAT = 1 if rehearsing() else 10


def main(folder: str, worker: bool = False) -> int:
    """Run what is not recorded yet; return 0 where every variant passed."""
    records = Records(folder, "kernels")
    if worker:
        return work(records)
    code = supervise(records, [sys.executable, "-m", "gpu.kernels", folder, "--worker"])
    statuses = [records.latest().get(name, {}).get("status") for name in to_run()]
    return code or int("passed" not in statuses or not set(statuses) <= {"passed", "not run"})


def work(records: Records) -> int:
    """Run the variants in order, in this process."""
    done, stop = records.done(), time.monotonic() + stage_seconds()
    if rehearsing():
        compile_side_by_side(to_run())
    for number, (name, (kernel, definitions)) in enumerate(to_run().items()):
        if name in done:
            continue
        if time.monotonic() > stop:
            records.add(name, "not run", why="the seconds of this stage are used up")
            continue
        passed = run_recorded(
            records, name, lambda n=number, k=kernel, d=definitions: measure(n, k, d)
        )
        print(records.latest()[name])
        if not (passed or usable()):
            return UNUSABLE
    return 0


def to_run() -> dict[str, tuple[str, dict[str, Any]]]:
    """The variants that are asked for, by name."""
    named = {name_of(*variant): variant for variant in variants(common=rehearsing())}
    return {name: named[name] for name in selected("kernels", named)}


def name_of(kernel: str, definitions: dict[str, Any]) -> str:
    """One variant in words: `attention HEAD=64 ENTRY=bf16`."""
    return " ".join([kernel, *(f"{name}={value}" for name, value in definitions.items())])


def measure(number: int, kernel: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """Compile one variant, run it, compare it, and time it: the facts of its record."""
    plant(f"kernels/{number}")
    facts: dict[str, Any] = {"kernel": kernel, "definitions": definitions, "compiled": False}
    if needs_tensor_cores(kernel) and not (rehearsing() or launching.has_tensor_cores()):
        why = "the device has no tensor cores for bfloat16"
        return facts | {"status": "not run", "why": why}
    try:
        facts |= compile_facts(kernel, definitions)
        facts |= compared(kernel, definitions)
    except Exception as error:
        return facts | {"status": "failed", "why": f"{type(error).__name__}: {str(error)[:2000]}"}
    return facts


def compile_facts(kernel: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """Compile one variant with CuPy's own options; what the compiler says of it."""
    start = time.perf_counter()
    compiled = compile_variant(kernel, definitions)
    return {
        "compiled": True,
        "compile_seconds": time.perf_counter() - start,
        "registers": compiled.num_regs,
        "shared_bytes": compiled.shared_size_bytes,
        "spilled_bytes": compiled.local_size_bytes,
    }


def compile_variant(kernel: str, definitions: dict[str, Any]) -> Any:
    """Return one variant, compiled and loaded: a RawKernel, which does both when it is asked."""
    compiled = launching.compiled(kernel, tuple(sorted(definitions.items())))
    _ = compiled.num_regs
    return compiled


def compile_side_by_side(named: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """In a rehearsal: compile on all cores, since g++ takes a second or two for each variant."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for future in [pool.submit(compile_variant, *variant) for variant in named.values()]:
            future.exception()  # comes again, and is recorded, where the variant has its turn


def compared(kernel: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """Compare the twin on the device with the definition in float64, and time a call."""
    import cupy

    twin, definition, arguments, options, tolerance = case(kernel, definitions)
    moved = [cupy.asarray(x) if isinstance(x, np.ndarray) else x for x in arguments]
    launched, got = launches(lambda: twin(*moved, **options))
    wide = [x.astype(np.float64) if isinstance(x, np.ndarray) else x for x in arguments]
    error = largest_error(got.get(), definition(*wide, **options))
    facts = {
        "max_error": error,
        "tolerance": tolerance,
        "seconds": call_seconds(lambda: twin(*moved, **options)),
    }
    if (kernel, definitions) not in launched:
        return facts | {
            "status": "failed",
            "why": f"the case launched {launched}, not this variant",
        }
    if not error <= tolerance:
        return facts | {
            "status": "failed",
            "why": f"max error {error:.3g} of the largest entry, tolerance {tolerance:g}",
        }
    return facts


def launches(call: Any) -> tuple[list[tuple[str, dict[str, Any]]], Any]:
    """Call a twin; return which variants it launched, and its result."""
    launched, launch = [], launching.launch

    def noted(kernel, definitions, *arguments):
        launched.append((kernel, dict(definitions)))
        return launch(kernel, definitions, *arguments)

    launching.launch = noted
    try:
        return launched, call()
    finally:
        launching.launch = launch


def largest_error(got: np.ndarray, want: np.ndarray) -> float:
    """The largest |got - want| over the largest |want|; infinite for another shape."""
    if got.shape != want.shape:
        return float("inf")
    return float(np.abs(got - want).max() / np.abs(want).max())


def call_seconds(call: Any) -> float:
    """Median time of a call, up to the end of its work on the device."""
    import cupy

    seconds = []
    for _ in range(REPEAT):
        start = time.perf_counter()
        call()
        cupy.cuda.get_current_stream().synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def usable() -> bool:
    """Whether the device still answers: an illegal access ends it for this process."""
    import cupy

    try:
        return cupy.asarray(np.ones(3, np.float32)).get().sum() == 3
    except Exception:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], "--worker" in sys.argv))
