"""RoPE frequencies: PyTorch's float32 values, and the ways to lengthen a context."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from close import close
from hypothesis import given
from hypothesis import strategies as st

from npllm.errors import NpllmValueError
from npllm.ops import (
    dynamic_base,
    linear_frequencies,
    llama3_frequencies,
    longrope_scale,
    rope_frequencies,
    yarn_frequencies,
    yarn_scale,
)

SHARED = Path(__file__).parents[2] / "shared"

# inv_freq of base 10000 as PyTorch 2.13 computes it: little-endian float32, by d_rope
TORCH = {
    96: (
        "0000803fb04d533f28692e3f9af50f3f3ca6ed3e2228c43e9be8a13edaa3853e359d5c3e8718363e7a4d163eef1ef83dcdcccc3df30aa93d"
        "54878b3dc255663d951e3e3de9ec1c3de386013df6d2d53cc77db03c39ad913cf67b703c287f463c0ad7233cf83b073ce93edf3b9c44b83b"
        "7a18983ba3147b3b383e4f3b2e0f2b3b69310d3b2815e93a2e63c03a1dcc9e3a6f12833af25f583aba98323a166a133a5c5af3394fddc839"
        "60cba539f2d88839a7e8613953773a39f2e819396313fe38"
    ),
    128: (
        "0000803fd7af5d3f11f93f3fe03d263f9af50f3fcf53f93e9be8d73e1bf8ba3e9be8a13e04358c3e23d4723eed47523e8718363e40b01d3e"
        "778d083ed67fec3dcdcccc3d7859b13d0d94993d4dfe843dc255663d3f76473d15ba2c3d4893153de386013dd254e03c4f43c23c8b39a83c"
        "39ad913c334d7c3cf27b5a3c11333d3c0ad7233c2de10d3cb0b9f53b15cad43b9c44b83bcc919f3b772e8a3b0e526f3b383e4f3b0f77333b"
        "0d691b3b6f94063b2815e93a5cd7c93a8ec9ae3a0e5c973a6f12833ae201633a8c94443a443b2a3a166a133aac4fff392517dd39d774bf39"
        "60cba53972928f3915a87839e453573953773a391679213972d40b39e22cf238"
    ),
}
d_ropes = st.integers(2, 64).map(lambda half: 2 * half)
bases = st.sampled_from([10000.0, 100000.0, 250000.0, 500000.0])


def equal_to_torch(actual, torch):
    """At most one entry differs, and that by one unit of the last place."""
    steps = np.abs(actual.view(np.int32).astype(np.int64) - torch.view(np.int32))
    return (
        actual.dtype == torch.dtype == np.float32
        and actual.shape == torch.shape
        and np.sum(steps) <= 1
    )


@pytest.mark.parametrize("d_rope", TORCH)
def test_frequencies_are_those_of_torch(d_rope):
    assert equal_to_torch(
        rope_frequencies(d_rope, 10000.0), np.frombuffer(bytes.fromhex(TORCH[d_rope]), "<f4")
    )


def published():
    """Real configs beside PyTorch's frequencies for them: (name, d_rope, base, factors, inv_freq)."""
    if not (SHARED / "spec" / "real_inv_freq_torch.npz").is_file():
        return
    with np.load(SHARED / "spec" / "real_inv_freq_torch.npz") as arrays:
        for key in arrays:
            name, kind = key.split("|")
            path = SHARED / "configs" / f"{name}.json"
            if kind == "attention_factor" or not path.is_file():
                continue
            config = json.loads(path.read_text())
            scaling = config.get("rope_scaling") or {}
            factors = scaling.get("long_factor" if kind == "long" else "short_factor")
            yield pytest.param(
                2 * len(arrays[key]), config["rope_theta"], factors, arrays[key], id=key
            )


@pytest.mark.parametrize(("d_rope", "base", "factors", "inv_freq"), list(published()))
def test_frequencies_of_published_configs_are_those_of_torch(d_rope, base, factors, inv_freq):
    assert equal_to_torch(rope_frequencies(d_rope, base, factors), inv_freq)


