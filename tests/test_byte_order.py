"""Integers of every width and arrays of every byte order, at every door: taken for the values they
hold, or refused in one way.
"""

import ml_dtypes
import numpy as np
import pytest
import tiny
from close import close
from hypothesis import given
from hypothesis import strategies as st
from strategies import ARRAY_OPS, documented_calls, fewer
from test_encoder import make

import npllm
from npllm import ops
from npllm.analysis.score import score
from npllm.arguments import host_integers, native_weights
from npllm.arrays import native
from npllm.errors import NpllmTypeError
from npllm.kernels import fastest_ops
from npllm.ops.mask import sliding_window
from npllm.quantized.int8 import Int8Weight, quantize

INTEGERS = [
    np.dtype(order + kind)
    for order in "<>"
    for kind in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
]
every_integer = pytest.mark.parametrize("dtype", INTEGERS, ids=str)
IDS = tiny.random_ids(2, 7)
REFUSED = (
    "has another byte order than this machine; convert the array once, with npllm.arrays.native"
)


def swapped(x):
    """The same values in the other byte order."""
    return x.astype(x.dtype.newbyteorder("S"))


def nested(tree):
    """Tuples of tuples with every array in the other byte order."""
    if isinstance(tree, tuple):
        return (
            type(tree)(*map(nested, tree)) if hasattr(tree, "_fields") else tuple(map(nested, tree))
        )
    return swapped(tree) if isinstance(tree, np.ndarray) else tree


# ---------------------------------------------------------------------------------------------------------------- a model's doors


@every_integer
def test_ids_and_positions_of_every_integer_type_are_their_values(dtype):
    m = tiny.model()
    positions = np.arange(40, 47)
    want = m(IDS, position_ids=positions)
    close(m(IDS.astype(dtype), position_ids=positions.astype(dtype)), want, times=0)
    cache, first = m.new_cache(2), m.new_cache(2)
    for part in (slice(0, 4), slice(4, 7)):
        close(m(IDS[:, part].astype(dtype), cache=cache), m(IDS[:, part], cache=first), times=0)
    assert cache.ids.dtype == cache.positions.dtype == np.int64


