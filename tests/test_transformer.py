"""The block of 2017: LayerNorm, ReLU, GELU and the error function, post-norm and pre-norm, beside
torch where it is installed.
"""

import math
import os

import numpy as np
import pytest
from close import close
from hypothesis import given
from hypothesis import strategies as st

from npllm import ops
from npllm.errors import NpllmValueError
from npllm.models import transformer

wide = st.floats(-30, 30)


@given(st.lists(wide, min_size=1, max_size=20))
def test_erf_is_that_of_the_c_library(values):
    close(ops.erf(np.array(values)), np.array([math.erf(x) for x in values]))


@pytest.mark.parametrize(
    "x", [0.0, 0.46875, np.nextafter(0.46875, 1), 4.0, np.nextafter(4, 5), 1e-300, 26.0, np.inf]
)
def test_erf_holds_at_the_seams_and_is_odd(x):
    close(ops.erf(np.array([x, -x])), np.array([math.erf(x), math.erf(-x)]))


@given(st.lists(wide, min_size=1, max_size=20))
def test_gelu_weighs_by_the_normal_distribution(values):
    x = np.array(values)
    close(ops.gelu(x), np.array([v * math.erfc(-v / math.sqrt(2)) / 2 for v in values]), times=16)
    half = [math.sqrt(2 / math.pi) * (v + 0.044715 * v**3) for v in values]
    tanh = [
        v / (1 + math.exp(-2 * t)) if t > -350 else 0.0 for v, t in zip(values, half, strict=True)
    ]
    close(ops.gelu(x, approximate="tanh"), np.array(tanh), times=64)


def test_gelu_knows_two_forms():
    with pytest.raises(NpllmValueError, match=r"none.*tanh"):
        ops.gelu(np.ones(2), approximate="sigmoid")


def test_relu_keeps_what_is_positive_and_nan():
    y = ops.relu(np.array([-2.0, -0.0, 0.0, 3.0, np.nan]))
    assert y[:4].tolist() == [0, 0, 0, 3]
    assert np.isnan(y[4])


@given(st.integers(0, 2**32 - 1), st.integers(2, 9))
def test_layer_norm_gives_mean_0_and_variance_1(seed, d):
    x = np.random.default_rng(seed).standard_normal((3, d)) * 5 + 2
    y = ops.layer_norm(x, np.ones(d), np.zeros(d), 0.0)
    assert np.abs(y.mean(axis=-1)).max() < 1e-12
    assert np.abs((y**2).mean(axis=-1) - 1).max() < 1e-12
    weight, bias = np.arange(1.0, d + 1), np.arange(d) - 0.5
    close(ops.layer_norm(x, weight, bias, 0.0), weight * y + bias, times=64)


def test_layer_norm_has_eps_inside_the_root():
    x = np.array([[1.0, -1.0]])
    close(ops.layer_norm(x, np.ones(2), np.zeros(2), 3.0), x / 2)


@pytest.mark.live
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_six_and_six_layers_give_what_torch_gives(norm_first, dtype):
    if not os.environ.get("NPLLM_REQUIRE_LIVE"):
        pytest.importorskip("torch", reason="compares with torch, which is not installed")
    import torch

    torch.manual_seed(0)
    model = torch.nn.Transformer(
        32,
        4,
        6,
        6,
        64,
        dropout=0.0,
        batch_first=True,
        norm_first=norm_first,
        dtype=getattr(torch, dtype),
    )
    source, target = (
        torch.randn(2, 7, 32, dtype=getattr(torch, dtype)),
        torch.randn(2, 5, 32, dtype=getattr(torch, dtype)),
    )
    mask = torch.nn.Transformer.generate_square_subsequent_mask(5, dtype=getattr(torch, dtype))
    with torch.no_grad():
        desired = model.eval()(source, target, tgt_mask=mask, tgt_is_causal=True).numpy()
    params = transformer.from_torch({name: x.numpy() for name, x in model.state_dict().items()})
    actual = transformer.forward(
        source.numpy(), target.numpy(), params, 4, ops.blockwise, norm_first=norm_first
    )
    assert np.abs(actual - desired).max() < {"float32": 1e-5, "float64": 1e-12}[dtype]


def test_a_missing_tensor_is_named():
    with pytest.raises(NpllmValueError, match=r"encoder\.layers\.0\.self_attn\.in_proj_weight"):
        transformer.from_torch({"encoder.layers.0.linear1.weight": np.ones((2, 2))})
