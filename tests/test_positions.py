"""Positions: rotations as matrices, pairs and complex numbers, equal to each other; sinusoids, and
learned vectors.
"""

import math

import numpy as np
import pytest
from close import close
from hypothesis import given
from hypothesis import strategies as st
from strategies import compute_dtypes, normal, seeds

from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.ops import (
    add_positions,
    apply_rope,
    apply_rope_complex,
    rope_frequencies,
    rope_tables,
    rotation_matrix,
    sinusoidal_positions,
)

places = st.integers(-300, 300)
halves = st.integers(1, 8)


def frequencies(half):
    return rope_frequencies(2 * half).astype(np.float64)


def matrix(position, half):
    return rotation_matrix(np.array(position), frequencies(half))


def rotated(x, positions, half, **options):
    return apply_rope(x, *rope_tables(positions, frequencies(half)), **options)


# ---------------------------------------------------------------------------------------------------------------- rotation matrices


@given(places, halves)
def test_a_rotation_matrix_is_two_by_two_rotations_of_the_pairs(n, half):
    """RoFormer, equation 15, with channel i beside channel i + d / 2."""
    desired = np.zeros((2 * half, 2 * half))
    for i in range(half):
        angle = n * 10000.0 ** (-2 * i / (2 * half))
        desired[i, i] = desired[i + half, i + half] = math.cos(angle)
        desired[i + half, i], desired[i, i + half] = math.sin(angle), -math.sin(angle)
    close(
        matrix(n, half), desired, times=3e7
    )  # the frequencies are rounded to float32, and the angle grows with n


@given(places, halves)
def test_a_rotation_is_orthogonal_and_turns_nothing_over(n, half):
    r = matrix(n, half)
    close(r @ r.T, np.eye(2 * half), times=4)
    close(np.array(np.linalg.det(r)), np.array(1.0), times=20)
    close(matrix(-n, half), r.T)
    close(matrix(0, half), np.eye(2 * half))


@given(places, places, halves)
def test_rotations_add_up(m, n, half):
    close(matrix(m, half) @ matrix(n, half), matrix(m + n, half), times=200)


@given(places, places, st.integers(-1000, 1000), halves, seeds)
def test_a_score_depends_on_the_distance_only(m, n, shift, half, seed):
    q, k = np.random.default_rng(seed).standard_normal((2, 2 * half))
    score = (matrix(m, half) @ q) @ (matrix(n, half) @ k)
    close(
        np.array((matrix(m + shift, half) @ q) @ (matrix(n + shift, half) @ k)),
        np.array(score),
        times=1e4,
    )
    close(np.array(q @ (matrix(n - m, half) @ k)), np.array(score), times=1e4)


def test_matrices_keep_the_axes_of_the_positions():
    positions = np.arange(6).reshape(2, 3)
    r = rotation_matrix(positions, frequencies(2))
    assert r.shape == (2, 3, 4, 4)
    close(r[1, 2], matrix(5, 2), times=0)


# ------------------------------------------------------------------------------------------- half-split, interleaved and complex pairs


