"""The whole package on arrays that refuse what CuPy's refuse (tests/guard.py), beside the same in
NumPy; and each refusal by itself.
"""

import inspect
import re

import guard
import ml_dtypes
import numpy as np
import pytest
import tiny
from close import close
from guard import Refused, moved, xp
from hypothesis import given
from hypothesis import strategies as st
from optional import invoke
from strategies import (
    ARRAY_OPS,
    attention_calls,
    compute_dtypes,
    documented_calls,
    fewer,
    normal,
)

import npllm
from npllm import arrays, ops
from npllm.analysis import packing, speed
from npllm.analysis import score as scoring
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.models import transformer
from npllm.ops.mask import causal, documents, padding, sliding_window

try:
    import cupy
except ImportError:
    cupy = None

BF16 = ml_dtypes.bfloat16


@pytest.fixture(autouse=True, scope="module")
def _in_the_place_of_cupy():
    with pytest.MonkeyPatch.context() as monkeypatch:
        guard.installed(monkeypatch)
        yield


def device(x, dtype=np.float32):
    return xp.asarray(np.asarray(x, dtype))


def same(actual, desired, times=8.0):
    for one, other in (
        zip(actual, desired, strict=True) if isinstance(desired, tuple) else [(actual, desired)]
    ):
        close(one, moved(other), times=times)


# ------------------------------------------------------------------------------------------------------------- each refusal by itself


@pytest.mark.parametrize(
    "convert",
    [
        np.asarray,
        np.exp,
        lambda x: np.concatenate([x, x]),
        lambda x: np.ones(3, np.float32) * x,
        lambda x: np.float32(2) * x,
        lambda x: np.add(x, 1),
    ],
)
def test_no_conversion_to_numpy_behind_the_callers_back(convert):
    with pytest.raises(TypeError):
        convert(device([1, 2, 3]))


@pytest.mark.parametrize(
    "wait",
    [
        float,
        int,
        bool,
        complex,
        list,
        tuple,
        sum,
        lambda x: x.item(),
        lambda x: x.tolist(),
        lambda x: 1 if x > 0 else 0,
        lambda x: 1 in x,
        lambda x: [0, 1][x],
        range,
    ],
)
def test_nothing_waits_for_the_device_outside_get(wait):
    with pytest.raises(Refused):
        wait(device(1, np.int64))


@pytest.mark.parametrize(
    "other",
    [
        np.float32(2),
        np.float64(2),
        np.ones(3, np.float32),
        [1, 2, 3],
        (1, 2, 3),
        np.int64(1),
        "1",
        None,
    ],
)
@pytest.mark.parametrize(
    "operation",
    [
        lambda a, b: a + b,
        lambda a, b: b + a,
        lambda a, b: a * b,
        lambda a, b: a @ b,
        lambda a, b: xp.maximum(a, b),
        lambda a, b: xp.where(a > 0, a, b),
    ],
)
def test_operands_are_arrays_of_its_own_or_python_numbers(operation, other):
    with pytest.raises(TypeError):
        operation(device([1, 2, 3]), other)


@pytest.mark.parametrize("other", [2, 2.0, True])
def test_python_numbers_do_not_widen(other):
    assert (device([1, 2, 3]) * other).dtype == (other * device([1, 2, 3])).dtype == np.float32


@pytest.mark.parametrize(
    "call",
    [
        lambda x: xp.take(x, [0, 1], axis=0),
        lambda x: xp.take(x, np.array([0, 1]), axis=0),
        lambda x: xp.concat([x, np.ones(3, np.float32)]),
        lambda x: x[np.array([0])],
        lambda x: x[[0]],
        lambda _: xp.asarray([1.0, 2.0]),
        lambda _: xp.exp([1.0]),
        lambda _: xp.full((2,), np.float32(1)),
        lambda _: xp.exp(np.ones(3)),
        lambda x: x.__setitem__(0, np.float32(1)),
        lambda x: x[x > 0],
    ],
)
def test_lists_and_numpy_arrays_are_refused_as_arguments(call):
    with pytest.raises(Refused):
        call(device([1, 2, 3]))


def test_reductions_give_arrays_without_axes():
    for reduced in (
        xp.sum(device([1, 2])),
        xp.max(device([1, 2])),
        xp.all(device([1, 2]) > 0),
        xp.argmax(device([1, 2])),
    ):
        assert type(reduced) is guard.Array and reduced.shape == ()