@given(d_ropes, bases)
def test_frequencies_follow_the_formula_from_one_downwards(d_rope, base):
    inv_freq = rope_frequencies(d_rope, base)
    desired = np.array([base ** (-2 * i / d_rope) for i in range(d_rope // 2)])
    assert inv_freq[0] == 1 and (np.diff(inv_freq) < 0).all()
    close(np.log(inv_freq.astype(np.float64)) - 20, np.log(desired) - 20, times=1e5)
    close(inv_freq / desired.astype(np.float32), np.ones(d_rope // 2, np.float32))


@given(d_ropes, bases, st.integers(0, 2**32 - 1))
def test_longrope_factors_slow_each_pair(d_rope, base, seed):
    factors = np.random.default_rng(seed).uniform(1, 60, d_rope // 2)
    ratio = rope_frequencies(d_rope, base) / rope_frequencies(d_rope, base, list(factors))
    close(ratio / factors.astype(np.float32), np.ones(d_rope // 2, np.float32))


@given(d_ropes, bases, st.sampled_from([1.0, 2.0, 4.0, 8.0]))
def test_linear_interpolation_divides_every_frequency(d_rope, base, factor):
    close(
        linear_frequencies(d_rope, base, factor) * np.float32(factor),
        rope_frequencies(d_rope, base),
        times=0,
    )


@given(
    st.integers(2, 64).map(lambda half: 2 * half),
    bases,
    st.sampled_from([2.0, 4.0]),
    st.integers(1, 4000),
)
def test_the_dynamic_base_is_the_base_up_to_the_original_context_then_slows_the_last_pair_by_the_stretch(
    d_rope, base, factor, n
):
    assert dynamic_base(d_rope, base, factor, min(n, 1024), 1024) == base
    stretch = factor * max(n, 1024) / 1024 - (factor - 1)
    last = dynamic_base(d_rope, base, factor, n, 1024) ** (-(d_rope - 2) / d_rope)
    close(np.float64(last * stretch), np.float64(base ** (-(d_rope - 2) / d_rope)))


@given(d_ropes, bases, st.sampled_from([2.0, 8.0, 32.0]))
def test_llama3_keeps_short_waves_divides_long_ones_and_blends_between(d_rope, base, factor):
    inv_freq, new = (
        rope_frequencies(d_rope, base).astype(np.float64),
        llama3_frequencies(d_rope, base, factor, 1.0, 4.0, 8192),
    )
    turns = 8192 * inv_freq / (2 * math.pi)
    keep = np.clip((turns - 1.0) / 3.0, 0, 1)
    close((new / inv_freq).astype(np.float32), ((1 - keep) / factor + keep), dtype=np.float32)


@given(d_ropes, bases, st.sampled_from([2.0, 8.0, 32.0]), st.booleans())
def test_yarn_keeps_fast_pairs_divides_slow_ones_and_blends_between(d_rope, base, factor, truncate):
    def index(turns):
        return d_rope * math.log(4096 / (2 * math.pi * turns)) / (2 * math.log(base))

    low, high = (math.floor(index(32)), math.ceil(index(1))) if truncate else (index(32), index(1))
    low, high = max(low, 0), min(high, d_rope - 1)
    slow = np.clip((np.arange(d_rope // 2) - low) / (high - low or 0.001), 0, 1)
    new = yarn_frequencies(d_rope, base, factor, 4096, truncate=truncate)
    close(
        new / rope_frequencies(d_rope, base), slow / factor + (1 - slow), dtype=np.float32, times=4
    )


def test_the_attention_factor_of_the_published_longrope_models():
    assert math.isclose(longrope_scale(32, 4096), 1.1902380714238083, rel_tol=1e-15)
    assert longrope_scale(1, 4096) == longrope_scale(0.5, 4096) == 1


def test_the_attention_factor_of_yarn():
    assert math.isclose(yarn_scale(40), 0.1 * math.log(40) + 1, rel_tol=1e-15)
    assert math.isclose(
        yarn_scale(40, 0.707, 1.0),
        (0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1),
        rel_tol=1e-15,
    )
    assert yarn_scale(1) == yarn_scale(0.5, 2.0, 3.0) == 1


@pytest.mark.parametrize("d_rope", [0, -2, 3])
def test_an_odd_width_raises(d_rope):
    with pytest.raises(NpllmValueError, match=f"even and at least 2, got {d_rope}"):
        rope_frequencies(d_rope)


def test_a_single_pair_has_no_dynamic_base():
    with pytest.raises(NpllmValueError, match="at least 4 for dynamic scaling, got 2"):
        dynamic_base(2, 10000.0, 2.0, 2048, 1024)


@pytest.mark.parametrize("base", [0.0, -1.0, math.inf, math.nan])
def test_a_base_that_is_not_positive_raises(base):
    with pytest.raises(NpllmValueError, match=f"got {base}"):
        rope_frequencies(4, base)


@pytest.mark.parametrize(
    "factors",
    [
        [1.0],
        [1.0, 0.0],
        [1.0, -2.0],
        [1.0, math.inf],
        [1.0, 1.0, 1.0],
        [[1.0, 1.0]],
        [1.0, math.nan],
    ],
)
def test_factors_that_are_not_one_positive_number_a_pair_raise(factors):
    with pytest.raises(NpllmValueError, match="d_rope/2 = 2 positive numbers"):
        rope_frequencies(4, 10000.0, factors)