def to_pairs(half):
    """The permutation from half-split to interleaved channels: channel c of the pairs is channel
    ORDER[c] of the halves.
    """
    return np.array([c // 2 + half * (c % 2) for c in range(2 * half)])


@given(st.data(), halves, st.integers(1, 6), compute_dtypes)
def test_half_split_is_the_matrix(data, half, n_seq, dtype):
    x = data.draw(normal((2, n_seq, 2 * half), dtype))
    positions = np.array(data.draw(st.lists(st.integers(0, 4000), min_size=n_seq, max_size=n_seq)))
    desired = np.einsum(
        "nij,hnj->hni", rotation_matrix(positions, frequencies(half)), x.astype(np.float64)
    )
    close(rotated(x, positions, half), desired, dtype=dtype, times=4)


@given(st.data(), halves, st.integers(1, 6))
def test_interleaved_pairs_are_the_half_split_ones_in_another_order(data, half, n_seq):
    x, order, positions = (
        data.draw(normal((2, n_seq, 2 * half), np.float64)),
        to_pairs(half),
        np.arange(n_seq),
    )
    close(
        rotated(x[..., order], positions, half, interleaved=True),
        rotated(x, positions, half)[..., order],
        times=0,
    )
    close(
        apply_rope_complex(x[..., order], positions, frequencies(half), interleaved=True),
        apply_rope_complex(x, positions, frequencies(half))[..., order],
        times=0,
    )


@pytest.mark.parametrize("interleaved", [False, True])
@given(st.data(), halves, st.integers(1, 6), compute_dtypes)
def test_the_complex_product_is_the_rotation(interleaved, data, half, n_seq, dtype):
    x, positions = data.draw(normal((2, 3, n_seq, 2 * half), dtype)), np.arange(100, 100 + n_seq)
    inv_freq = frequencies(half).astype(dtype)
    got = apply_rope_complex(x, positions, inv_freq, interleaved=interleaved)
    close(got, apply_rope(x, *rope_tables(positions, inv_freq), interleaved=interleaved), times=4)
    z = x[..., 0::2] + 1j * x[..., 1::2] if interleaved else x[..., :half] + 1j * x[..., half:]
    z = z * np.exp(1j * positions[:, None] * inv_freq.astype(np.float64))
    desired = (
        np.stack([z.real, z.imag], axis=-1).reshape(x.shape)
        if interleaved
        else np.concatenate([z.real, z.imag], axis=-1)
    )
    close(got, desired, dtype=dtype, times=20)


@given(st.data(), halves, st.booleans())
def test_a_rotation_keeps_the_norm_of_every_pair(data, half, interleaved):
    x = data.draw(normal((1, 5, 2 * half), np.float64))
    y = rotated(x, np.arange(5) * 37, half, interleaved=interleaved)
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
    for a, b in pairs:
        close(np.hypot(y[..., a], y[..., b]), np.hypot(x[..., a], x[..., b]))


@given(st.data(), halves, st.booleans(), st.integers(0, 2000))
def test_scores_of_rotated_heads_depend_on_distances_only(data, half, interleaved, shift):
    q, k = (data.draw(normal((2, 5, 2 * half), np.float64)) for _ in range(2))
    scores = [
        (
            rotated(q, at, half, interleaved=interleaved)
            @ np.swapaxes(rotated(k, at, half, interleaved=interleaved), -1, -2)
        )
        for at in (np.arange(5), np.arange(5) + shift)
    ]
    close(scores[1], scores[0], times=4000)


@pytest.mark.parametrize(
    ("shape", "n", "half"),
    [((1, 3, 4), 2, 2), ((1, 3, 4), 3, 1), ((1, 3, 4), 3, 3), ((3, 4), 3, 2)],
)
def test_a_complex_product_that_does_not_fit_raises(shape, n, half):
    with pytest.raises(NpllmValueError, match="x must be"):
        apply_rope_complex(np.ones(shape), np.arange(n), frequencies(half))


# --------------------------------------------------------------------------------------------------------------- absolute positions


@given(
    st.integers(1, 9), st.integers(0, 5000), st.integers(1, 8), st.sampled_from([10000.0, 100.0])
)
def test_sinusoids_follow_the_formula(n_seq, start, half, base):
    """Vaswani et al. 2017, section 3.5: the even channels sines, the odd ones cosines of the same
    angle.
    """
    d = 2 * half
    angle = [
        [(start + n) / math.pow(base, 2 * (c // 2) / d) for c in range(d)] for n in range(n_seq)
    ]
    desired = np.array(
        [[math.cos(a) if c % 2 else math.sin(a) for c, a in enumerate(row)] for row in angle]
    )
    close(sinusoidal_positions(np.arange(start, start + n_seq), d, base), desired, dtype=np.float32)


@given(st.integers(0, 2000), st.integers(0, 2000), halves)
def test_a_shift_is_the_same_rotation_at_every_position(n, k, half):
    """Why the paper chose sinusoids: p[n + k] is a linear function of p[n], and of k only."""
    d = 2 * half
    p = sinusoidal_positions(np.array([n, n + k]), d).astype(np.float64)
    turn = np.zeros((d, d))
    for i in range(half):
        c, s = math.cos(k / 10000 ** (2 * i / d)), math.sin(k / 10000 ** (2 * i / d))
        turn[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[c, s], [-s, c]]
    assert np.abs(turn @ p[0] - p[1]).max() < 3e-7


def test_sinusoids_keep_the_axes_of_the_positions():
    p = sinusoidal_positions(np.array([[0, 1], [2, 3]], dtype=np.int32), 6)
    close(p.reshape(4, 6), sinusoidal_positions(np.arange(4), 6), times=0)
    close(p[0, 0], np.array([0, 1, 0, 1, 0, 1], dtype=np.float32))


@pytest.mark.parametrize("d_model", [0, 1, 7, -2])
def test_sinusoids_come_in_pairs(d_model):
    with pytest.raises(
        NpllmValueError, match=f"d_model must be even and at least 2, got {d_model}"
    ):
        sinusoidal_positions(np.arange(3), d_model)


@given(st.data(), st.integers(1, 6), compute_dtypes)
def test_the_vector_of_its_position_is_added_to_each_token(data, n_seq, dtype):
    x, weight = data.draw(normal((2, n_seq, 4), dtype)), data.draw(normal((9, 4), np.float32))
    positions = np.array(data.draw(st.lists(st.integers(0, 8), min_size=n_seq, max_size=n_seq)))
    desired = np.array(
        [
            [x[b, n].astype(np.float64) + weight[positions[n]] for n in range(n_seq)]
            for b in range(2)
        ]
    )
    close(add_positions(x, positions, weight), desired, dtype=dtype)
    by_row = np.stack([positions, positions[::-1]])
    close(
        add_positions(x, by_row, weight)[1], add_positions(x, positions[::-1], weight)[1], times=0
    )


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (np.arange(3) + 7, r"positions must lie in 0 \.\.\. n_pos - 1 = 8, got 7 \.\.\. 9"),
        (np.array([-1, 0, 1]), "positions must lie in"),
        (np.arange(2), r"positions must be \[\.\.\., n_seq\] = \[\.\.\., 3\], got \[2\]"),
        (np.arange(1), "positions must be"),
    ],
)
def test_positions_without_a_learned_vector_raise(positions, message):
    with pytest.raises(NpllmValueError, match=message):
        add_positions(np.ones((2, 3, 4)), positions, np.ones((9, 4)))


def test_widths_and_kinds_that_do_not_fit_raise():
    with pytest.raises(NpllmValueError, match="x must be"):
        add_positions(np.ones((2, 3, 4)), np.arange(3), np.ones((9, 5)))
    with pytest.raises(NpllmTypeError, match="positions must be integers"):
        add_positions(np.ones((2, 3, 4)), np.arange(3.0), np.ones((9, 4)))
