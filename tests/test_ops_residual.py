"""add: the residual stream."""

import numpy as np
import pytest
from close import close
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, dtypes, normal, sizes

from npllm.errors import NpllmValueError
from npllm.ops import add


@given(st.data(), dtypes, dtypes, batches, sizes)
def test_add_is_the_sum_rounded_once_to_the_dtype_of_the_stream(
    data, x_dtype, y_dtype, batch, d_model
):
    x, y = (
        data.draw(normal((*batch, d_model), x_dtype)),
        data.draw(normal((*batch, d_model), y_dtype)),
    )
    wide = np.float64 if np.float64 in (x_dtype, y_dtype) else np.float32
    close(add(x, y), (x.astype(wide) + y.astype(wide)).astype(x_dtype), times=0)


@pytest.mark.parametrize(
    ("x", "y"), [((2, 3), (3,)), ((2, 3), (1, 3)), ((2, 3), (2, 1)), ((3,), (2, 3))]
)
def test_a_stream_does_not_broadcast(x, y):
    with pytest.raises(NpllmValueError, match=r"got x \[.*\] and y \["):
        add(np.ones(x), np.ones(y))
