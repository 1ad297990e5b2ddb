"""Rotary position embedding (RoPE): each pair of channels is turned by an angle proportional to the
position.
"""

from typing import Any

from npllm.arrays import array_namespace, compute_dtype, expect_shape, ieee_semantics, widen
from npllm.errors import NpllmValueError

__all__ = ["apply_rope", "apply_rope_complex", "rope_tables", "rotation_matrix"]

Array = Any


@ieee_semantics
def rope_tables(positions: Array, inv_freq: Array, scale: float = 1.0) -> tuple[Array, Array]:
    """Tabulate the cosine and sine of every angle, once for all layers.

        phase[..., n, i] = positions[..., n] * inv_freq[..., i]
        cos[..., n, i] = cos[..., n, i + d_rope/2] = scale * cos(phase[..., n, i]),  and sin alike

    Parameters
    ----------
    positions : integer array [..., n_seq]
    inv_freq : array [d_rope/2]
        Or [..., 1, d_rope/2], to give each sequence its own.
    scale : float
        Attention factor of LongRoPE; it scales both tables, so it enters a score squared.

    Returns
    -------
    cos, sin : array [..., n_seq, d_rope]
        In the compute dtype of `inv_freq`.

    Notes
    -----
    The phase is never below float32: bfloat16 would round position 15962 to 15936.

    Source: "RoFormer" (Su et al. 2021), equation 34; `Phi3RotaryEmbedding.forward`.
    """
    xp = array_namespace(positions, inv_freq)
    inv_freq = widen(inv_freq)
    phase = (
        xp.astype(positions, inv_freq.dtype)[..., None] * inv_freq
    )  # [..., n_seq] -> [..., n_seq, d_rope/2]
    phase = xp.concat([phase, phase], axis=-1)  # -> [..., n_seq, d_rope]
    return scale * xp.cos(phase), scale * xp.sin(phase)


@ieee_semantics
def apply_rope(x: Array, cos: Array, sin: Array, *, interleaved: bool = False) -> Array:
    """Rotate the first d_rope channels of every head, pair by pair, and pass the others through.

        y[i]            = x[i] * cos[i] - x[i + d_rope/2] * sin[i]
        y[i + d_rope/2] = x[i + d_rope/2] * cos[i] + x[i] * sin[i],   i = 0 ... d_rope/2 - 1

    Parameters
    ----------
    x : array [..., n_head, n_seq, d_head]
    cos : array [n_seq, d_rope]
        From `rope_tables`; or [n_batch, n_seq, d_rope], to which the head axis is added here.
    sin : array [n_seq, d_rope]
    interleaved : bool
        False pairs channel i with i + d_rope/2 (Phi-3, Llama in Transformers' layout, GPT-NeoX);
        True pairs 2i with 2i + 1 (RoFormer's paper, GPT-J, Llama as published by Meta).  The tables
        are the same for both.

    Returns
    -------
    y : array [..., n_head, n_seq, d_head]
        A new array in the dtype of `x`.

    Raises
    ------
    NpllmValueError
        When the tables do not fit `x` or each other.

    Notes
    -----
    Computes in float32 (float64 when any input is) and rounds once.

    Source: "RoFormer" (Su et al. 2021), equation 34; `apply_rotary_pos_emb` of Transformers' Phi-3.
    """
    xp = array_namespace(x, cos, sin)
    expect_shape("x", x, dots=None, n_head=None, n_seq=None, d_head=None)
    d_rope = cos.shape[-1]
    expect_shape("cos", cos, dots=None, n_seq=x.shape[-2], d_rope=None)
    expect_shape("sin", sin, dots=None, n_seq=x.shape[-2], d_rope=d_rope)
    if d_rope > x.shape[-1] or d_rope % 2:
        raise NpllmValueError(
            f"cos must have an even d_rope of at most d_head = {x.shape[-1]}, got {d_rope}"
        )
    rows = zip(reversed(cos.shape[:-2]), reversed(x.shape[:-3]), strict=False)
    if (
        cos.shape != sin.shape
        or cos.ndim > x.ndim - 1
        or any(got not in (1, want) for got, want in rows)
    ):
        raise NpllmValueError(
            "cos and sin must have one shape, [n_seq, d_rope] or with the axes of x before the "
            "heads in front, "
            f"got cos {list(cos.shape)} and sin {list(sin.shape)} for x {list(x.shape)}"
        )
    dtype = compute_dtype(x, cos, sin)
    cos, sin = (
        widen(xp.expand_dims(t, axis=-3), dtype) for t in (cos, sin)
    )  # [..., n_seq, d_rope] -> [..., 1, n_seq, d_rope]
    wide = widen(x, dtype)
    head = wide[..., :d_rope]
    if interleaved:
        head = _pairs_to_halves(head, xp)
    y = head * cos + _rotate_half(head, xp) * sin
    if interleaved:
        y = _halves_to_pairs(y, xp)
    if d_rope < x.shape[-1]:
        y = xp.concat([y, wide[..., d_rope:]], axis=-1)
    return y if y.dtype == x.dtype else xp.astype(y, x.dtype)


