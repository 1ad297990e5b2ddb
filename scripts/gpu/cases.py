"""For every variant of every CUDA kernel, a call that launches it, beside its definition."""

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gpu.records import rehearsing
from npllm import ops
from npllm.kernels import cuda
from npllm.kernels.cuda import launching
from npllm.kernels.cuda.launching import NULL
from npllm.models import phi3
from npllm.ops import Step
from npllm.ops.mask import causal
from npllm.quantized.int8 import Int8Weight

WIDTHS = (64, 96, 128)  # of the heads of published models
FLOATS = {
    "float": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
}  # as the sources name them


class Case(NamedTuple):
    """A twin and its definition, which take the same arguments."""

    twin: Callable[..., Any]
    definition: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed


def variants(common: bool = False) -> list[tuple[str, dict[str, Any]]]:
    """Every (kernel, definitions), the kernel with the shortest source first, rare widths last.

    `common` leaves out the widths of heads that no published model has.
    """
    kernels: list[str] = sorted(cuda.VARIANTS, key=lambda kernel: len(cuda.source(kernel)))
    found = [(kernel, dict(pairs)) for kernel in kernels for pairs in cuda.VARIANTS[kernel]]
    usual = [variant for variant in found if variant[1].get("HEAD", WIDTHS[0]) in WIDTHS]
    return usual if common else usual + [variant for variant in found if variant not in usual]


def case(kernel: str, definitions: dict[str, Any]) -> Case:
    """The call that launches one variant; a KeyError for a kernel that has no case here yet."""
    return CASES[kernel](definitions, np.random.default_rng(0))


def size(real: int, small: int) -> int:
    """A size as models have it, or a small one for a rehearsal."""
    return small if rehearsing() else real


def normal(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    """Normally distributed values of a dtype."""
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype)


