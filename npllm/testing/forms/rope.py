"""Rotary position embedding with its forks: pairing, tables, frequencies, positions, magnitude."""

import ml_dtypes
import numpy as np

from npllm.testing.forms.common import Answer, Array, Choice, NotApplicableError, Work

__all__ = ["chosen_factors", "rope"]

POSITION_DTYPES = {"bfloat16 positions": ml_dtypes.bfloat16, "float16 positions": np.float16}


def rope(inputs: dict, choice: Choice, work: Work) -> Answer:
    """Rotate the first d_rope channels of every head under the options of `choice`.

        y[c] = x[c] cos(phase) + sign[c] x[partner[c]] sin(phase),   phase = position * inv_freq
        slack = 2 u (|x cos| + |x' sin|) + (|x| + |x'|) magnitude u (3 phase + 1)

    Returns
    -------
    answer : Answer
        Arrays [n_batch, n_head, n_seq, d_head].
    """
    x = inputs["x"].reshape(-1, *inputs["x"].shape[-3:]).astype(work.dtype)
    d_head = x.shape[-1]
    d_rope = d_head if choice.get("C5") == "full" else inputs["d_rope"]
    channel, partner, sign, angle = _layout(d_head, d_rope, choice)
    phase = _phase(inputs, choice, d_rope, d_head, work)[..., angle]
    magnitude, outside = (
        np.asarray(factor, work.dtype) for factor in _magnitude(inputs["magnitude"], choice)
    )
    with np.errstate(invalid="ignore"):  # float16 positions overflow: infinity turns by no angle
        cos, sin = magnitude * np.cos(phase), sign.astype(work.dtype) * magnitude * np.sin(phase)
    y = x * outside
    y[..., channel] = y[..., channel] * cos + (x * outside)[..., partner] * sin
    if work.dtype != np.float64:
        return Answer(y, None)
    return Answer(y, _slack(x * outside, channel, partner, cos, sin, phase, magnitude, work.unit))


def _slack(
    x: Array,
    channel: Array,
    partner: Array,
    cos: Array,
    sin: Array,
    phase: Array,
    magnitude: Array,
    unit: float,
) -> Array:
    own, other = np.abs(x[..., channel]), np.abs(x[..., partner])
    table = np.abs(magnitude) * unit * (3 * np.abs(phase) + 1)
    slack = 4 * unit * np.abs(x)
    slack[..., channel] += 2 * unit * (own * np.abs(cos) + other * np.abs(sin))
    slack[..., channel] += (own + other) * table
    return slack


def _layout(d_head: int, d_rope: int, choice: Choice) -> tuple[Array, Array, Array, Array]:
    """Return the channels that turn, the partner, sign and angle of each."""
    c, half = np.arange(d_rope), d_rope // 2
    is_interleaved = choice.get("C1") == "interleaved"
    table = choice.get("C26")
    if table == "half-split table, interleaved rotation":
        is_interleaved = True
    if table == "interleaved table, half-split rotation":
        is_interleaved = False
    if choice.get("C34") == "i + d_head/2" and not is_interleaved:
        c = np.concatenate([np.arange(half), np.arange(half) + d_head // 2])
        partner = np.concatenate([c[half:], c[:half]])
        sign, angle = np.repeat([-1.0, 1.0], half), np.tile(np.arange(half), 2)
    elif is_interleaved:
        partner, sign, angle = c ^ 1, np.where(c % 2 == 0, -1.0, 1.0), c // 2
    else:
        partner, sign, angle = (c + half) % d_rope, np.where(c < half, -1.0, 1.0), c % half
    if table:
        place = np.arange(d_rope)
        angle = place % half if is_interleaved else place // 2
    return c, partner, -sign if choice.get("C27") == "-sin" else sign, angle


def _phase(inputs: dict, choice: Choice, d_rope: int, d_head: int, work: Work) -> Array:
    """Phases [n_batch or 1, 1, n_seq, d_rope/2]."""
    positions = _positions(inputs["positions"], choice)
    width = d_head if choice.get("C5") == "exponents over d_head" else d_rope
    base = 10000.0 if choice.get("C25") == "10000" else inputs["base"]
    exponent = (np.arange(0, d_rope, 2, dtype=np.float32) / np.float32(width)).astype(np.float64)
    power = np.power(float(base), exponent).astype(np.float32)
    inv_freq = np.float32(1) / (chosen_factors(inputs, positions, choice, d_rope // 2) * power)
    option = choice.get("C2")
    if option in POSITION_DTYPES:
        with np.errstate(over="ignore"):
            positions = positions.astype(np.float32).astype(POSITION_DTYPES[option])
    if option == "bfloat16 throughout":
        narrow = (
            x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
            for x in (positions, inv_freq)
        )
        first, second = narrow
        phase = (first[:, None, :, None] * second).astype(ml_dtypes.bfloat16)
        return phase.astype(work.dtype)
    return positions.astype(work.dtype)[:, None, :, None] * inv_freq.astype(work.dtype)


def _positions(positions: Array, choice: Choice) -> Array:
    """Positions [n_batch or 1, n_seq] as an implementation with a fault counts them."""
    p = positions.reshape(-1, positions.shape[-1]).astype(np.int64)
    step = np.diff(p, axis=-1)
    if choice.get("C18") == "column index":
        if len(p) < 2 or not np.isin(step, (0, 1)).all():
            raise NotApplicableError("left padding shows in two rows of positions that count up")
        p = np.broadcast_to(np.arange(p.shape[-1]) + p[:, -1].max() + 1 - p.shape[-1], p.shape)
    if choice.get("C19") == "positions run on":
        if not (step < 0).any():
            raise NotApplicableError("packing shows where positions start again")
        p = p[:, :1] + np.arange(p.shape[-1])
    return p + 1 if choice.get("C32") == "position off by one" else p


def chosen_factors(inputs: dict, positions: Array, choice: Choice, n: int) -> Array:
    """Factors of LongRoPE, float32 [n]: long where the call exceeds the original context."""
    factors, option = inputs["factors"], choice.get("C3")
    if factors is None or option == "ignored":
        return np.ones(n, dtype=np.float32)
    if factors.ndim == 1:
        chosen = factors
        if option:
            raise NotApplicableError("the choice of factors shows where both sets are given")
    else:
        n_original = inputs["n_original"]
        reached = positions.min() if option == "by cache offset" else positions.max() + 1
        is_long = {"always long": True, "always short": False}.get(
            option or "", reached > n_original
        )
        chosen = factors[1 if is_long else 0]
    ones = np.ones(max(n - len(chosen), 0), dtype=np.float32)
    return np.concatenate([chosen.astype(np.float32), ones])[:n]


def _magnitude(magnitude: float, choice: Choice) -> tuple[float, float]:
    """Return the factor on cos and sin, and the factor on the whole head."""
    option = choice.get("C4")
    if option == "on q and k":
        return 1.0, magnitude
    return (1.0 if option == "omitted" else magnitude), 1.0