def apply_rope_complex(
    x: Array, positions: Array, inv_freq: Array, *, interleaved: bool = False
) -> Array:
    """Rotate pairs of channels as complex numbers: a multiplication by e^(i phase).

        z[i] = x[i] + 1j * x[i + d_rope/2];   z'[i] = z[i] * exp(1j * position * inv_freq[i])

    Parameters
    ----------
    x : array [..., n_head, n_seq, d_rope]
    positions : integer array [n_seq]
    inv_freq : array [d_rope/2]
    interleaved : bool
        True pairs channels 2i and 2i + 1.

    Returns
    -------
    y : array [..., n_head, n_seq, d_rope]
        In the dtype of `x`; equals `apply_rope`.

    Notes
    -----
    Computes in complex64 (complex128 when `x` or `inv_freq` is float64).

    Source: "RoFormer" (Su et al. 2021), equation 12; the code released with "LLaMA" (Touvron et al.
    2023), interleaved.
    """
    xp = array_namespace(x, positions, inv_freq)
    dtype = compute_dtype(x, inv_freq)
    expect_shape(
        "x", x, dots=None, n_head=None, n_seq=positions.shape[-1], d_rope=2 * inv_freq.shape[-1]
    )
    phase = xp.astype(positions, dtype)[..., None] * widen(inv_freq, dtype)
    turn = xp.exp(1j * phase)
    wide = widen(x, dtype)
    half = x.shape[-1] // 2
    real, imag = (
        (wide[..., 0::2], wide[..., 1::2]) if interleaved else (wide[..., :half], wide[..., half:])
    )
    z = (real + 1j * imag) * turn
    y = xp.concat([xp.real(z), xp.imag(z)], axis=-1)
    y = _halves_to_pairs(y, xp) if interleaved else y
    return y if y.dtype == x.dtype else xp.astype(y, x.dtype)


def rotation_matrix(positions: Array, inv_freq: Array) -> Array:
    """Write the rotation of a position as a matrix: one 2 x 2 rotation for each channel pair.

        R[i, i] = R[i + d_rope/2, i + d_rope/2] = cos(phase_i)
        R[i + d_rope/2, i] = sin(phase_i) = -R[i, i + d_rope/2],   phase_i = position * inv_freq[i]

    Parameters
    ----------
    positions : integer array [...]
    inv_freq : array [d_rope/2]

    Returns
    -------
    rotation : array [..., d_rope, d_rope]
        `rotation @ column` equals `apply_rope` of that column (half-split pairing, scale 1).

    Notes
    -----
    For reading and checking: a product with this matrix costs d_rope times what `apply_rope` costs.
    R_m R_n = R_(m+n), so that the score of a query at m with a key at n depends on m - n only.

    Source: "RoFormer" (Su et al. 2021), equation 15, in the channel order of Transformers.
    """
    xp = array_namespace(positions, inv_freq)
    cos, sin = rope_tables(positions[..., None], inv_freq)  # [..., 1, d_rope]
    half = inv_freq.shape[-1]
    eye = xp.eye(half, dtype=cos.dtype)
    quarter_turn = xp.concat(
        [xp.concat([0 * eye, -eye], axis=1), xp.concat([eye, 0 * eye], axis=1)], axis=0
    )
    return xp.eye(2 * half, dtype=cos.dtype) * cos + quarter_turn * sin


def _rotate_half(x: Array, xp: Any) -> Array:
    """Turn every half-split pair by 90 degrees: (a, b) -> (-b, a)."""
    half = x.shape[-1] // 2
    return xp.concat([-x[..., half:], x[..., :half]], axis=-1)


def _pairs_to_halves(x: Array, xp: Any) -> Array:
    """Move channels 2i and 2i + 1 to i and i + d/2."""
    return xp.concat([x[..., 0::2], x[..., 1::2]], axis=-1)


def _halves_to_pairs(x: Array, xp: Any) -> Array:
    """Move channels i and i + d/2 to 2i and 2i + 1."""
    half = x.shape[-1] // 2
    return xp.reshape(xp.stack([x[..., :half], x[..., half:]], axis=-1), x.shape)
