"""Text layout: measured facts to lines of text."""

from collections.abc import Iterator
from typing import Any

from npllm.quantized.dtypes import QUANTIZERS

__all__ = [
    "attention_lines",
    "checkpoint_lines",
    "cost_lines",
    "machine_lines",
    "profile_lines",
    "set_lines",
    "speed_lines",
]

Facts = dict[str, Any]

PASSES = {
    "prefill": "prefill",
    "decode_step": "decode step",
    "decode_step_uncached": "  uncached",
}


def checkpoint_lines(facts: Facts) -> Iterator[str]:
    """Lay out what `npllm inspect` found."""
    yield facts["tree"]
    yield f"\n{facts['folder']}"
    yield f"parameters     {facts['parameters']:>16,}"
    yield from (f"  {part:<12} {count:>16,}" for part, count in facts["parameters_by_part"].items())
    dtypes = ", ".join(facts["dtypes"])
    yield f"bytes          {facts['bytes']:>16,}  {dtypes}, {facts['files']} file(s)"
    yield from (
        f"  {kind:<12} {x['parameters']:>16,}  parameters in {x['tensors']} tensors, "
        f"{x['bits_per_weight']:.4g} bits each"
        for kind, x in facts["types"].items()
    )
    yield f"bits a weight  {facts['bits_per_weight']:>16.4g}"
    per_token = facts["weight_bytes_per_token"]
    yield f"bytes a token  {per_token:>16,}  of weights, read by a decode step"
    yield f"context length {facts['context_length']:>16,}  tokens"
    yield f"KV cache       {facts['kv_bytes_per_token']:>16,}  bytes per token in float32"
    if "adapter" in facts:
        yield from _adapter_lines(facts["adapter"])
    for dtype in QUANTIZERS:
        for part, errors in facts.get(f"{dtype}_errors", {}).items():
            values = "  ".join(f"{name} {error:.4f}" for name, error in errors.items())
            yield f"{dtype} error     {part:<24} {values}"
    for name, (n_nan, n_infinite) in facts.get("not_finite", {}).items():
        yield f"{name}: {n_nan} NaN, {n_infinite} infinities"


def _adapter_lines(adapter: Facts) -> Iterator[str]:
    """Lay out what a LoRA adapter adds."""
    yield f"LoRA adapter   {adapter['parameters']:>16,}  parameters of {adapter['folder']}"
    for name, x in adapter["modules"].items():
        ranks = ", ".join(map(str, x["ranks"]))
        scales = ", ".join(f"{scale:.4g}" for scale in x["scales"])
        yield f"  {name:<12} {x['updates']:>16,}  updates of rank {ranks}, times {scales}"
    for name in adapter["replaced"]:
        yield f"  {name:<12} {'whole':>16}"


def cost_lines(facts: Facts) -> Iterator[str]:
    """Lay out what `npllm.analysis.cost.cost_facts` found."""
    n_bytes = f"{facts['weight_bytes']:,} bytes in {facts['dtype']}"
    yield f"parameters {facts['parameters']:>24,}   {n_bytes}"
    yield from (f"  {part:<12} {count:>20,}" for part, count in facts["parameters_by_part"].items())
    title = f"{facts['batch']} x {facts['context']} tokens"
    yield f"\n{title} {'FLOPs':>22} {'bytes':>20} {'FLOPs/byte':>11}"
    for key, title in PASSES.items():
        yield _cost_line(title, facts[key])
        if key != "decode_step_uncached":
            yield from (_cost_line("  " + op, cost) for op, cost in facts[key]["by_op"].items())
    run = facts["whole_run"]
    yield (
        f"\n{run['tokens']} tokens one by one: {run['cached_flops']:,} FLOPs with the cache, "
        f"{run['uncached_flops']:,} without: {run['ratio']:.1f} times as many"
    )
    yield from _kv_cache_lines(facts)


def _cost_line(title: str, cost: Facts) -> str:
    return f"{title:<14} {cost['flops']:>25,} {cost['bytes']:>20,} {cost['intensity']:>11.2f}"


def _kv_cache_lines(facts: Facts) -> Iterator[str]:
    yield f"\nKV cache {facts['kv_cache_bytes']:>26,} bytes"
    for name, row in facts["kv_cache"].items():
        line = f"  {name.upper()}, {row['n_kv_head']:>3} heads {row['full']:>21,}"
        if row["window"] is not None:
            line += f"   {row['window']:,} with the window of {facts['window']}"
        yield line


