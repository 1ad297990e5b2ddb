"""Rounding to blocks: what is packed widens to what was meant, and the error is small."""

import numpy as np
import optional
import pytest
from blocks import FORMAT_NAMES
from hypothesis import given
from hypothesis import strategies as st

from npllm.errors import NpllmValueError
from npllm.quantized import block_packing, block_search
from npllm.quantized.block_packing import quantize_blocks

gguf = optional.module("gguf")
every_format = pytest.mark.parametrize("name", FORMAT_NAMES)
# Relative error of normal numbers: half a step is about the largest number / 2**bits.
LARGEST = {
    "Q4_0": 0.095,
    "Q4_1": 0.085,
    "Q5_0": 0.05,
    "Q5_1": 0.045,
    "Q8_0": 0.006,
    "Q4_K": 0.085,
    "Q5_K": 0.045,
    "Q6_K": 0.025,
}

NEAR = (-1, 0, 1)


def matrix(seed=0, d_out=16, d_in=512):
    return np.random.default_rng(seed).standard_normal((d_out, d_in)).astype(np.float32)


def error(x, y):
    return np.sqrt(np.mean((x - y) ** 2) / np.mean(x**2))


@every_format
@given(seed=st.integers(0, 999), size=st.sampled_from([1e-3, 1.0, 300.0]))
def test_the_error_is_that_of_the_bits(name, seed, size):
    x = size * matrix(seed)
    assert error(x, quantize_blocks(x, name).widened()) < LARGEST[name]


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_the_search_is_at_least_as_good_as_the_library(name):
    x, kind = matrix(1, 64), gguf.GGMLQuantizationType[name]
    theirs = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    assert error(x, quantize_blocks(x, name).widened()) <= error(x, theirs)


@pytest.mark.parametrize(("name", "share"), [("Q4_K", 0.99), ("Q5_K", 0.975)])
def test_scales_and_minimums_of_a_block_are_rounded_together(name, share, monkeypatch):
    """The error is smaller than where each is rounded alone, as llama.cpp does."""
    x = matrix(1, 64)
    together = error(x, quantize_blocks(x, name).widened())
    alone = block_search.NEIGHBOURS[:1]
    monkeypatch.setattr(block_packing.search_module(), "NEIGHBOURS", alone)
    assert together < share * error(x, quantize_blocks(x, name).widened())


def test_no_multiple_beside_the_chosen_ones_is_better():
    """In float64, by the formula of the format."""
    x = matrix(2, 8).reshape(-1, 32)
    scale, minimum = block_search.search_affine(x, 15, below=True)
    d, d_min = scale.max() / 63, -minimum.min() / 63
    steps = np.full_like(scale, d), np.full_like(scale, d_min)
    sc, m = block_search.search_multiples(x, (scale, minimum), steps, 15)
    first = np.rint(scale / d), np.rint(-minimum / d_min)
    assert max(abs(sc - first[0]).max(), abs(m - first[1]).max()) == 1

    def lost(sc, m):
        width, below = float(d) * np.clip(sc, 1, 63)[:, None], float(d_min) * m[:, None]
        q = np.clip(np.rint((x + below) / width), 0, 15)
        return np.sum((x - (width * q - below)) ** 2, axis=-1)

    nearby = [lost(first[0] + a, np.clip(first[1] + b, 0, 63)) for a in NEAR for b in NEAR]
    np.testing.assert_allclose(lost(sc, m), np.min(nearby, axis=0), rtol=1e-5)


@every_format
def test_what_blocks_can_hold_is_kept(name):
    """Small integers with a scale that float16 holds."""
    rng = np.random.default_rng(0)
    x = rng.integers(-8, 8, (4, 256)).astype(np.float32)
    x[:, ::32], x[:, 1::32] = -8, 7
    bound = {"Q4_0": 1e-6, "Q5_0": 1e-6, "Q4_1": 1e-6, "Q5_1": 0.02, "Q8_0": 0.01}
    assert error(x, quantize_blocks(x, name).widened()) <= bound.get(name, 0.04)
    assert (quantize_blocks(0 * x, name).widened() == 0).all()


@pytest.mark.parametrize(
    ("weight", "name", "words"),
    [
        (np.ones((2, 100), np.float32), "Q4_0", "multiple of the 32 entries .* got 100"),
        (np.ones((2, 128), np.float32), "Q4_K", "multiple of the 256 entries"),
        (np.ones((2, 32), np.float32), "Q3", "must be one of"),
        (np.full((2, 32), np.nan, np.float32), "Q8_0", "NaN or infinity"),
        (np.full((2, 32), 1e9, np.float32), "Q8_0", "a scale must be at most 65504"),
    ],
    ids=range(5),
)
def test_what_cannot_be_packed_is_named(weight, name, words):
    with pytest.raises(NpllmValueError, match=words):
        quantize_blocks(weight, name)