def test_indices_out_of_range_wrap_around():
    x = device([10, 11, 12])
    assert xp.take(x, device([3, -4, 7], np.int64), axis=0).get().tolist() == [10, 12, 11]
    assert x[device([4], np.int64)].get().tolist() == [11]
    assert xp.take_along_axis(x, device([5], np.int64), axis=-1).get().tolist() == [12]


@pytest.mark.parametrize("dtype", [BF16, np.float16])
def test_products_of_16_bit_types_are_two_dimensional_and_accumulate_in_float32(dtype):
    a = device(np.ones((1, 4096)), dtype)
    assert (a @ xp.matrix_transpose(a)).get().tolist() == [
        [4096]
    ]  # a sum in bfloat16 would stop at 256
    assert (a @ xp.matrix_transpose(a)).dtype == dtype
    with pytest.raises(Refused, match="2-D"):
        a[None] @ xp.matrix_transpose(a)[None]


@pytest.mark.parametrize(
    "call",
    [lambda x: x + x, lambda x: x * 2.0, xp.exp, xp.sum, xp.max, lambda x: -x, lambda x: x > 0],
)
def test_bfloat16_is_for_storage(call):
    with pytest.raises(Refused, match="storage"):
        call(device([1, 2], BF16))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: xp.argsort(x, stable=True),
        lambda x: xp.reshape(x, shape=(3,)),
        lambda x: xp.sum(x, out=x),
    ],
)
def test_argument_names_are_those_of_cupy(call):
    with pytest.raises(Refused):
        call(device([1, 2, 3]))


def test_get_is_counted():
    before = guard.Gets.n
    device([1.0]).get()
    assert guard.Gets.n == before + 1


@pytest.mark.skipif(
    cupy is None or cupy is xp, reason="compares the stand-in with CuPy, which is not installed"
)
def test_the_stand_in_offers_nothing_that_cupy_has_not():
    for name in (
        *guard.UFUNCS,
        *guard.FUNCTIONS,
        *guard.BIRTHS,
        "asarray",
        "astype",
        "take",
        "take_along_axis",
    ):
        assert callable(getattr(cupy, name)), name
    for name, parameters in (guard.FUNCTIONS | guard.BIRTHS).items():
        known = list(inspect.signature(getattr(cupy, name)).parameters)
        assert set(parameters) <= set(known), (name, known)
    assert not hasattr(cupy.ndarray, "__array_namespace__") and not hasattr(
        guard.Array, "__array_namespace__"
    )
    assert (cupy.ndarray.__module__, cupy.ndarray.__name__) == ("cupy", "ndarray")
    assert arrays.is_array(device([1.0])), "known by its type, as CuPy's arrays are"


# ---------------------------------------------------------------------------------------------------------------- every op on it


@pytest.mark.parametrize("name", ARRAY_OPS)
@given(st.data())
@fewer(2)
def test_every_op_runs_and_agrees(name, data):
    arguments, _ = data.draw(documented_calls(ARRAY_OPS[name]))
    result = ARRAY_OPS[name](**moved(arguments))
    if name not in ("padding", "left_padding", "documents"):
        same(result, ARRAY_OPS[name](**arguments))


@pytest.mark.parametrize("op", [ops.attention, ops.blockwise_attention])
@given(st.data())
def test_attention_agrees_in_every_dtype_under_rules_and_slots(op, data):
    call = data.draw(attention_calls(kinds=("none", "rule", "function", "array")))
    sizes = {"block_q": 2, "block_k": 3} if op is ops.blockwise_attention else {}
    same(
        op(*moved((call.q, call.k, call.v)), return_lse=True, **moved(call.options), **sizes),
        op(call.q, call.k, call.v, return_lse=True, **call.options, **sizes),
    )


@pytest.mark.parametrize("op", [ops.attention, ops.blockwise_attention])
@given(st.data(), compute_dtypes)
def test_rules_of_labels_agree(op, data, dtype):
    q, labels = data.draw(normal((2, 2, 3, 4), dtype)), np.array([[0, 0, 1], [0, 1, 1]])
    valid = np.array([[False, True, True], [True, True, True]])
    same(
        op(
            *moved((q, q, q)),
            mask=causal() & documents(moved(labels)) & padding(moved(valid)) | ~sliding_window(2),
        ),
        op(q, q, q, mask=causal() & documents(labels) & padding(valid) | ~sliding_window(2)),
    )


@given(st.data(), st.sampled_from([BF16, np.float16]))
def test_16_bit_weights_are_widened(data, dtype):
    w, x = data.draw(normal((5, 4), dtype)), data.draw(normal((2, 3, 4)))
    same(ops.linear(*moved((x, w))), ops.linear(x, w))
    same(ops.rms_norm(*moved((x, w[0])), 1e-5), ops.rms_norm(x, w[0], 1e-5))
    same(ops.embed(*moved((np.array([1, 4]), w))), ops.embed(np.array([1, 4]), w))