@every_integer
def test_masks_of_every_integer_type_are_their_truth(dtype):
    m, valid = tiny.model(), np.array([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    close(m(IDS, attention_mask=valid.astype(dtype)), m(IDS, attention_mask=valid), times=0)
    with pytest.raises(npllm.NpllmError, match=r"must hold 1 \(token\) and 0"):
        m(IDS, attention_mask=2 * valid.astype(dtype))


@pytest.mark.parametrize("dtype", [">f4", ">f8", "<f2"])
def test_masks_of_floats_are_their_truth(dtype):
    m, valid = tiny.model(), np.array([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    close(m(IDS, attention_mask=valid.astype(dtype)), m(IDS, attention_mask=valid), times=0)


@every_integer
def test_the_other_doors_take_every_integer_type(dtype):
    m, ids = tiny.model(), IDS.astype(dtype)
    close(m.generate(ids, max_new_tokens=3), m.generate(IDS, max_new_tokens=3), times=0)
    close(m.next_token_distribution(ids), m.next_token_distribution(IDS), times=0)
    beams, want = (m.beam_search(x, max_new_tokens=2, num_beams=2) for x in (ids, IDS))
    close(beams.sequences, want.sequences, times=0)
    close(score(m, ids[0]).log_probs, score(m, IDS[0]).log_probs, times=0)
    close(
        npllm.packing.score_packed(m, list(ids))[0],
        npllm.packing.score_packed(m, list(IDS))[0],
        times=0,
    )
    cache, other = m.new_cache(2), m.new_cache(2)
    m(IDS, cache=cache), m(IDS, cache=other)
    cache.reorder(np.array([1, 0], dtype))
    other.reorder([1, 0])
    close(m(IDS[:, :1], cache=cache), m(IDS[:, :1], cache=other), times=0)


@every_integer
def test_an_encoder_takes_every_integer_type(dtype):
    model, _ = make()
    ids, types, valid = (
        np.array([[2, 4, 5, 3], [2, 6, 3, 0]]),
        np.array([[0, 0, 1, 1], [0, 1, 1, 0]]),
        np.array([[1] * 4, [1, 1, 1, 0]]),
    )
    got = model(
        ids.astype(dtype), token_type_ids=types.astype(dtype), attention_mask=valid.astype(dtype)
    )
    close(got, model(ids, token_type_ids=types, attention_mask=valid), times=0)


@pytest.mark.parametrize(
    "ids",
    [
        IDS.astype(">f4"),
        IDS.astype(bool),
        IDS.astype(object),
        IDS.astype("M8[s]"),
        IDS.astype(">c8"),
    ],
    ids=lambda x: str(x.dtype),
)
def test_what_are_no_integers_is_refused(ids):
    for call in (
        tiny.model(),
        make()[0],
        tiny.model().generate,
        lambda x: score(tiny.model(), x[0]),
    ):
        with pytest.raises(NpllmTypeError, match=r"must be .*integers"):
            call(ids)


@pytest.mark.parametrize("dtype", ["<u8", ">u8"])
def test_integers_beyond_int64_are_refused(dtype):
    huge = np.array([[2**63]], dtype)
    for call in (
        tiny.model(),
        make()[0],
        tiny.model().generate,
        lambda x: tiny.model()([[5]], position_ids=x),
    ):
        with pytest.raises(NpllmTypeError, match="must fit into int64, got 9223372036854775808"):
            call(huge)


def test_nothing_is_copied_that_is_right_already():
    assert native(IDS) is IDS and np.shares_memory(host_integers("ids", IDS), IDS)
    params = tiny.model().params
    assert native_weights(params) is params


# ---------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    "set_of_ops", [ops.reference, ops.blockwise, None], ids=["reference", "blockwise", "fast"]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_weights_in_the_other_byte_order_are_the_same_weights(set_of_ops, dtype):
    m = tiny.model(dtype=dtype, ops=set_of_ops)
    other = npllm.Model(m.config, nested(m.params), ops=set_of_ops)
    close(other(IDS), m(IDS), times=0)
    close(
        other.generate(IDS[:, :1], max_new_tokens=2),
        m.generate(IDS[:, :1], max_new_tokens=2),
        times=0,
    )


def test_tied_weights_in_the_other_byte_order_stay_one():
    m = tiny.model(tie_word_embeddings=True)
    embedding = swapped(m.params.embed_tokens)
    params = npllm.Model(
        m.config, m.params._replace(embed_tokens=embedding, lm_head=embedding)
    ).params
    assert params.lm_head is params.embed_tokens and params.norm is m.params.norm


def test_an_encoders_weights_in_the_other_byte_order_are_the_same_weights():
    model, _ = make()
    other = npllm.Encoder(model.config, nested(model.params), tokenizer=model.tokenizer)
    close(other.embed(["the cat", "a"]), model.embed(["the cat", "a"]), times=0)


# ---------------------------------------------------------------------------------------------------------------- operations


def _swap_one(arguments, draw):
    """Put one array among the arguments, or in the layers among them, into the other byte order."""
    names = [
        name for name, x in arguments.items() if isinstance(x, np.ndarray) and x.dtype.itemsize > 1
    ]
    layers = [
        name
        for name, x in arguments.items()
        if isinstance(x, tuple) and x and hasattr(x[0], "_fields")
    ]
    name = draw(st.sampled_from(names + layers))
    return arguments | {name: nested(arguments[name])}


SETS = {"reference": ops.reference, "blockwise": ops.blockwise, "fast": fastest_ops("numpy")}


@pytest.mark.parametrize("op", [name for name in ARRAY_OPS if name in ops.__all__])
@pytest.mark.parametrize("set_of_ops", SETS.values(), ids=SETS)
@fewer(4)
@given(st.data())
def test_operations_refuse_the_other_byte_order_or_take_it_for_what_it_is(op, set_of_ops, data):
    function = getattr(set_of_ops, op, None) or getattr(ops, op)
    arguments, _ = data.draw(documented_calls(ARRAY_OPS[op], np.float32))
    if not any(
        isinstance(x, tuple) or getattr(getattr(x, "dtype", None), "itemsize", 0) > 1
        for x in arguments.values()
    ):
        return
    other = _swap_one(arguments, data.draw)
    try:
        got = function(**other)
    except NpllmTypeError as error:
        assert REFUSED in str(error)
        return
    want = function(**arguments)
    for a, b in zip(
        got if isinstance(got, tuple) else (got,),
        want if isinstance(want, tuple) else (want,),
        strict=True,
    ):
        close(a, b, times=0)


@every_integer
def test_ids_of_an_embedding_of_every_integer_type(dtype):
    weight = np.random.default_rng(0).standard_normal((61, 4)).astype(np.float32)
    for table in (weight, quantize(weight)):
        close(ops.embed(IDS.astype(dtype.newbyteorder("=")), table), ops.embed(IDS, table), times=0)
    if not dtype.isnative:
        with pytest.raises(NpllmTypeError, match=REFUSED):
            ops.embed(IDS.astype(dtype), weight)


@pytest.mark.parametrize("dtype", [dtype for dtype in INTEGERS if dtype.isnative], ids=str)
@pytest.mark.parametrize("name", ["attention", "attention_weights", "blockwise_attention"])
def test_slots_of_every_integer_type_do_not_wrap_around(dtype, name):
    rng, slots = np.random.default_rng(0), np.arange(6)
    q, k, v = (rng.standard_normal((2, 6, 4)).astype(np.float32) for _ in range(3))
    operands = (q, k) if name == "attention_weights" else (q, k, v)
    rule = sliding_window(3)
    want = getattr(ops, name)(*operands, mask=rule, q_slots=slots, k_slots=slots)
    close(
        getattr(ops, name)(
            *operands, mask=rule, q_slots=slots.astype(dtype), k_slots=slots.astype(dtype)
        ),
        want,
        times=0,
    )


def test_8_bit_weights_with_scales_in_the_other_byte_order_are_refused():
    weight = quantize(np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32))
    other = Int8Weight(weight.values, swapped(weight.scales))
    for set_of_ops in SETS.values():
        with pytest.raises(NpllmTypeError, match=REFUSED):
            set_of_ops.linear(np.ones((2, 64), np.float32), other)
