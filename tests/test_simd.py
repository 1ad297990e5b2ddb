"""Sums over the lanes of vectors, which have one order wherever they are computed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("numba")
from npllm.kernels.cpu.launching import kernel, launch
from npllm.kernels.cpu.simd import load, reduce_add, splat, store
from npllm.kernels.cpu.simd_rows import load_each, sums_of_sixteen


@kernel()
def both_sums(x, one_by_one, together):
    """Sums of the rows of x [16, 16], each by itself, and sixteen at once."""
    zero = splat(np.float32(0))
    four = zero, zero, zero, zero
    store(together, 0, sums_of_sixteen(load_each(x, 0, 16, four + four + four + four)))
    for k in range(16):
        one_by_one[k] = reduce_add(load(x, 16 * k))


def halved(row):
    """The formula: halves are added until one number is left."""
    while len(row) > 1:
        row = row[: len(row) // 2] + row[len(row) // 2 :]
    return row[0]


@given(st.integers(0, 2**32 - 1), st.integers(0, 30))
def test_sums_of_lanes_are_sums_of_halves_alone_and_sixteen_at_once(seed, n_bits):
    rng = np.random.default_rng(seed)
    scale = np.exp2(rng.integers(-n_bits, n_bits + 1, (16, 16)))
    x = (rng.standard_normal((16, 16)) * scale).astype(np.float32)
    one_by_one, together = np.empty(16, np.float32), np.empty(16, np.float32)
    launch(both_sums, x, one_by_one, together)
    expected = np.array([halved(row) for row in x])
    np.testing.assert_array_equal(one_by_one, expected)
    np.testing.assert_array_equal(together, expected)