def test_ids_on_the_device_wrap_and_ids_of_a_model_are_checked_on_the_host():
    weight = device(np.arange(6).reshape(3, 2))
    assert ops.embed(device([3], np.int64), weight).get().tolist() == [[0, 1]]
    for ids in (np.array([[61]]), moved(np.array([[61]])), moved(np.array([[-1]])), [[61]]):
        with pytest.raises(NpllmValueError, match="vocab_size"):
            model_pair()[1](ids)


# -------------------------------------------------------------------------------------------------------------- the whole model on it


def model_pair(*, ops=ops.blockwise, dtype=np.float32, **changes):
    """The same tiny model in NumPy and on the stand-in."""
    ours = tiny.model(ops=ops, dtype=dtype, **changes)
    return ours, npllm.Model(
        ours.config, moved(ours.params), ops=ops, generation_config=ours.generation_config
    )


LONGROPE = {
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
    "original_max_position_embeddings": 12,
    "max_position_embeddings": 48,
}
KINDS = {
    "plain": {},
    "one kv head": {"num_key_value_heads": 1},
    "all kv heads": {"num_key_value_heads": 4},
    "window": {"sliding_window": 5},
    "longrope": LONGROPE,
    "partial rope": {"partial_rotary_factor": 0.5},
    "tied": {"tie_word_embeddings": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("dtype", [np.float32, np.float64, BF16, np.float16])
@pytest.mark.parametrize("set_", [ops.blockwise, ops.reference])
def test_logits_agree(kind, dtype, set_):
    numpy_model, model = model_pair(ops=set_, dtype=dtype, **KINDS[kind])
    ids = tiny.random_ids(2, 17)
    mask = np.ones(ids.shape, int)
    mask[0, :4] = 0
    same(model(ids), numpy_model(ids))
    same(
        model(moved(ids), attention_mask=moved(mask), logits_to_keep=3),
        numpy_model(ids, attention_mask=mask, logits_to_keep=3),
    )


@every_kind
def test_cached_logits_agree_in_pieces(kind):
    numpy_model, model = model_pair(**KINDS[kind])
    ids, cache, other = tiny.random_ids(2, 20), model.new_cache(2), numpy_model.new_cache(2)
    for start, stop in ((0, 7), (7, 8), (8, 15), (15, 16), (16, 20)):  # longrope crosses at 12
        same(model(ids[:, start:stop], cache=cache), numpy_model(ids[:, start:stop], cache=other))
    for one in (cache, other):
        one.reorder([1, 1, 0])
    new = tiny.random_ids(3, 1)
    same(model(new, cache=cache), numpy_model(new, cache=other))


def test_a_cache_that_grows_agrees(monkeypatch):
    monkeypatch.setattr(npllm.cache.state, "SMALLEST_CAPACITY", 2)
    cache = model_pair()[1].new_cache(2)
    cache.append(0, *(device(np.zeros((2, 1, 3, 4))) for _ in range(2)))
    assert cache.n_bytes == 2 * 2 * 4 * 4 * np.float32().nbytes, "room for 4 slots: from 2, doubled"
    test_cached_logits_agree_in_pieces("window")
    test_cached_logits_agree_in_pieces("plain")


def test_a_tap_sees_device_arrays_and_may_replace_them():
    _, model = model_pair()
    seen = []

    def tap(_, x):
        seen.append(type(x))
        return x * 1.0

    model(tiny.random_ids(1, 4), tap=tap)
    assert set(seen) == {guard.Array}


GENERATIONS = [
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"use_cache": False},
    {},
    {"temperature": 1.3, "use_cache": False},
    {"repetition_penalty": 1.3, "temperature": 1.0},
]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(kind, options, marks=[] if (n + m) % 3 == 0 else pytest.mark.slow)
        for n, kind in enumerate(KINDS)
        for m, options in enumerate(GENERATIONS)
    ],
    ids=str,
)
def test_the_same_seed_gives_the_same_text(kind, options):
    """Greedy and sampled, cached and not, a batch with padding; over the switch of longrope and
    beyond the window.
    """
    numpy_model, model = model_pair(**KINDS[kind])
    ids, mask = tiny.random_ids(3, 9), np.ones((3, 9), int)
    mask[1, :3], mask[2, :8] = 0, 0
    for prompt in (ids, moved(ids)):
        made = model.generate(prompt, attention_mask=mask, max_new_tokens=10, seed=5, **options)
        assert isinstance(made, np.ndarray)
        close(
            made,
            numpy_model.generate(ids, attention_mask=mask, max_new_tokens=10, seed=5, **options),
        )


