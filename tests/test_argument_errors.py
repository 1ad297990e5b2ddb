"""What a caller hands over by mistake is refused by the name of the argument: masks, arrays, paths."""

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import ARRAY_OPS, documented_calls

import npllm
from npllm import ops
from npllm.arrays import expect_shape
from npllm.checkpoints.fetch import fetch
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.kernels import choose_ops
from npllm.kernels.cpu import tiled

Q = np.ones((2, 3, 4), np.float32)
TAKE_A_MASK = {
    "attention": lambda mask: ops.attention(Q, Q, Q, mask=mask),
    "attention_weights": lambda mask: ops.attention_weights(Q, Q, mask=mask),
    "blockwise_attention": lambda mask: ops.blockwise_attention(Q, Q, Q, mask=mask),
    "split_kv_attention": lambda mask: ops.split_kv_attention(Q, Q, Q, n_split=2, mask=mask),
    "tiled": lambda mask: tiled.blockwise_attention(Q, Q, Q, mask=mask),
    "fast": lambda mask: choose_ops("fast", "numpy").attention(Q, Q, Q, mask=mask),
    "emulate": lambda mask: ops.emulate("bfloat16").attention(Q, Q, Q, mask=mask),
}
takes_a_mask = pytest.mark.parametrize("call", TAKE_A_MASK.values(), ids=TAKE_A_MASK)


@takes_a_mask
@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (ops.mask.causal, "mask=ops.mask.causal()"),
        (ops.mask.sliding_window, "mask=ops.mask.sliding_window(...)"),
        (
            "causal",
            "such as ops.mask.causal(), a bool array (True = visible) or None, got 'causal'",
        ),
        (3, "got 3"),
        ([[True]], "got [[True]]"),
    ],
)
def test_a_mask_that_is_none_is_refused_by_name(call, mask, words):
    with pytest.raises(NpllmTypeError, match=r"^mask must be a rule") as caught:
        call(mask)
    assert words in str(caught.value)


def test_a_rule_that_was_not_called_is_refused_wherever_rules_are_taken():
    window = ops.mask.sliding_window(2)
    for call in (
        lambda: ops.mask.to_bool(ops.mask.causal, 3, 3),
        lambda: ops.mask.causal & window,
        lambda: window | ops.mask.causal,
    ):
        with pytest.raises(NpllmTypeError, match=r"call it, rule=ops\.mask\.causal\(\)"):
            call()
    with pytest.raises(NpllmTypeError, match="rules combine with rules"):
        window & (lambda i, j: j <= i)
    assert (ops.mask.causal() & window)(np.array([[3]]), np.array([[2]])).all()


def test_a_shape_is_named_by_its_axes():
    with pytest.raises(NpllmValueError, match=r"^q must be \[\.\.\., n_head, n_seq, d_head\], got"):
        expect_shape("q", np.ones(3), dots=None, n_head=None, n_seq=None, d_head=None)
    with pytest.raises(NpllmValueError, match=r"= \[\.\.\., n_ctx, 4\], got \[3\]$"):
        expect_shape("k", np.ones(3), dots=None, n_ctx=None, d_head=4)


def arrays_of(arguments):
    return [name for name, x in arguments.items() if isinstance(x, np.ndarray)]


@pytest.mark.parametrize("op", ARRAY_OPS.values(), ids=ARRAY_OPS)
@settings(max_examples=12)
@given(st.data())
def test_what_is_no_array_is_refused_by_the_name_of_the_argument(op, data):
    arguments, _ = data.draw(documented_calls(op))
    names = arrays_of(arguments)
    if not names:
        return
    name = data.draw(st.sampled_from(names))
    arguments[name] = data.draw(st.sampled_from([arguments[name].tolist(), "text", object()]))
    with pytest.raises(npllm.NpllmError, match=rf"\b{name}\b"):
        op(**arguments)


@pytest.mark.parametrize("op", ARRAY_OPS.values(), ids=ARRAY_OPS)
@settings(max_examples=12)
@given(st.data())
def test_an_empty_array_is_taken_or_refused(op, data):
    """Never an error of NumPy's."""
    arguments, _ = data.draw(documented_calls(op))
    names = [name for name in arrays_of(arguments) if arguments[name].ndim]
    if not names:
        return
    name = data.draw(st.sampled_from(names))
    axis = data.draw(st.integers(0, arguments[name].ndim - 1))
    arguments[name] = np.take(arguments[name], [], axis=axis)
    try:
        op(**arguments)
    except npllm.NpllmError:
        pass


def test_an_axis_that_the_array_lacks_is_refused():
    for op in (ops.softmax, ops.log_softmax):
        with pytest.raises(NpllmValueError, match=r"axis must lie in -2 \.\.\. 1 for x \[2, 3\]"):
            op(np.ones((2, 3)), axis=2)


def test_a_mixture_of_libraries_is_named():
    strict = pytest.importorskip("array_api_strict")
    with pytest.raises(NpllmTypeError, match=r"weight of (numpy|array_api_strict)") as caught:
        ops.linear(np.ones((1, 2), np.float32), strict.ones((1, 2)))
    assert "x of" in str(caught.value)


TAKE_A_PATH = [
    npllm.load,
    npllm.Tokenizer.from_folder,
    npllm.Config.from_json,
    npllm.BertConfig.from_json,
    npllm.Trace.load,
    npllm.testing.write_probes,
    fetch,
    lambda path: npllm.quantize(path, path, "q4_0"),
    lambda path: npllm.quantize(None, path, "q4_0"),
    lambda path: npllm.compare(path, path),
    lambda path: npllm.pipeline("text-generation", path),
    lambda path: npllm.explain(None, "x", path),
]


@pytest.mark.parametrize("path", [123, b"x", ["x"], 1.5, True, "\0"])
@pytest.mark.parametrize("function", TAKE_A_PATH, ids=inspect.getsource)
def test_what_is_no_path_is_refused(function, path):
    with pytest.raises(npllm.NpllmError):
        function(path)
