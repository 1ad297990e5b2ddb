"""Emulation of 16-bit arithmetic: the set of operations that rounds where Transformers rounds.

A model that Transformers runs in bfloat16 rounds after every elementary step.  Each such place is a
rounding point with a name (`POINTS`); between two of them everything is float32, as it is inside
PyTorch's kernels.  Activations are float32 arrays whose values the 16-bit type holds.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from npllm.arrays import array_namespace, entries_at_once, expect_shape, round_to, widen
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.ops.attention import check_attention, evaluate_mask
from npllm.ops.embedding import embed
from npllm.ops.feedforward import silu
from npllm.ops.opset import Ops
from npllm.ops.residual import add
from npllm.ops.rope import _halves_to_pairs, _pairs_to_halves, _rotate_half, rope_tables

__all__ = ["POINTS", "emulate"]

Array = Any

LARGEST = {
    "bfloat16": (2 - 2**-7) * 2.0**127,
    "float16": (2 - 2**-10) * 2.0**15,
}  # finite values of the type

POINTS = {
    "normalised": "rms_norm: x / root mean square, before the gain",
    "gain": "rms_norm: weight * normalised",
    "linear": "linear: every product with a weight matrix, bias included",
    "tables": "rope_tables: cos and sin, after the attention factor",
    "cos_part": "apply_rope: x * cos",
    "sin_part": "apply_rope: rotated x * sin",
    "rotation": "apply_rope: the sum of the two",
    "scores": "attention: q k^T",
    "scaled": "attention: scale * scores",
    "masked": "attention: scaled + 0 where visible, + the lowest finite number elsewhere",
    "weights": "attention: the softmax, itself float32",
    "values": "attention: weights @ v",
    "silu": "swiglu: silu(gate)",
    "gated": "swiglu: silu(gate) * up",
    "residual": "add: the residual stream after each half block",
}
"""Where a 16-bit model rounds: name -> what is rounded, in the order of a layer."""


def emulate(dtype: str, points: Iterable[str] = tuple(POINTS), *, bitwise: bool = True) -> Ops:
    """Make the set of operations that rounds where Transformers rounds in a 16-bit type.

        model = npllm.load(folder, dtype="bfloat16", ops=npllm.ops.emulate("bfloat16"))

    Parameters
    ----------
    dtype : str
        "bfloat16" or "float16".
    points : collection of str
        Where to round, by the names below; the other places stay float32.  Leave one out to see
        what it costs (`npllm precision` does so for each), or to find the one that a kernel has
        forgotten.
    bitwise : bool
        True: sums in PyTorch's order, as far as it is known; the weights must be stored in `dtype`.
        False: the library's matmul, about 20 times as fast, float32 sums in another order;
        weights of any type are used as they are, in float32, without rounding.

    Returns
    -------
    ops : Ops
        Every op has the signature of its definition; float32 arrays in and out.

    Raises
    ------
    NpllmTypeError
        While the model runs: for float64 activations, and under `bitwise` for weights of another
        type.
    NpllmValueError
        For another dtype, and for a point that does not exist.  While the model runs: for an
        attention with bias, softcap or return_lse, which the emulated model does not have.

    Notes
    -----
    The points, in the order of a layer (as data: `from npllm.ops.emulate import POINTS`):

        normalised, gain          rms_norm: x / root mean square; weight * that
        linear                    every product with a weight matrix, bias included
        tables                    cos and sin, after the attention factor; phases stay float32
        cos_part, sin_part        apply_rope: x * cos; rotated x * sin
        rotation                  apply_rope: the sum of the two
        scores, scaled            attention: q k^T; scale * that
        masked                    attention: scaled + the lowest finite number, where hidden
        weights, values           attention: softmax; weights @ v
        silu, gated               swiglu: silu(gate); that * up
        residual                  the residual stream, after each half of a layer

    Between two points everything is float32: sums of products, the mean of squares, exp and sum of
    the softmax.

    Attention is the eager form with its n x n table.  A row that sees no key gets what Transformers
    gives it, the mean of all values (the lowest finite number is added to every score), where the
    definition gives zeros.

    Equal bits need equal sums, and their order depends on PyTorch's kernel and the CPU.  Here it is
    that of the instruction VDPBF16PS: channel after channel in float32, the odd one of each pair
    first.  It was found by comparison with PyTorch 2.13 on a CPU with AVX512_BF16: bfloat16
    products of up to 512 channels have the same bits in every entry tried.  PyTorch cuts longer
    ones into blocks, which is not repeated here.  Share of equal bits, measured on that CPU with
    `scripts/make_golden_emulate.py --measure` and the tests marked live:

        logits of 40 tiny bfloat16 models, random weights       99.98 % (39 models: all)
        logits of 20 tiny float16 models (another order there)  78 %
        linear of the default checkpoint, 576 channels in       99.998 %
        linear of the default checkpoint, 1536 channels in      99.98 %
        logits of the default checkpoint                        10 %: 30 layers amplify a last bit

    Distance from float64, max and mean of the logits' |difference|:

        logits up to                      tiny models, 3.8 ... 4.7       default checkpoint, 29.9
        default operations (float32)      8e-6, 6e-7                     8e-5, 9e-6
        emulation of bfloat16             0.21, 0.018                    0.76, 0.12
        Transformers in bfloat16          0.21, 0.018 (the same bits)    0.95, 0.14

    The default operations are the more accurate by four orders of magnitude.  On that checkpoint,
    the distance from Transformers in bfloat16 is 0.95 and 0.14 for the default operations, 1.1 and
    0.13 for the emulation: two runs in bfloat16 are as far from each other as from float64.  The
    most likely token at its 25 positions is that of float64 in 100 % (default) and 96 %
    (emulation), and that of Transformers in bfloat16 in 92 % and 96 %.

    Source: `modeling_phi3.py` of Transformers 5.23 with `attn_implementation="eager"`.
    """
    if dtype not in LARGEST:
        raise NpllmValueError(
            f"emulate knows the 16-bit types {' and '.join(LARGEST)}, got {dtype!r}; "
            "the default operations compute in float32"
        )
    chosen = frozenset(points)
    unknown = sorted(chosen - set(POINTS))
    if unknown:
        raise NpllmValueError(
            f"no rounding point is called {', '.join(unknown)}; there are {', '.join(POINTS)}"
        )
    rounded = _Rounding(dtype, chosen, bitwise)
    named: dict[str, Callable[..., Any]] = {
        "embed": _embed,
        "linear": _linear,
        "rms_norm": _rms_norm,
        "rope_tables": _rope_tables,
        "apply_rope": _apply_rope,
        "attention": _attention,
        "swiglu": _swiglu,
        "add": _add,
    }
    bound: dict[str, Any] = {name: partial(op, rounded) for name, op in named.items()}
    return Ops(**bound, name=f"emulate {dtype}")


class _Rounding(NamedTuple):
    """The type, and the points at which to round to it."""

    dtype: str
    points: frozenset
    bitwise: bool = True

    def __call__(self, point: str, x: Array) -> Array:
        """Round `x` if this point is one of those that round."""
        self.expect(x, "float32")
        return round_to(x, self.dtype) if point in self.points else x

    def weight(self, w: Array) -> Array:
        """Return a weight as float32; raise where it is not stored in the emulated type, and equal
        bits are asked for.
        """
        if self.bitwise:
            self.expect(w, self.dtype)
        return widen(w, array_namespace(w).float32)

    def product(self, a: Array, b: Array, xp: Any) -> Array:
        """Multiply matrices, with sums in float32."""
        return _product(a, b, xp) if self.bitwise else xp.matmul(a, b)

    def expect(self, x: Array, dtype: Any) -> None:
        """Raise for an array of another dtype: a float64 model has nothing to emulate, a float32
        weight is not yet rounded.
        """
        if str(x.dtype) != dtype:
            raise NpllmTypeError(
                f'emulate("{self.dtype}") takes weights stored in {self.dtype} and float32 '
                "activations, got "
                f"{x.dtype}, not {dtype}; "
                f'npllm.load(path, dtype="{self.dtype}", ops=...) rounds the weights'
            )


def _embed(rounded: _Rounding, ids: Array, weight: Array) -> Array:
    """Look up `embed`: nothing to round."""
    if rounded.bitwise:
        rounded.expect(weight, rounded.dtype)
    x = embed(ids, weight)
    return array_namespace(x).astype(x, array_namespace(x).float32)


def _linear(rounded: _Rounding, x: Array, weight: Array, bias: Array = None) -> Array:
    """Round x @ weight.T + bias once, the bias included: PyTorch accumulates in float32."""
    xp = array_namespace(x, weight, bias)
    expect_shape("weight", weight, d_out=None, d_in=x.shape[-1])
    d_out, d_in = weight.shape
    rows = xp.reshape(x, (-1, d_in))  # [..., d_in] -> [n, d_in]
    n_rows = max(1, entries_at_once(weight) // max(1, d_in))
    y = xp.concat(
        [
            rounded.product(
                rows, xp.matrix_transpose(rounded.weight(weight[start : start + n_rows, :])), xp
            )
            for start in range(0, d_out, n_rows)
        ],
        axis=-1,
    )
    y = y if bias is None else y + rounded.weight(bias)
    return rounded("linear", xp.reshape(y, (*x.shape[:-1], d_out)))


def _product(a: Array, b: Array, xp: Any) -> Array:
    """Multiply matrices in float32, where each sum takes one channel after another, the odd one of
    each pair first.

    Products of two 16-bit factors are exact in float32, so that nothing but the order of the sum
    decides about the last bits.
    """
    n = a.shape[-1]
    b = xp.reshape(xp.reshape(b, (-1,)), b.shape)  # rows in one piece, also of a transposed view
    y = xp.zeros((*a.shape[:-1], b.shape[-1]), dtype=xp.float32)
    for pair in range(0, n, 2):
        for c in range(min(pair + 1, n - 1), pair - 1, -1):
            y += a[..., :, c : c + 1] * b[..., c : c + 1, :]
    return y


def _rms_norm(rounded: _Rounding, x: Array, weight: Array, eps: float) -> Array:
    """Round the normalised row, and again its product with the gain; the root is taken as 1 / sqrt
    and multiplied by.
    """
    xp = array_namespace(x, weight)
    expect_shape("weight", weight, d_model=x.shape[-1])
    normalised = x * (1 / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps))
    return rounded("gain", rounded.weight(weight) * rounded("normalised", normalised))


def _rope_tables(
    rounded: _Rounding, positions: Array, inv_freq: Array, scale: Any = 1.0
) -> tuple[Array, Array]:
    """Round the tables; phases stay float32."""
    cos, sin = rope_tables(positions, inv_freq, scale)
    return rounded("tables", cos), rounded("tables", sin)


def _apply_rope(
    rounded: _Rounding, x: Array, cos: Array, sin: Array, *, interleaved: bool = False
) -> Array:
    """Round x * cos, rotated x * sin, and their sum."""
    xp = array_namespace(x, cos, sin)
    d_rope = cos.shape[-1]
    if cos.shape != sin.shape or cos.shape[-2] != x.shape[-2] or d_rope > x.shape[-1] or d_rope % 2:
        raise NpllmValueError(
            "cos and sin must be [n_seq, d_rope] for x [..., n_head, n_seq, d_head], with an "
            "even d_rope of at "
            f"most d_head; got cos {list(cos.shape)}, sin {list(sin.shape)} and x {list(x.shape)}"
        )
    cos, sin = (
        xp.expand_dims(t, axis=-3) for t in (cos, sin)
    )  # [..., n_seq, d_rope] -> [..., 1, n_seq, d_rope]
    head = _pairs_to_halves(x[..., :d_rope], xp) if interleaved else x[..., :d_rope]
    y = rounded(
        "rotation",
        rounded("cos_part", head * cos) + rounded("sin_part", _rotate_half(head, xp) * sin),
    )
    y = _halves_to_pairs(y, xp) if interleaved else y
    return xp.concat([y, x[..., d_rope:]], axis=-1)


def _attention(
    rounded: _Rounding,
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Any = None,
    bias: Array = None,
    scale: float | None = None,
    softcap: float | None = None,
    q_slots: Any = None,
    k_slots: Any = None,
    return_lse: bool = False,
) -> Array:
    """Compute eager attention, rounded after every step."""
    if bias is not None or softcap is not None or return_lse:
        raise NpllmValueError(
            "emulate repeats Phi-3's eager attention, which has no bias, no softcap and returns "
            "no lse"
        )
    xp = array_namespace(q, k, v)
    visible = evaluate_mask(
        xp, mask, q, *check_attention(xp, q, k, v, mask, bias, q_slots, k_slots)
    )
    group = q.shape[-3] // k.shape[-3]
    k, v = (
        xp.repeat(k, group, axis=-3),
        xp.repeat(v, group, axis=-3),
    )  # [..., n_kv_head, ...] -> [..., n_head, ...]
    s = rounded("scores", rounded.product(q, xp.matrix_transpose(k), xp))
    s = rounded("scaled", s * (q.shape[-1] ** -0.5 if scale is None else scale))
    if visible is not None:
        s = xp.where(visible, s, rounded("masked", s - LARGEST[rounded.dtype]))
    e = xp.exp(s - xp.max(s, axis=-1, keepdims=True))
    weights = rounded("weights", e / xp.sum(e, axis=-1, keepdims=True))
    return rounded("values", rounded.product(weights, v, xp))


def _swiglu(rounded: _Rounding, gate: Array, up: Array) -> Array:
    """Round silu(gate), and again its product with up."""
    if gate.shape != up.shape:
        raise NpllmValueError(
            "gate and up must have one shape [..., d_ff], "
            f"got gate {list(gate.shape)} and up {list(up.shape)}"
        )
    return rounded("gated", rounded("silu", silu(gate)) * up)


def _add(rounded: _Rounding, x: Array, y: Array) -> Array:
    """Round the sum."""
    return rounded("residual", add(x, y))