def test_a_folder_loads_onto_it_and_speaks(tmp_path):
    folder = tiny.write_folder(
        tmp_path, tokenizer=tiny.byte_level(), settings=tiny.SETTINGS, vocab_size=300, dtype=BF16
    )
    there, here = (
        npllm.load(folder, backend=backend, ops=ops.blockwise) for backend in ("cupy", "numpy")
    )
    assert type(there.params.embed_tokens) is guard.Array and there.params.norm.dtype == BF16
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        assert there.generate("hello w", max_new_tokens=8, **options) == here.generate(
            "hello w", max_new_tokens=8, **options
        )
        assert "".join(there.stream("hello", max_new_tokens=8, **options)) == here.generate(
            "hello", max_new_tokens=8, **options
        )
    assert there.generate(["hello", "w"], max_new_tokens=4) == here.generate(
        ["hello", "w"], max_new_tokens=4
    )
    answers, others = (
        model.beam_search("hello", num_beams=3, max_new_tokens=6) for model in (there, here)
    )
    assert [answer["text"] for answer in answers] == [answer["text"] for answer in others]
    close(
        there.next_token_distribution("hello", top_p=0.9),
        here.next_token_distribution("hello", top_p=0.9),
        times=1e8,
    )
    close(
        scoring.score(there, "hello world").log_probs,
        scoring.score(here, "hello world").log_probs,
        times=1e8,
    )
    for one, other in zip(
        packing.score_packed(there, ["hello", "world w"]),
        packing.score_packed(here, ["hello", "world w"]),
        strict=True,
    ):
        close(one, other, times=1e8)


def test_beams_agree():
    numpy_model, model = model_pair(**KINDS["window"])
    ids = tiny.random_ids(2, 6)
    for prompt in (ids, moved(ids)):
        got, want = (
            model.beam_search(prompt, num_beams=3, max_new_tokens=9),
            numpy_model.beam_search(ids, num_beams=3, max_new_tokens=9),
        )
        close(got.sequences, want.sequences)
        close(got.scores, want.scores, times=1e8)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_block_of_2017_agrees(norm_first):
    """Encoder, decoder and cross-attention, on the same weights."""
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return 0.3 * rng.standard_normal(shape, dtype=np.float32)

    def heads():
        return transformer.AttentionParams(
            *(drawn(8, 8) for _ in range(4)), *(drawn(8) for _ in range(4))
        )

    def norm():
        return transformer.NormParams(1 + drawn(8), drawn(8))

    def network():
        return transformer.FeedForwardParams(drawn(12, 8), drawn(12), drawn(8, 12), drawn(8))

    encoder = tuple(
        transformer.EncoderLayerParams(heads(), norm(), network(), norm()) for _ in range(2)
    )
    decoder = tuple(
        transformer.DecoderLayerParams(heads(), norm(), heads(), norm(), network(), norm())
        for _ in range(2)
    )
    params = transformer.TransformerParams(encoder, decoder, norm(), norm())
    source, target = drawn(2, 5, 8), drawn(2, 4, 8)
    for activation in (None, ops.gelu):
        options = {"norm_first": norm_first, "activation": activation}
        same(
            transformer.forward(*moved((source, target, params)), 2, ops.blockwise, **options),
            transformer.forward(source, target, params, 2, ops.blockwise, **options),
            times=20,
        )


@pytest.mark.parametrize("head", ["Sequence", "Token"])
def test_classifiers_agree(head, tmp_path):
    folder = tiny.write_folder(
        tmp_path, architectures=[f"Phi3For{head}Classification"], num_labels=3, pad_token_id=0
    )
    there, here = (
        npllm.load(folder, backend=backend, ops=ops.blockwise) for backend in ("cupy", "numpy")
    )
    ids = tiny.random_ids(3, 6)
    ids[0, :2] = ids[1, 4:] = 0
    same(there(ids), here(ids))
    same(there(ids, attention_mask=ids != 0), here(ids, attention_mask=ids != 0))


