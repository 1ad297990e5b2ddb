"""Products of low-precision numbers, added up in 32 bits: the instruction, or plain vectors.

    vpdpbusd    sums[L] += sum_k u[4 L + k] * s[4 L + k],   u unsigned, s signed, k = 0 ... 3
    vdpbf16ps   sums[L] = (sums[L] + a[2 L + 1] * b[2 L + 1]) + a[2 L] * b[2 L]

The integer sum is exact, so both forms have the same bits.  Each product of two bfloat16 numbers is
exact in float32; both forms round the two additions in the same order.  The instruction reads and
returns subnormal numbers as 0, plain vectors do not.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, VPDPBUSD and
VDPBF16PS.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import llvmlite.binding
from numba import config

from npllm.errors import NpllmRuntimeError
from npllm.kernels.cpu.simd import FLOATS, INTS, all_lanes, call

__all__ = [
    "dot_bfloat16",
    "dot_bytes",
    "form_of",
    "forced_form",
    "has_instruction",
    "has_tiles",
    "spelled_form",
]

Builder = Any  # llvmlite's IRBuilder
Value = Any  # an LLVM value

FEATURES = {"int8": ("avx512f", "avx512vnni"), "bfloat16": ("avx512f", "avx512bf16")}
FAST_BFLOAT16 = "znver"  # of AMD: VDPBF16PS is twice as fast as FMA; Intel's runs at half its speed
TILE_FEATURES = {"int8": "amx-int8", "int16": "amx-int8", "bfloat16": "amx-bf16"}
PERMISSION = 158, 0x1023, 18  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
TILE_FLUSH = 64  # of fewer channels, to fetch the sums from the tiles costs more than it saves
_forced: list[str] = []  # the innermost `forced_form` last


@cache
def has_instruction(kind: str) -> bool:
    """Tell whether this processor has the instruction, and Numba may use it."""
    is_host = config.CPU_NAME is None and config.CPU_FEATURES is None and config.ENABLE_AVX
    features = llvmlite.binding.get_host_cpu_features()
    return bool(is_host and all(features.get(name) for name in FEATURES[kind]))


@cache
def may_use_tiles() -> bool:
    """Ask the system for the tiles; tell whether it gave them.  Linux alone has such a call."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        return ctypes.CDLL(None, use_errno=True).syscall(*PERMISSION) == 0
    except (OSError, AttributeError):
        return False


@cache
def has_tiles(kind: str) -> bool:
    """Tell whether products of a kind of activations run on the matrix units of this processor."""
    is_host = config.CPU_NAME is None and config.CPU_FEATURES is None and config.ENABLE_AVX
    features = llvmlite.binding.get_host_cpu_features()
    known = (
        features.get("amx-tile") and features.get(TILE_FEATURES[kind]) and features.get("avx512f")
    )
    return bool(is_host and known) and may_use_tiles()


def form_of(kind: str, flush: int = TILE_FLUSH) -> str:
    """Say how products of "int8", "int16" or "bfloat16" are computed.

    Parameters
    ----------
    kind : str
    flush : int
        Of integers: channels whose sums are scaled together.

    Returns
    -------
    form : str
        "tiles": the matrix units of `matrix_tiles`.  "instruction", or "plain": plain vectors,
        which have the same bits.  Of bfloat16 "float32" as well, where the instruction is missing
        or slow: the float32 product of rounded entries.
    """
    has_units = has_tiles(kind)  # asks the system: without permission the instructions are illegal
    if _forced:
        if _forced[-1] == "tiles" and not has_units:
            raise NpllmRuntimeError(
                "this process has no matrix units (Intel AMX): force another form"
            )
        return _forced[-1]
    if has_units and (kind == "bfloat16" or flush >= TILE_FLUSH):
        return "tiles"
    if kind != "bfloat16":
        return "instruction" if has_instruction("int8") else "plain"
    is_fast = llvmlite.binding.get_host_cpu_name().startswith(FAST_BFLOAT16)
    return "instruction" if is_fast and has_instruction(kind) else "float32"


def spelled_form(kind: str) -> str:
    """Say in words how products of a kind are computed."""
    words = {"plain": "plain vectors", "float32": "float32 products of rounded entries"}
    form = form_of(kind)
    if form in words:
        return words[form]
    if kind == "bfloat16":
        return f"the instruction {'TDPBF16PS' if form == 'tiles' else 'VDPBF16PS'}"
    if form == "tiles":
        return "the instructions TDPBSUD (int8 weights) and VPDPBUSD (blocks)"
    return "the instruction VPDPBUSD"


@contextmanager
def forced_form(form: str) -> Iterator[None]:
    """Compute products in this form, to test each on any processor."""
    _forced.append(form)
    try:
        yield
    finally:
        _forced.pop()


def dot_bytes(builder: Builder, uses: bool, sums: Value, u: Value, s: Value) -> Value:
    """Add to sixteen integers the products of four unsigned and four signed bytes each."""
    if uses:
        return call(builder, "llvm.x86.avx512.vpdpbusd.512", INTS, [sums, u, s])
    for k in range(4):
        left = builder.and_(builder.lshr(u, all_lanes(8 * k, INTS)), all_lanes(255, INTS))
        right = builder.ashr(builder.shl(s, all_lanes(24 - 8 * k, INTS)), all_lanes(24, INTS))
        sums = builder.add(sums, builder.mul(left, right))
    return sums


def dot_bfloat16(builder: Builder, uses: bool, sums: Value, a: Value, b: Value) -> Value:
    """Add to sixteen floats the products of two pairs of bfloat16 each, given as words."""
    if uses:
        return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [sums, a, b])
    high = all_lanes(0xFFFF0000, INTS)
    for part in (lambda x: builder.and_(x, high), lambda x: builder.shl(x, all_lanes(16, INTS))):
        factors = [builder.bitcast(part(x), FLOATS) for x in (a, b)]
        sums = call(builder, "llvm.fma.v16f32", FLOATS, [*factors, sums])
    return sums
