"""qkv_projection and lm_head: the formulas of their docstrings, head by head."""

import numpy as np
import pytest
from close import close
from hypothesis import given
from hypothesis import strategies as st

from npllm.errors import NpllmValueError
from npllm.ops import lm_head, qkv_projection


def drawn(seed, n_batch, n_seq, d_model, n_head, n_kv_head, d_head, with_bias):
    rng = np.random.default_rng(seed)
    n_rows = (n_head + 2 * n_kv_head) * d_head
    x = rng.standard_normal((n_batch, n_seq, d_model))
    weight = rng.standard_normal((n_rows, d_model))
    return x, weight, rng.standard_normal(n_rows) if with_bias else None


def heads_by_formula(x, weight, bias, first, n_head, d_head):
    """W[h] @ x[n] + b[h], entry by entry, of the heads whose rows begin at `first`."""
    y = np.zeros((len(x), n_head, x.shape[1], d_head))
    for b, h, n, i in np.ndindex(y.shape):
        row = first + h * d_head + i
        y[b, h, n, i] = sum(w * value for w, value in zip(weight[row], x[b, n], strict=True))
        y[b, h, n, i] += 0 if bias is None else bias[row]
    return y


@given(
    seed=st.integers(0, 2**32 - 1),
    n_batch=st.integers(1, 2),
    n_seq=st.integers(1, 3),
    d_model=st.integers(1, 5),
    n_kv_head=st.integers(1, 2),
    group=st.integers(1, 3),
    d_head=st.integers(1, 4),
    with_bias=st.booleans(),
)
def test_each_head_has_its_own_rows_of_the_weight(
    seed, n_batch, n_seq, d_model, n_kv_head, group, d_head, with_bias
):
    n_head = n_kv_head * group
    sizes = n_batch, n_seq, d_model, n_head, n_kv_head, d_head
    x, weight, bias = drawn(seed, *sizes, with_bias)
    found = qkv_projection(x, weight, n_head, n_kv_head, bias)
    first = 0
    for heads, n in zip(found, (n_head, n_kv_head, n_kv_head), strict=True):
        close(heads, heads_by_formula(x, weight, bias, first, n, d_head), times=8)
        first += n * d_head


def test_rows_that_are_no_multiple_of_the_heads_raise():
    with pytest.raises(NpllmValueError, match="7"):
        qkv_projection(np.ones((2, 3)), np.ones((7, 3)), 2, 1)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6))
def test_logits_are_the_products_with_the_rows_of_the_head(seed, n_seq, d_model, n_vocab):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((n_seq, d_model))
    weight = rng.standard_normal((n_vocab, d_model))
    want = np.zeros((n_seq, n_vocab))
    for n, i in np.ndindex(want.shape):
        want[n, i] = sum(a * b for a, b in zip(hidden[n], weight[i], strict=True))
    close(lm_head(hidden, weight), want, times=8)
