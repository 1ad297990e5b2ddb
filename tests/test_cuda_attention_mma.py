"""Attention of many queries on the tensor cores: attention_mma.cu beside the definition."""

import contextlib

import kernel_shim
import ml_dtypes
import numpy as np
import pytest
from close import close
from guard import moved
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_shim import checking, needs_gxx
from seeds import draws
from strategies import seeds

from npllm import ops
from npllm.kernels import cuda
from npllm.kernels.cuda import launching
from npllm.kernels.cuda.attention import attention_in_parts
from npllm.ops.mask import bidirectional, causal, left_padding, sliding_window

pytestmark = [needs_gxx, pytest.mark.usefixtures("on_the_stand_in_apart", "tensor_cores")]
BF16 = ml_dtypes.bfloat16
VARIANTS = [(d_head, dtype) for dtype in (np.float32, BF16, np.float16) for d_head in cuda.HEADS]


@pytest.fixture
def tensor_cores(monkeypatch):
    monkeypatch.setattr(launching, "has_tensor_cores", lambda: True)


def many(q, k, v, **options):
    """Call the twin; see that it launched the kernel, and the one that mends."""
    kernel_shim.LAUNCHES.clear()
    n_parts = options.pop("n_parts", 3)
    y = attention_in_parts(n_parts, *moved((q, k, v)), **options)
    assert kernel_shim.LAUNCHES == ["attention_mma", "attention"]
    return y.get()


@pytest.mark.parametrize(("d_head", "dtype"), VARIANTS)
def test_smoke(d_head, dtype):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 4, 37, d_head), np.float32)
    k, v = (rng.standard_normal((2, 2, 50, d_head), np.float32).astype(dtype) for _ in range(2))
    want = ops.attention(
        q.astype(np.float64), k.astype(np.float64), v.astype(np.float64), mask=causal()
    )
    for n in (3, 1):
        got = many(q, k, v, mask=causal(), n_parts=n)
        print(d_head, dtype.__name__, n, abs(got - want).max(), abs(want).max())
