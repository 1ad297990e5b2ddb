"""rope_tables, apply_rope, rotation_matrix: a turn of each pair of channels."""

import re

import numpy as np
import oracles
import pytest
from close import close
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOATS, compute_dtypes, dtypes, normal

from npllm.errors import NpllmValueError
from npllm.ops import apply_rope, rope_frequencies, rope_tables, rotation_matrix

halves, positions_drawn = st.integers(1, 4), st.integers(-40, 40)


def frequencies(half, dtype=np.float64):
    return rope_frequencies(2 * half).astype(dtype)


def turned(x, position, inv_freq):
    """Rotate one vector."""
    return apply_rope(x[None, None, :], *rope_tables(np.array([position]), inv_freq))[0, 0]


# -------------------------------------------------------------------------------------------------------------------- the tables


@given(
    st.data(),
    compute_dtypes,
    halves,
    st.sampled_from([(), (2,), (2, 3)]),
    st.sampled_from([1.0, 1.19, 0.5]),
)
def test_tables_hold_scaled_cosine_and_sine_of_every_angle_twice(data, dtype, half, batch, scale):
    positions = data.draw(normal((*batch, 5), np.int64, 20))
    inv_freq = frequencies(half, dtype)
    cos, sin = rope_tables(positions, inv_freq, scale)
    phase = positions[..., None] * np.tile(inv_freq, 2)  # rounded to float32 where inv_freq is
    close(cos, scale * np.cos(phase.astype(np.float64)), dtype=dtype, times=40)
    close(sin, scale * np.sin(phase.astype(np.float64)), dtype=dtype, times=40)


def test_each_sequence_may_have_its_own_frequencies():
    positions, inv_freq = np.array([[0, 1, 2], [5, 6, 7]]), np.array([[[1.0, 0.1]], [[0.5, 0.2]]])
    cos, sin = rope_tables(positions, inv_freq)
    for row in range(2):
        alone = rope_tables(positions[row], inv_freq[row, 0])
        close(cos[row], alone[0])
        close(sin[row], alone[1])


@pytest.mark.parametrize("position", [4095, 15962, 131071])
def test_phases_of_16_bit_frequencies_are_float32(position):
    inv_freq = np.array([1.0, 0.5], FLOATS["bfloat16"])
    cos, sin = rope_tables(np.array([position]), inv_freq)
    phase = np.array([[position, position / 2] * 2])  # exact in float32, not in bfloat16
    close(cos, np.cos(phase), dtype=np.float32)
    close(sin, np.sin(phase), dtype=np.float32)


@pytest.mark.parametrize("position", [4095, 131071])
def test_far_positions_turn_by_the_float32_phase(position):
    inv_freq = rope_frequencies(96)
    cos, sin = rope_tables(np.array([position]), inv_freq)
    phase = (np.float32(position) * inv_freq).astype(np.float64)
    close(cos[0, :48], np.cos(phase), dtype=np.float32)
    close(sin[0, 48:], np.sin(phase), dtype=np.float32)


# ------------------------------------------------------------------------------------------------------------------ the rotation


@given(
    st.data(),
    dtypes,
    compute_dtypes,
    halves,
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from([1.0, 1.19]),
    st.booleans(),
)
def test_a_pair_is_a_complex_number_times_a_phase(
    data, dtype, table_dtype, half, rest, interleaved, scale, per_row
):
    x = data.draw(normal((2, 3, 4, 2 * half + rest), dtype))
    positions = data.draw(normal((2 if per_row else 1, 4), np.int64, 9))
    inv_freq = frequencies(half, np.float64 if dtype == np.float64 else table_dtype)
    cos, sin = rope_tables(positions if per_row else positions[0], inv_freq, scale)
    y = apply_rope(x, cos, sin, interleaved=interleaved)
    close(y, oracles.rope(x, positions, inv_freq, scale, interleaved), dtype=dtype, times=8)


@given(st.data(), dtypes, halves, st.integers(1, 3), st.booleans())
def test_channels_beyond_d_rope_pass_through_unchanged(data, dtype, half, rest, interleaved):
    x = data.draw(normal((2, 3, 2 * half + rest), dtype))
    cos, sin = rope_tables(np.arange(3), frequencies(half, np.float32), 1.19)
    close(
        apply_rope(x, cos, sin, interleaved=interleaved)[..., 2 * half :],
        x[..., 2 * half :],
        times=0,
    )


@given(st.data(), halves, st.booleans())
def test_a_rotation_keeps_the_length_of_every_pair(data, half, interleaved):
    x = data.draw(normal((1, 5, 2 * half), np.float64))
    y = apply_rope(x, *rope_tables(np.arange(5), frequencies(half)), interleaved=interleaved)
    a, b = (
        (slice(0, None, 2), slice(1, None, 2))
        if interleaved
        else (slice(0, half), slice(half, None))
    )
    close(np.hypot(y[..., a], y[..., b]), np.hypot(x[..., a], x[..., b]))