def int8(rng: np.random.Generator, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales of an int8 matrix."""
    scales = np.abs(normal(rng, shape[0], -(-shape[1] // 64)))
    return rng.integers(-127, 128, shape).astype(np.int8), scales


def wide_int8(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What an int8 matrix stands for, in the dtype of both."""
    return values * np.repeat(scales, 64, axis=-1)[:, : values.shape[1]]


def linear(definitions: dict[str, Any], rng: np.random.Generator) -> Case:
    """One row, or as many as the variant takes."""
    n_rows, d_in, d_out = int(definitions["ROWS"]), size(3072, 64), size(3072, 24)
    if definitions["ENTRY"] == "i8":
        return Case(
            lambda x, *parts: cuda.linear(x, Int8Weight(*parts)),
            lambda x, *parts: x @ wide_int8(*parts).T,
            (normal(rng, n_rows, d_in), *int8(rng, d_out, d_in)),
        )
    weight = normal(rng, d_out, d_in, dtype=FLOATS[definitions["ENTRY"]])
    return Case(cuda.linear, ops.linear, (normal(rng, n_rows, d_in), weight))


def rms_norm(definitions: dict[str, Any], rng: np.random.Generator) -> Case:
    """A few rows of the residual stream."""
    d_model = size(3072, 100)
    weight = normal(rng, d_model, dtype=FLOATS[definitions["ENTRY"]])
    return Case(cuda.rms_norm, ops.rms_norm, (normal(rng, 5, d_model), weight, 1e-5))


def swiglu(_: dict[str, Any], rng: np.random.Generator) -> Case:
    """Gate and up of a few rows."""
    d_ff = size(8192, 100)
    return Case(cuda.swiglu, ops.swiglu, (normal(rng, 5, d_ff), normal(rng, 5, d_ff)))


def rope_append(_: dict[str, Any], rng: np.random.Generator) -> Case:
    """The kernel in front of the attention, whose result shows what it wrote."""
    n_head, n_kv_head, n_seq, d_head = (
        4,
        2,
        size(64, 5),
        48,
    )  # a width that no attention kernel takes
    angles = normal(rng, n_seq, d_head)
    qkv = normal(rng, 2, n_seq, (n_head + 2 * n_kv_head) * d_head)
    tables = np.cos(angles), np.sin(angles)
    return Case(
        lambda *args: phi3.rope_attention(args[0], Step(*args[1:], 0.0, [causal()]), cuda.CUDA),
        lambda *args: phi3.rope_attention(args[0], Step(*args[1:], 0.0, [causal()]), ops.reference),
        (qkv, *tables, n_head, n_kv_head),
    )


def attention(definitions: dict[str, Any], rng: np.random.Generator) -> Case:
    """Causal attention with grouped queries, more keys than queries."""
    n_seq, n_ctx, d_head = size(512, 17), size(700, 33), int(definitions["HEAD"])
    dtype = FLOATS[definitions["ENTRY"]]
    k, v = (normal(rng, 1, 2, n_ctx, d_head, dtype=dtype) for _ in range(2))
    return Case(
        cuda.attention, ops.attention, (normal(rng, 1, 4, n_seq, d_head), k, v), {"mask": causal()}
    )


def attend_one(definitions: dict[str, Any], rng: np.random.Generator) -> Case:
    """One query of every head over so many keys that they are split; a head of keys for one or
    more.

    The kernel that merges the splits has no type and no group: it takes the plainest.
    """
    n_head = {1: 2, 4: 8}[int(definitions.get("GROUP", 1))]
    n_ctx, d_head = size(700, 300), int(definitions["HEAD"])
    dtype = FLOATS[definitions.get("ENTRY", "float")]
    k, v = (normal(rng, 1, 2, n_ctx, d_head, dtype=dtype) for _ in range(2))
    q = normal(rng, 1, n_head, 1, d_head)
    return Case(cuda.attention, ops.attention, (q, k, v), {"mask": causal()})


def embed(definitions: dict[str, Any], rng: np.random.Generator) -> Case:
    """Rows of a table, the last one among them."""
    shape, ids = (size(32064, 50), size(3072, 80)), np.array([3, 0, size(32064, 50) - 1])
    is_int8 = definitions["ENTRY"] == "i8"
    table = (
        int8(rng, *shape) if is_int8 else (normal(rng, *shape, dtype=FLOATS[definitions["ENTRY"]]),)
    )

    def twin(values: Any, scales: Any = NULL) -> Any:
        import cupy

        x = cupy.empty((len(ids), shape[1]), dtype=np.float32)
        sizes = map(np.int64, (x.size, shape[1]))
        variant, n_blocks = tuple(definitions.items()), -(-x.size // 256)
        launching.launch(
            "embed", variant, n_blocks, 256, cupy.asarray(ids), values, scales, x, *sizes
        )
        return x

    return Case(twin, lambda *x: (wide_int8(*x) if is_int8 else x[0])[ids], table)


def choose(_: dict[str, Any], rng: np.random.Generator) -> Case:
    """The most likely token of a few rows."""
    logits = normal(rng, 3, size(32064, 500))

    def twin(there: Any) -> Any:
        import cupy

        state = [cupy.zeros(3, dtype=np.int64) for _ in range(4)]
        chosen, sizes = (
            cupy.zeros((3, 1), dtype=np.int64),
            (np.uint32(logits.shape[1]), np.int64(1)),
        )
        launching.launch("choose", (), 3, 1024, there, *state, chosen, *sizes)
        return chosen

    return Case(twin, lambda x: x.argmax(axis=1)[:, None], (logits,))


CASES: dict[str, Callable[[dict[str, Any], np.random.Generator], Case]] = {
    "linear": linear,
    "rms_norm": rms_norm,
    "swiglu": swiglu,
    "rope_append": rope_append,
    "attention": attention,
    "attend_one": attend_one,
    "attend_merge": attend_one,
    "embed": embed,
    "choose": choose,
}
