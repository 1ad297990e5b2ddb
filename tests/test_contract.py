"""Every shape that a docstring states is executed: sizes are drawn for its axis names, and the op
is called.
"""

import inspect
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import ARRAY_OPS, OPS, documented, documented_calls, fewer, shape_of

from npllm import ops
from npllm.arrays import is_integer
from npllm.ops.mask import Rule

every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
OTHERS = {"float": float, "Rule": Rule, "Ops": ops.Ops, "dict": dict}


def check(op, arguments, axis):
    """Call an op; raise AssertionError unless it returns what its docstring states for these axis
    sizes.
    """
    stated = [
        entry
        for entry in documented(op, "Returns")
        if all(arguments.get(name) for name in re.findall(r"Only with `(\w+)`", entry.text))
    ]
    results = op(**arguments)
    results = results if isinstance(results, tuple) else (results,)
    assert len(results) == len(stated), f"{len(results)} results, {len(stated)} in the docstring"
    for entry, result in zip(stated, results, strict=True):
        if entry.axes is None:
            assert isinstance(result, OTHERS[entry.type]), (
                f"{entry.name} must be {entry.type}, got {type(result)}"
            )
            continue
        shape = shape_of(entry.axes, axis)
        assert tuple(result.shape) == shape, (
            f"{entry.name} must be {entry.axes} = {shape}, got {tuple(result.shape)}"
        )
        assert entry.kind == (
            "integer" if is_integer(result) else "bool" if result.dtype == bool else "float"
        )
        for name in re.findall(r"[Ii]n\s+the\s+dtype\s+of\s+`(\w+)`", entry.text):
            assert result.dtype == arguments[name].dtype, (
                f"{entry.name} must have the dtype of {name}, got {result.dtype}"
            )


@every_op
@fewer(2)
@given(st.data())
def test_results_have_the_shapes_that_the_docstring_states(op, data):
    check(op, *data.draw(documented_calls(op)))


@pytest.mark.parametrize("op", ARRAY_OPS.values(), ids=ARRAY_OPS)
@fewer(2)
@given(st.data())
def test_results_have_the_dtypes_that_the_docstring_states(op, data):
    arguments, axis = data.draw(documented_calls(op, dtype=np.float32))
    floats = [
        name for name, x in arguments.items() if isinstance(x, np.ndarray) and x.dtype == np.float32
    ]
    for name in floats:
        arguments[name] = arguments[name].astype(
            data.draw(st.sampled_from([np.float32, np.float64]))
        )
    check(op, arguments, axis)


@every_op
def test_a_docstring_says_what_goes_in_what_comes_out_and_where_it_comes_from(op):
    doc = inspect.getdoc(op)
    assert re.match(r"[A-Z][^\n]*[.:]\n\n", doc), "one sentence on the first line"
    assert [entry.name for entry in documented(op, "Parameters")] == list(
        inspect.signature(op).parameters
    )
    assert documented(op, "Returns")
    assert re.search(r"^Notes\n-----\n.*^Source: ", doc, re.MULTILINE | re.DOTALL)


@every_op
def test_every_array_of_a_docstring_states_its_axes(op):
    for section in ("Parameters", "Returns"):
        for entry in documented(op, section):
            assert entry.type, f"{entry.name} has no type"
            assert entry.axes or "array" not in entry.type, (
                f"{entry.name} : {entry.type} states no axes"
            )


@every_op
def test_every_axis_name_is_in_the_glossary_or_explained_by_the_op(op):
    import npllm

    names = {
        name
        for section in ("Parameters", "Returns")
        for entry in documented(op, section)
        for axis in entry.axes or ()
        for name in re.findall(r"[a-z]\w*", axis)
    }
    assert all(re.fullmatch(r"[nd]_\w+", name) for name in names)
    shared = set(re.findall(r"\b[nd]_\w+", npllm.__doc__)) | {"d_in", "d_out", "d_value"}
    assert names <= shared, f"{names - shared} stand in no glossary"


def test_every_public_function_is_an_op_that_is_covered():
    others = {"Ops", "blockwise", "mask", "reference"}
    assert set(ops.__all__) - others <= set(OPS)
    assert {"attention", "padding", "linear", "sample", "embed"} <= set(ARRAY_OPS)


def test_a_shape_that_is_stated_wrongly_is_found():
    def double(x):
        """Double.

        Parameters
        ----------
        x : array [n_seq, d_model]

        Returns
        -------
        y : array [d_model, n_seq]
            In the dtype of `x`.
        """
        return 2 * x

    axis = {"n_seq": 2, "d_model": 3, "...": ()}
    with pytest.raises(AssertionError, match="y must be"):
        check(double, {"x": np.ones((2, 3))}, axis)


def test_axis_expressions_are_computed():
    axis = {"n_head": 3, "d_head": 4, "d_rope": 6, "...": (7, 8)}
    assert shape_of(["...", "n_head*d_head", "d_rope/2"], axis) == (7, 8, 12, 3)