def speed_lines(facts: Facts) -> Iterator[str]:
    """Lay out what `npllm.analysis.speed.speed` found."""
    for name, value in facts["tokens_per_second"].items():
        yield f"{name:<16} {value:9.1f} tokens/s"
    yield f"decoding is {facts['cache_speedup']:.1f} times as fast with the cache as without"


def set_lines(facts: Facts) -> Iterator[str]:
    """Lay out what `npllm.analysis.speed.compare_sets` found."""
    for one in facts["sets"]:
        for name, value in one["tokens_per_second"].items():
            yield f"{one['ops']:<12} {name:<16} {value:9.1f} tokens/s"
    own = facts["sets"][0]["ops"]
    for other, ratios in facts["speedup"].items():
        values = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
        yield f"{own} over {other}: {values}"


def profile_lines(facts: Facts) -> Iterator[str]:
    """Lay out what `npllm.analysis.profiling.profile` found."""
    limits = facts["limits"]
    if limits:
        read, flops = limits["read"] / 1e9, limits["flops"] / 1e9
        yield f"limits: {read:.1f} GB/s read, {flops:.0f} GFLOP/s float32 product"
    steps = {
        "prefill": f"prefill of {facts['n_prompt']} tokens",
        "decode": f"one token of decoding after {facts['n_prompt']}",
    }
    for phase, title in steps.items():
        whole = facts[phase]["seconds"]
        yield f"\n{title}: {whole * 1e3:.2f} ms, {facts['set']} ops"
        yield (
            f"{'op':<16} {'weight':<14} {'calls':>6} {'ms':>9} {'share':>6} {'GB/s':>7} "
            f"{'GFLOP/s':>8} {'of limit':>9}"
        )
        yield from map(_profile_line, facts[phase]["ops"])
        between = facts[phase]["between_seconds"]
        yield f"{'between the ops':<38} {between * 1e3:>9.3f} {between / whole:>6.1%}"


def _profile_line(row: Facts) -> str:
    weight = "x".join(map(str, row["weight"] or ()))
    limit = "" if row["of_limit"] is None else f"{row['of_limit']:.0%}"
    took = row["seconds"]
    return (
        f"{row['op']:<16} {weight:<14} {row['calls']:>6.0f} {took * 1e3:>9.3f} "
        f"{row['share']:>6.1%} {row['bytes'] / took / 1e9:>7.1f} "
        f"{row['flops'] / took / 1e9:>8.1f} {limit:>9}"
    )


def attention_lines(facts: Facts) -> Iterator[str]:
    """Lay out what `npllm.analysis.step_facts.attention_facts` found, step by step."""
    yield (
        f"layer {facts['layer']}, head {facts['head']}, key/value head {facts['kv_head']}, "
        f"query {facts['position']} {facts['token']!r}"
    )
    yield f"\n{'step':>4}  {'value':<15} {'shape':<12} {'length':>9}  formula"
    by_key = [step for step in facts["steps"] if step["length"] is None]
    first, last = by_key[0]["step"], by_key[-1]["step"]
    yield from map(_step_line, (step for step in facts["steps"] if step["step"] < first))
    yield from map(_step_line, by_key)
    yield from _key_lines(facts)
    yield from map(_step_line, (step for step in facts["steps"] if step["step"] > last))


def _step_line(step: Facts) -> str:
    length = "by key" if step["length"] is None else f"{step['length']:.4f}"
    return (
        f"{step['step']:>4}  {step['name']:<15} {step['shape']!s:<12} {length:>9}  "
        f"{step['formula']}"
    )


def _key_lines(facts: Facts) -> Iterator[str]:
    """One line for each key: steps 4 to 6."""
    yield f"\n{'':6}{'key':<26} {'score':>9} {'weight':>8} {'|w v|':>9}"
    for row in facts["keys"]:
        name = f"{row['slot']} {row['token']!r}"
        numbers = f"{row['score']:9.3f} {row['weight']:8.4f} {row['weighted_value']:9.4f}"
        if not row["visible"]:
            numbers = f"{row['score']:9.3f}   not visible to the query"
        yield f"{'':6}{name:<26} {numbers}  {'█' * round(40 * row['weight'])}".rstrip()
    yield ""


def machine_lines(facts: Facts) -> Iterator[str]:
    """Lay out what `npllm.analysis.machine.machine_facts` found."""
    for name, value in facts.items():
        if isinstance(value, dict):
            entries = (f"{key} {'-' if entry is None else entry}" for key, entry in value.items())
            value = ", ".join(entries) or "-"
        yield f"{name:<20} {value}"
