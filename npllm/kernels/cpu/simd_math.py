"""exp and silu of sixteen floats, for the compiled kernels."""

from typing import Any

from numba.extending import intrinsic

from npllm.kernels.cpu.simd import FLOATS, INTS, LANES, all_lanes, call, vector

__all__ = ["exp", "silu"]

Builder = Any  # llvmlite's IRBuilder
Value = Any  # an LLVM value: sixteen floats or integers

LOG2_E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
TAYLOR = (
    1 / 5040,
    1 / 720,
    1 / 120,
    1 / 24,
    1 / 6,
    0.5,
    1.0,
    1.0,
)  # of exp on +-ln(2)/2: the next term is below 6e-9
EXP_LOWEST, EXP_HIGHEST = -87.33654, 88.72283  # between them e**x is a normal float32
SILU_LOWEST = -110.0  # below it x * e**x rounds to -0


def _fma(builder: Builder, a: Value, b: Value, c: Value) -> Value:
    return call(builder, f"llvm.fma.v{LANES}f32", FLOATS, [a, b, c])


def _exp_parts(builder: Builder, x: Value, lowest: float, highest: float) -> tuple[Value, Value]:
    """Return y in 0.7 ... 1.42 and the integer n of e**x = y * 2**n, for x cut to lowest ...
    highest; y is NaN where x is, and n 0.

    n = round(x / ln 2),   y = e**r,   r = x - n * ln 2
    """
    x = builder.select(builder.fcmp_ordered("<", x, all_lanes(lowest)), all_lanes(lowest), x)
    x = builder.select(builder.fcmp_ordered(">", x, all_lanes(highest)), all_lanes(highest), x)
    n = call(builder, f"llvm.nearbyint.v{LANES}f32", FLOATS, [builder.fmul(x, all_lanes(LOG2_E))])
    r = x
    for part in (LN2_HIGH, LN2_LOW):
        r = _fma(builder, n, all_lanes(-part), r)
    y = all_lanes(TAYLOR[0])
    for coefficient in TAYLOR[1:]:
        y = _fma(builder, y, r, all_lanes(coefficient))
    n = builder.select(
        builder.fcmp_ordered("==", n, n), n, all_lanes(0.0)
    )  # no integer stands for NaN
    return y, builder.fptosi(n, INTS)


def _times_power(builder: Builder, y: Value, n: Value) -> Value:
    """Compute y * 2**n of normal numbers whose product is normal: n is added to the exponent."""
    exponent = builder.shl(n, all_lanes(23, INTS))
    return builder.bitcast(builder.add(builder.bitcast(y, INTS), exponent), FLOATS)


@intrinsic
def exp(_typing: Any, x: Value) -> Any:
    """e**x, lane by lane, to 2 units in the last place; below -87.33654, where it is no normal
    number, 0; NaN stays NaN.
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        (x,) = arguments
        y = _times_power(builder, *_exp_parts(builder, x, EXP_LOWEST, EXP_HIGHEST))
        y = builder.select(
            builder.fcmp_ordered(">", x, all_lanes(EXP_HIGHEST)), all_lanes(float("inf")), y
        )
        return builder.select(
            builder.fcmp_ordered("<", x, all_lanes(EXP_LOWEST)), all_lanes(0.0), y
        )

    return vector(vector), generate


@intrinsic
def silu(_typing: Any, x: Value) -> Any:
    """Compute x / (1 + e**-x), lane by lane, to 4 units in the last place; -inf gives NaN, as the
    formula does.

    Below 0: x * e**x / (1 + e**x).  Far below, e**x is no normal number, while its product with x
    is: the power of two comes in two factors, the second of them last.
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        (x,) = arguments
        minus = call(builder, f"llvm.fabs.v{LANES}f32", FLOATS, [x])
        minus = builder.fsub(all_lanes(-0.0), minus)
        y, n = _exp_parts(builder, minus, SILU_LOWEST, 0.0)
        half = builder.ashr(n, all_lanes(1, INTS))
        first = _times_power(builder, y, half)
        first = builder.select(
            builder.fcmp_ordered("<", minus, all_lanes(SILU_LOWEST)), all_lanes(0.0), first
        )
        second = _times_power(builder, all_lanes(1.0), builder.sub(n, half))
        below = builder.fcmp_ordered("<", x, all_lanes(0.0))
        top = builder.fmul(x, builder.select(below, first, all_lanes(1.0)))
        ratio = builder.fdiv(top, builder.fadd(all_lanes(1.0), builder.fmul(first, second)))
        return builder.select(below, builder.fmul(ratio, second), ratio)

    return vector(vector), generate