@given(st.data(), halves)
def test_position_zero_turns_nothing(data, half):
    x = data.draw(normal((2, 1, 2 * half), np.float32))
    close(apply_rope(x, *rope_tables(np.array([0]), frequencies(half, np.float32))), x, times=0)


@given(st.data(), halves, positions_drawn, positions_drawn, positions_drawn)
def test_the_score_depends_on_the_distance_only(data, half, m, n, shift):
    q, k = data.draw(normal(2 * half, np.float64)), data.draw(normal(2 * half, np.float64))
    inv_freq = frequencies(half)
    score = turned(q, m, inv_freq) @ turned(k, n, inv_freq)
    moved = turned(q, m + shift, inv_freq) @ turned(k, n + shift, inv_freq)
    direct = q @ rotation_matrix(np.asarray(n - m), inv_freq) @ k
    size = np.asarray(np.linalg.norm(q) * np.linalg.norm(k))
    close(moved - score + size, size, times=10)
    close(direct - score + size, size, times=10)


@given(st.data(), dtypes, halves, st.integers(0, 2))
def test_interleaved_is_half_split_under_the_permutation(data, dtype, half, rest):
    x = data.draw(normal((2, 3, 2 * half + rest), dtype))
    order = [*range(0, 2 * half, 2), *range(1, 2 * half, 2), *range(2 * half, 2 * half + rest)]
    tables = rope_tables(np.arange(3), frequencies(half, np.float32))
    close(
        apply_rope(x, *tables, interleaved=True)[..., order],
        apply_rope(x[..., order], *tables),
        times=0,
    )


def test_scores_of_bfloat16_queries_are_rounded_once():
    x = np.array([[[1.0, 3.0]]], FLOATS["bfloat16"])
    cos, sin = rope_tables(np.array([15962]), rope_frequencies(2))
    wide = apply_rope(x.astype(np.float32), cos, sin)
    close(apply_rope(x, cos, sin), wide.astype(FLOATS["bfloat16"]), times=0)


@pytest.mark.parametrize(
    ("cos", "sin", "message"),
    [
        ((4, 2), (4, 2), "cos must be [..., n_seq, d_rope] = [..., 3, d_rope], got [4, 2]"),
        ((3, 2), (3, 4), "sin must be [..., n_seq, d_rope] = [..., 3, 2], got [3, 4]"),
        ((3, 8), (3, 8), "at most d_head = 6, got 8"),
        ((3, 3), (3, 3), "even d_rope"),
        ((2,), (2,), "cos must be"),
        ((5, 3, 2), (5, 3, 2), "cos and sin must"),
        ((2, 3, 2), (3, 2), "cos and sin must"),
    ],
)
def test_tables_that_do_not_fit_raise_with_both_sides(cos, sin, message):
    with pytest.raises(NpllmValueError, match=re.escape(message)):
        apply_rope(np.ones((2, 4, 3, 6)), np.ones(cos), np.ones(sin))


def test_tables_of_more_sequences_than_x_raise_and_do_not_broadcast():
    with pytest.raises(NpllmValueError, match="cos and sin must"):
        apply_rope(np.ones((1, 4, 3, 6)), np.ones((2, 3, 6)), np.ones((2, 3, 6)))
    with pytest.raises(NpllmValueError, match="cos and sin must"):
        apply_rope(np.ones((4, 3, 6)), np.ones((2, 3, 6)), np.ones((2, 3, 6)))


# -------------------------------------------------------------------------------------------------------------------- the matrix


@given(halves, positions_drawn)
def test_a_rotation_matrix_is_orthogonal_with_determinant_one(half, m):
    r = rotation_matrix(np.asarray(m), frequencies(half))
    close(r @ r.T, np.eye(2 * half))
    close(np.linalg.det(r), np.float64(1), times=10)


@given(halves, positions_drawn, positions_drawn)
def test_rotations_add_up(half, m, n):
    inv_freq = frequencies(half)
    close(
        rotation_matrix(np.asarray(m), inv_freq) @ rotation_matrix(np.asarray(n), inv_freq),
        rotation_matrix(np.asarray(m + n), inv_freq),
        times=10,
    )


@given(st.data(), compute_dtypes, halves, st.sampled_from([(), (2,)]))
def test_the_matrix_times_a_column_is_apply_rope(data, dtype, half, batch):
    x, positions = (
        data.draw(normal((*batch, 1, 3, 2 * half), dtype)),
        data.draw(normal((*batch, 3), np.int64, 9)),
    )
    inv_freq = frequencies(half, dtype)
    product = rotation_matrix(positions, inv_freq) @ x[..., 0, :, :, None]
    close(apply_rope(x, *rope_tables(positions, inv_freq)), np.expand_dims(product[..., 0], -3))


def test_the_matrix_of_a_quarter_turn():
    close(
        rotation_matrix(np.asarray(1), np.array([np.pi / 2])), np.array([[0.0, -1.0], [1.0, 0.0]])
    )
