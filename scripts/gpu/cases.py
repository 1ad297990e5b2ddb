"""For every variant of every CUDA kernel, a call that launches it, beside its definition."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gpu.records import rehearsing
from npllm import ops
from npllm.arrays import widen
from npllm.kernels import cuda
from npllm.kernels.cuda import gemm, launching
from npllm.kernels.cuda.attention import attention_in_parts
from npllm.kernels.cuda.launching import NULL
from npllm.kernels.cuda.rope import launch_rope
from npllm.kernels.cuda.rows import launch_norm, launch_swiglu
from npllm.models import phi3
from npllm.ops import Step
from npllm.ops.mask import causal
from npllm.quantized.block_packing import quantize_blocks
from npllm.quantized.block_weight import BlockWeight
from npllm.quantized.int8 import Int8Weight

TOLERANCE = 2e-5  # sums of 8192 float32 numbers in any order stay below
ROUNDED = 2.0**-8  # results, or weights of a mean, that are rounded to bfloat16: 2**-8 of each
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
    tolerance: float = TOLERANCE  # of the largest entry


def variants(common: bool = False) -> list[tuple[str, dict[str, Any]]]:
    """Every (kernel, definitions), the kernel with the shortest source first, rare widths last.

    `common` leaves out the widths of heads that no published model has, and takes one block format
    for all.
    """
    kernels: list[str] = sorted(cuda.VARIANTS, key=lambda kernel: len(cuda.source(kernel)))
    found = [(kernel, dict(pairs)) for kernel in kernels for pairs in cuda.VARIANTS[kernel]]
    usual = [variant for variant in found if _is_usual(variant[1])]
    return usual if common else usual + [variant for variant in found if variant not in usual]


def _is_usual(definitions: dict[str, Any]) -> bool:
    entry, rows = definitions.get("ENTRY"), definitions.get("ROWS", 1)
    rare = entry in cuda.BLOCKS and (entry, rows) != ("Q4_K", 1)
    return definitions.get("HEAD", WIDTHS[0]) in WIDTHS and not rare


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


def linear_blocks(definitions: dict[str, Any], rng: np.random.Generator) -> Case:
    """One row, or as many as the variant takes; the definition widens in float32."""
    n_rows, d_in, d_out = int(definitions["ROWS"]), size(3072, 256), size(3072, 24)
    name = definitions["ENTRY"]
    some = quantize_blocks(normal(rng, 24, d_in), name).blocks
    return Case(
        lambda x, blocks: cuda.linear(x, BlockWeight(blocks, name)),
        lambda x, blocks: x @ wide_blocks(blocks, name).T,
        (normal(rng, n_rows, d_in), np.tile(some, (d_out // 24, 1))),
    )


def wide_blocks(blocks: np.ndarray, name: str) -> np.ndarray:
    """What a matrix in blocks stands for, in float64; its bytes may be in float64 as well."""
    return BlockWeight(blocks.astype(np.uint8), name).widened().astype(np.float64)


def rms_norm(definitions: dict[str, Any], rng: np.random.Generator) -> Case:
    """A few rows of the residual stream, written as they are or in parts."""
    d_model, n_parts = size(3072, 100), int(definitions["PARTS"])
    weight = normal(rng, d_model, dtype=FLOATS[definitions["ENTRY"]])
    arguments = (normal(rng, 5, d_model), weight, 1e-5)
    if n_parts == 0:
        return Case(cuda.rms_norm, ops.rms_norm, arguments)
    twin = in_parts(lambda y, *call: launch_norm(*call, y), n_parts)
    return Case(twin, ops.rms_norm, arguments, tolerance=tolerance(n_parts))


def swiglu(definitions: dict[str, Any], rng: np.random.Generator) -> Case:
    """Gate and up of a few rows, the product written as it is or in parts."""
    d_ff, n_parts = size(8192, 100), int(definitions["PARTS"])
    arguments = (normal(rng, 5, d_ff), normal(rng, 5, d_ff))
    if n_parts == 0:
        return Case(cuda.swiglu, ops.swiglu, arguments)
    twin = in_parts(lambda y, *call: launch_swiglu(*call, y), n_parts)
    return Case(twin, ops.swiglu, arguments, tolerance=tolerance(n_parts))


def in_parts(launch: Callable[..., None], n_parts: int) -> Callable[..., Any]:
    """A call that lets a kernel write bfloat16 parts of the shape of its first argument, and adds
    them.
    """

    def twin(x: Any, *others: Any) -> Any:
        parts = gemm.empty_parts(x, x.shape[-1], n_parts)
        launch(parts, x, *others)
        return sum(widen(parts[p]) for p in reversed(range(n_parts)))

    return twin


def tolerance(n_parts: int) -> float:
    """Three parts are a float32 number, and one part is rounded to bfloat16."""
    return ROUNDED if n_parts == 1 else TOLERANCE


def rope_append(definitions: dict[str, Any], rng: np.random.Generator) -> Case:
    """The kernel in front of the attention, whose result shows what it wrote."""
    if definitions["ENTRY"] != "float":
        return rounded_values(FLOATS[definitions["ENTRY"]], rng)
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


def rounded_values(dtype: Any, rng: np.random.Generator) -> Case:
    """Values that the kernel writes into a cache of a 16-bit type."""
    n_seq, d_head = size(64, 5), 48
    qkv, ones = normal(rng, 1, n_seq, 3 * d_head), np.ones((n_seq, 2), np.float32)

    def twin(qkv: Any, cos: Any, sin: Any) -> Any:
        import cupy

        q = cupy.empty((1, 1, n_seq, d_head), dtype=np.float32)
        k, v = (cupy.empty(q.shape, dtype=dtype) for _ in range(2))
        launch_rope(qkv, cos, sin, q, k, v)
        return v.astype(np.float32) if hasattr(v, "astype") else cupy.astype(v, np.float32)

    def definition(qkv: Any, *_: Any) -> Any:
        values = qkv.astype(np.float32).astype(dtype)[..., 2 * d_head :]
        return values[:, None].astype(np.float64)

    return Case(twin, definition, (qkv, ones, ones))


def attention(definitions: dict[str, Any], rng: np.random.Generator) -> Case:
    """Causal attention with grouped queries, more keys than queries, in float32."""
    same = many_queries(definitions, rng)
    return same._replace(twin=with_tensor_cores(False, cuda.attention))


def attention_mma(definitions: dict[str, Any], rng: np.random.Generator) -> Case:
    """The same in bfloat16 parts; with one part beside queries, keys and values that are rounded as
    well.
    """
    n_parts, same = int(definitions["PARTS"]), many_queries(definitions, rng)

    def definition(*call: Any, **options: Any) -> Any:
        rounded = [x.astype(FLOATS["bf16"]).astype(x.dtype) if n_parts == 1 else x for x in call]
        return ops.attention(*rounded, **options)

    twin = with_tensor_cores(True, partial(attention_in_parts, n_parts))
    return same._replace(twin=twin, definition=definition, tolerance=tolerance(n_parts))


def with_tensor_cores(there: bool, call: Callable[..., Any]) -> Callable[..., Any]:
    """A call during which the device has tensor cores, or has none."""

    def changed(*arguments: Any, **options: Any) -> Any:
        found, launching.has_tensor_cores = launching.has_tensor_cores, lambda: there
        try:
            return call(*arguments, **options)
        finally:
            launching.has_tensor_cores = found

    return changed


def needs_tensor_cores(kernel: str) -> bool:
    """Tell whether a kernel has the instructions of tensor cores in its source."""
    return "mma" in launching.INCLUDED.get(kernel, ())


def many_queries(definitions: dict[str, Any], rng: np.random.Generator) -> Case:
    """The call of both."""
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


def embed_blocks(definitions: dict[str, Any], rng: np.random.Generator) -> Case:
    """Rows of a table in blocks, the last one among them."""
    name, d, ids = definitions["ENTRY"], size(3072, 256), np.array([3, 0, 47])
    table = quantize_blocks(normal(rng, 48, d), name).blocks

    def twin(blocks: Any) -> Any:
        import cupy

        x = cupy.empty((len(ids), d), dtype=np.float32)
        variant, n_blocks = tuple(definitions.items()), -(-x.size // 32 // 256)
        sizes = map(np.int64, (x.size, d))
        launching.launch(
            "embed_blocks", variant, n_blocks, 256, cupy.asarray(ids), blocks, NULL, x, *sizes
        )
        return x

    return Case(twin, lambda blocks: wide_blocks(blocks, name)[ids], (table,))


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


def split(definitions: dict[str, Any], rng: np.random.Generator) -> Case:
    """The parts of a few rows, added again."""
    n_parts, x = int(definitions["PARTS"]), normal(rng, 70, size(3072, 40))

    def twin(x: Any) -> Any:
        import cupy

        parts = cupy.empty((n_parts, x.size), dtype=FLOATS["bf16"])
        n = np.int64(x.size)
        launching.launch("split", (("PARTS", n_parts),), -(-x.size // 256), 256, x, parts, n)
        return sum(widen(parts[p]) for p in reversed(range(n_parts)))

    def definition(x: Any) -> Any:
        return x.astype(FLOATS["bf16"]).astype(x.dtype) if n_parts == 1 else x

    return Case(twin, lambda x: definition(x).reshape(-1), (x,))


CASES: dict[str, Callable[[dict[str, Any], np.random.Generator], Case]] = {
    "attention_mma": attention_mma,
    "linear": linear,
    "linear_blocks": linear_blocks,
    "rms_norm": rms_norm,
    "swiglu": swiglu,
    "rope_append": rope_append,
    "attention": attention,
    "attend_one": attend_one,
    "attend_merge": attend_one,
    "embed": embed,
    "embed_blocks": embed_blocks,
    "choose": choose,
    "split": split,
}