COMMANDS = {
    "generate": ["hello", "-n", "4"],
    "topk": ["hello"],
    "beam": ["hello", "-n", "4"],
    "score": ["hello world"],
    "attention": ["-p", "hello", "--layer", "1", "--head", "2"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_say_the_same(command, tmp_path):
    folder = tiny.write_folder(
        tmp_path, tokenizer=tiny.byte_level(), settings=tiny.SETTINGS, vocab_size=300
    )
    there, here = (
        invoke(
            [
                command,
                *COMMANDS[command],
                "-m",
                str(folder),
                "--backend",
                backend,
                "--ops",
                "reference",
            ]
        )
        for backend in ("cupy", "numpy")
    )
    assert there.exit_code == here.exit_code == 0, there.output
    assert there.stdout == here.stdout


def test_measuring_waits_for_the_device():
    """A run that ended when its kernels were queued, not when they were done, would be too good to
    be true.
    """
    _, model = model_pair()
    before = guard.Gets.n
    speed.speed(model, n_prompt=4, n_new=3, repeat=2)
    assert guard.Gets.n - before == 1 + 2 * (1 + 3 + 3)


def test_emulation_runs_on_it():
    numpy_model, model = model_pair(ops=ops.emulate("bfloat16"), dtype=BF16)
    same(model(tiny.random_ids(1, 5)), numpy_model(tiny.random_ids(1, 5)))


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.8, "top_p": 0.9}, {"repetition_penalty": 1.2}], ids=str
)
@pytest.mark.parametrize("padded", [False, True])
def test_a_decode_step_waits_for_the_device_once(options, padded):
    """The logits of the last position come to the host, where the one sampler draws: nothing else
    is fetched.
    """
    _, model = model_pair(**KINDS["window"])
    ids, mask = tiny.random_ids(2, 6), np.ones((2, 6), int)
    mask[0, : 2 * padded] = 0
    before, n_new = guard.Gets.n, 12
    model.generate(ids, attention_mask=mask, max_new_tokens=n_new, seed=1, **options)
    assert guard.Gets.n - before == n_new


@pytest.mark.slow
def test_the_default_model_agrees(default_folder):
    numpy_model = npllm.load(default_folder, ops=ops.blockwise)
    model = npllm.Model(numpy_model.config, moved(numpy_model.params), ops=ops.blockwise)
    ids = np.array([numpy_model.tokenizer.encode("The capital of France is")])
    same(model(ids), numpy_model(ids))


# ------------------------------------------------------------------------------------------------------------------ planted mistakes


def _as_numpy(x, weight, eps):
    return ops.rms_norm(arrays.asarray(np.asarray(x), xp), weight, eps)


def _numpy_scalar(x, weight, eps):
    return ops.rms_norm(x, weight, eps) * np.float64(1.0)


def _float_of_an_array(x, weight, eps):
    return ops.rms_norm(x, weight, eps) / float(xp.max(xp.ones_like(x)))


def _branch_on_an_array(x, weight, eps):
    return ops.rms_norm(x, weight, eps) if xp.any(x != 0) else x


def _numpy_array(x, weight, eps):
    return ops.rms_norm(x, weight, eps) + np.zeros(x.shape, np.float32)


@pytest.mark.parametrize(
    "mistake", [_as_numpy, _numpy_scalar, _float_of_an_array, _branch_on_an_array, _numpy_array]
)
def test_a_mistake_in_an_op_is_caught(mistake):
    _, model = model_pair(ops=ops.blockwise.replace(rms_norm=mistake))
    with pytest.raises(Refused):
        model(tiny.random_ids(1, 3))


def test_a_batched_16_bit_product_is_caught():
    def attention(q, k, v, **options):
        half = (xp.astype(x, np.dtype(BF16)) for x in (q, ops.attention(q, k, v, **options)))
        scores = next(half) @ xp.matrix_transpose(next(half))
        return xp.astype(scores, xp.float32)

    _, model = model_pair(ops=ops.blockwise.replace(attention=attention))
    with pytest.raises(Refused, match="2-D only"):
        model(tiny.random_ids(1, 3))


@pytest.mark.parametrize(
    "mistake",
    [lambda x: np.asarray(x), lambda x: float(x[0, 0]), lambda x: x.tolist(), lambda x: list(x)],
)
def test_a_mistake_in_the_loop_is_caught(mistake, monkeypatch):
    _, model = model_pair()
    monkeypatch.setattr(npllm.decoding.loop, "to_numpy", mistake)
    with pytest.raises(Refused):
        model.generate(tiny.random_ids(1, 3), max_new_tokens=2)


def test_a_device_array_beside_a_numpy_array_raises_and_names_both():
    with pytest.raises(NpllmTypeError, match=r"of cupy and .* of numpy"):
        ops.add(device([1.0]), np.ones(1, np.float32))


def test_auto_takes_cupy_where_it_finds_a_device():
    assert arrays.backend_namespace("auto") is xp
    assert re.fullmatch(r"<module 'cupy'.*>", repr(xp))
