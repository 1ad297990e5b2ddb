"""embed: a row of the matrix for each id."""

import re

import numpy as np
import oracles
import pytest
from close import close
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strategies import dtypes, normal, sizes

from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.ops import embed

id_dtypes = st.sampled_from([np.int8, np.uint16, np.int32, np.int64])


@given(
    st.data(),
    dtypes,
    id_dtypes,
    sizes,
    sizes,
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
def test_embed_gathers_rows_and_widens_them_exactly(data, dtype, id_dtype, n_vocab, d_model, shape):
    weight = data.draw(normal((n_vocab, d_model), dtype))
    ids = data.draw(hnp.arrays(id_dtype, shape, elements=st.integers(0, n_vocab - 1)))
    y = embed(ids, weight)
    close(
        y,
        oracles.embed(ids, weight),
        dtype=np.float64 if dtype == np.float64 else np.float32,
        times=0,
    )


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_every_id_of_a_large_vocabulary_finds_its_row(dtype):
    weight = np.arange(33000, dtype=np.float32)[:, None]
    close(embed(np.arange(33000, dtype=dtype), weight), weight, times=0)


def test_embed_returns_a_copy():
    weight = np.ones((3, 2), np.float32)
    embed(np.array([1]), weight)[:] = 7
    close(weight, np.ones((3, 2), np.float32))


@pytest.mark.parametrize("ids", [[-1], [0, 5], [[-3, 2], [1, 8]]])
def test_an_id_outside_the_vocabulary_raises_with_both_numbers(ids):
    ids = np.array(ids)
    message = f"n_vocab - 1 = 4, got {ids.min()} ... {ids.max()}"
    with pytest.raises(NpllmValueError, match=re.escape(message)):
        embed(ids, np.ones((5, 2), np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, bool])
def test_ids_that_are_no_integers_raise(dtype):
    with pytest.raises(NpllmTypeError, match=np.dtype(dtype).name):
        embed(np.zeros(2, dtype), np.ones((5, 2), np.float32))


@pytest.mark.parametrize("shape", [(5,), (5, 2, 1)])
def test_a_weight_that_is_no_matrix_raises(shape):
    with pytest.raises(NpllmValueError, match=r"weight must be \[n_vocab, d_model\]"):
        embed(np.array([1]), np.ones(shape, np.float32))


def test_a_16_bit_matrix_is_never_widened_whole(traced_peak):
    weight = np.ones((4096, 512), np.float16)
    assert traced_peak(lambda: embed(np.array([1, 2, 3]), weight)) < weight.nbytes / 50
