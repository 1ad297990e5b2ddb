"""The compiled search of scales finds what the definition finds, to the bit."""

import numpy as np
import pytest

from npllm import kernels
from npllm.quantized import block_packing, block_search

pytestmark = pytest.mark.skipif(
    kernels.compiled_ops() is None, reason="the compiled kernels need Numba"
)


def groups(n, n_group=777):
    """Groups of many sizes; some are zero, equal, sparse or of one sign."""
    rng = np.random.default_rng(n)
    x = rng.standard_normal((n_group, n)) * 10.0 ** rng.uniform(-6, 4, (n_group, 1))
    x[0], x[1], x[2, ::2], x[3] = 0, 1.5, 0, np.abs(x[3])
    x[4, 1:] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize(("n", "low", "high"), [(32, -8, 7), (32, -16, 15), (16, -32, 31)])
def test_scales_are_equal(n, low, high):
    x = groups(n)
    compiled = block_packing.search_module()
    assert compiled is not block_search
    np.testing.assert_array_equal(
        compiled.search_scale(x, low, high), block_search.search_scale(x, low, high)
    )


@pytest.mark.parametrize("below", [True, False])
@pytest.mark.parametrize("high", [15, 31])
def test_lines_are_equal(high, below):
    x = groups(32).reshape(7, 111, 32)
    found = block_packing.search_module().search_affine(x, high, below=below)
    for ours, want in zip(found, block_search.search_affine(x, high, below=below), strict=True):
        assert ours.shape == (7, 111) and ours.dtype == np.float32
        np.testing.assert_array_equal(ours, want)
    assert not below or (found[1] <= 0).all()


@pytest.mark.parametrize("high", [15, 31])
def test_multiples_are_equal(high):
    x = groups(32).reshape(7, 111, 32)
    scale, minimum = block_search.search_affine(x, high, below=True)
    line = np.maximum(scale, 0), minimum
    steps = tuple(np.repeat(abs(part).max(-1, keepdims=True) / 63, 111, axis=-1) for part in line)
    found = block_packing.search_module().search_multiples(x, line, steps, high)
    want = block_search.search_multiples(x, line, steps, high)
    for ours, other in zip(found, want, strict=True):
        assert ours.shape == (7, 111) and ours.dtype == np.int32
        np.testing.assert_array_equal(ours, other)


def test_no_groups():
    compiled = block_packing.search_module()
    assert compiled.search_affine(np.empty((0, 32), np.float32), 15, below=True)[0].shape == (0,)
    assert compiled.search_scale(np.empty((0, 32), np.float32), -8, 7).shape == (0,)
