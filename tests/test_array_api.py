"""Every op on arrays of the strictest library, on read-only arrays, on mixtures, and on what is no
array.
"""

import numpy as np
import optional
import pytest
from close import close
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    ARRAY_OPS,
    attention_calls,
    compute_dtypes,
    documented,
    documented_calls,
    fewer,
    normal,
)

from npllm import ops
from npllm.errors import NpllmTypeError
from npllm.models.params import LayerParams
from npllm.ops.mask import Rule, causal, documents, padding, sliding_window

strict = optional.module("array_api_strict")
STANDARD = {
    "api_version": "2024.12",
    "boolean_indexing": False,
    "data_dependent_shapes": False,
    "enabled_extensions": (),
}
every_op = pytest.mark.parametrize("name", ARRAY_OPS)


@pytest.fixture(autouse=True, scope="module")
def _nothing_but_the_standard():
    with strict.ArrayAPIStrictFlags(**STANDARD):
        yield


def moved(x):
    """Turn NumPy arrays, also those in a dict or tuple, into arrays of the strict library."""
    if isinstance(x, dict):
        return {name: moved(value) for name, value in x.items()}
    if isinstance(x, LayerParams):
        return LayerParams(*map(moved, x))
    if isinstance(x, tuple):
        return tuple(moved(value) for value in x)
    return strict.asarray(x) if isinstance(x, np.ndarray | np.generic) else x


def same(actual, desired, times=8.0):
    for one, other in (
        zip(actual, desired, strict=True) if isinstance(desired, tuple) else [(actual, desired)]
    ):
        close(one, moved(other), times=times)


def array_names(arguments):
    return [name for name, x in arguments.items() if isinstance(x, np.ndarray)]


@every_op
@fewer(2)
@given(st.data())
def test_an_op_uses_nothing_but_the_array_api_standard(name, data):
    if name in ("padding", "left_padding", "documents"):
        return
    arguments, _ = data.draw(documented_calls(ARRAY_OPS[name]))
    same(ARRAY_OPS[name](**moved(arguments)), ARRAY_OPS[name](**arguments))


@pytest.mark.parametrize("op", [ops.attention, ops.blockwise_attention])
@given(st.data(), compute_dtypes)
def test_attention_under_rules_and_slots_uses_nothing_but_the_standard(op, data, dtype):
    call = data.draw(attention_calls(dtype=dtype, kinds=("none", "rule", "function", "array")))
    sizes = {"block_q": 2, "block_k": 3} if op is ops.blockwise_attention else {}
    same(
        op(*moved((call.q, call.k, call.v)), return_lse=True, **moved(call.options), **sizes),
        op(call.q, call.k, call.v, return_lse=True, **call.options, **sizes),
    )


@pytest.mark.parametrize("op", [ops.attention, ops.blockwise_attention])
@given(st.data(), compute_dtypes)
def test_padding_uses_nothing_but_the_standard(op, data, dtype):
    q = data.draw(normal((2, 2, 3, 4), dtype))
    valid = np.array([[False, True, True], [True, True, True]])
    same(
        op(*moved((q, q, q)), mask=causal() & padding(moved(valid)) | ~sliding_window(2)),
        op(q, q, q, mask=causal() & padding(valid) | ~sliding_window(2)),
    )


@given(st.data(), compute_dtypes)
def test_documents_use_nothing_but_the_standard(data, dtype):
    q, labels = data.draw(normal((2, 2, 3, 4), dtype)), np.array([[0, 0, 1], [0, 1, 1]])
    same(
        ops.blockwise_attention(
            *moved((q, q, q)), mask=causal() & documents(moved(labels)), block_k=2
        ),
        ops.blockwise_attention(q, q, q, mask=causal() & documents(labels), block_k=2),
    )


@given(st.data(), compute_dtypes, st.booleans())
def test_rope_of_batches_uses_nothing_but_the_standard(data, dtype, interleaved):
    x, positions = data.draw(normal((2, 3, 4, 8), dtype)), data.draw(normal((2, 4), np.int64, 9))
    inv_freq = data.draw(normal((2, 1, 3), dtype))
    tables = ops.rope_tables(positions, inv_freq, 1.19)
    same(ops.rope_tables(*moved((positions, inv_freq)), 1.19), tables)
    same(
        ops.apply_rope(*moved((x, *tables)), interleaved=interleaved),
        ops.apply_rope(x, *tables, interleaved=interleaved),
    )


@every_op
@fewer(4)
@given(st.data())
def test_a_mixture_and_what_is_no_array_raise_whichever_argument_is_the_odd_one(name, data):
    arguments, _ = data.draw(documented_calls(ARRAY_OPS[name]))
    names = array_names(arguments)
    for odd in names if len(names) > 1 else ():
        with pytest.raises(NpllmTypeError, match=r"of array_api_strict and .* of numpy"):
            ARRAY_OPS[name](**{**arguments, odd: moved(arguments[odd])})
    for odd in names:
        with pytest.raises(NpllmTypeError):
            ARRAY_OPS[name](**{**arguments, odd: arguments[odd].tolist()})


@every_op
@fewer(2)
@given(st.data())
def test_no_input_is_changed_or_shared_and_read_only_inputs_work(name, data):
    """A result that is said to be new shares no memory with an input."""
    arguments, _ = data.draw(documented_calls(ARRAY_OPS[name]))
    before = {odd: arguments[odd].copy() for odd in array_names(arguments)}
    result = ARRAY_OPS[name](**arguments)
    for odd, x in before.items():
        close(arguments[odd], x, times=0)
        arguments[odd].flags.writeable = False
    stated = documented(ARRAY_OPS[name], "Returns")[0]
    if stated.text.lstrip().startswith(("A new array", "A copy")):
        assert not any(np.shares_memory(result, arguments[odd]) for odd in before)
    ARRAY_OPS[name](**arguments)


def test_a_rule_is_never_given_arrays_of_another_library():
    def visible(i, j):
        assert i.__array_namespace__() is j.__array_namespace__() is strict
        return j <= i

    q = strict.ones((1, 4, 2))
    for op in (ops.attention, ops.blockwise_attention):
        op(q, q, q, mask=Rule(visible))
        op(q, q, q, mask=Rule(visible), q_slots=range(4), k_slots=strict.arange(4))
