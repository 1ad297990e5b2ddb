"""NaN and infinity never become a token or a figure: the last look, where every decision passes
through it.
"""

import guard
import numpy as np
import optional
import pytest
import test_encoder
import tiny
from close import close
from hypothesis import given
from hypothesis import strategies as st

import npllm
from npllm import ops
from npllm.analysis import packing, score, speed, steps
from npllm.config.bert_config import BertConfig
from npllm.decoding import FILTER_ORDERS, Sampling, choose, next_token_distribution
from npllm.encoder import cosine_similarities
from npllm.errors import NpllmValueError
from npllm.finite_scores import check_finite, check_scores

strict = optional.module("array_api_strict")
IDS = tiny.random_ids(1, 6)
BAD = {"NaN": [1, np.nan, 3], "+inf": [1, np.inf, 3], "-inf": [-np.inf] * 3}
WEIGHTS = {
    "embedding": lambda p: p.embed_tokens[:, 3],
    "product": lambda p: p.layers[0].qkv_proj[5:6, 7],
    "norm": lambda p: p.norm[3:4],
    "last product": lambda p: p.lm_head[5:6, 3],
}  # views of what becomes NaN
FIGURES = {
    "greedy": lambda m: m.generate(IDS, max_new_tokens=3),
    "sampling": lambda m: m.generate(IDS, max_new_tokens=3, temperature=0.7, seed=1),
    "filters": lambda m: m.generate(IDS, max_new_tokens=3, top_k=5, top_p=0.9, min_p=0.01, seed=1),
    "penalty": lambda m: m.generate(IDS, max_new_tokens=3, repetition_penalty=1.3),
    "without a cache": lambda m: m.generate(IDS, max_new_tokens=3, use_cache=False),
    "beams": lambda m: m.beam_search(IDS, max_new_tokens=3),
    "distribution": lambda m: m.next_token_distribution(IDS),
    "greedy distribution": lambda m: m.next_token_distribution(IDS, temperature=0),
    "score": lambda m: score.score(m, IDS[0]),
    "perplexity": lambda m: score.score(m, IDS[0]).perplexity,
    "packed score": lambda m: packing.score_packed(m, [IDS[0].tolist(), [4, 5]]),
    "speed": lambda m: speed.speed(m, n_prompt=3, n_new=1, repeat=1),
}


def poisoned(where, **options):
    """A model with NaN among its weights, which every token meets."""
    m = tiny.model(**options)
    top = (x for x in m.params if isinstance(x, np.ndarray))
    for x in (*top, *(x for layer in m.params.layers for x in layer if x is not None)):
        x.flags.writeable = True
    WEIGHTS[where](m.params)[...] = np.nan
    return m


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("where", WEIGHTS)
def test_a_nan_among_the_weights_is_told_and_not_printed(where, figure):
    FIGURES[figure](tiny.model(ops=ops.blockwise))
    with pytest.raises(NpllmValueError, match="logits must hold no NaN"):
        FIGURES[figure](poisoned(where, ops=ops.blockwise))


@pytest.mark.parametrize("figure", [figure for figure in FIGURES if figure != "speed"])
def test_the_error_says_where_to_look(figure):
    with pytest.raises(
        NpllmValueError,
        match=r"the model's logits .* got NaN in 61 of 61 entries of row \d+ of \d+; are the weights finite",
    ):
        FIGURES[figure](poisoned("norm", ops=ops.blockwise))


def test_attention_weights_of_nan_are_refused():
    with pytest.raises(NpllmValueError, match="q of layer 1 must be finite, got NaN"):
        steps.attention_steps(poisoned("product", ops=ops.blockwise), IDS, layer=1, head=0)


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "hello", "-n", "4"],
        ["topk", "hello"],
        ["beam", "hello"],
        ["score", "hello world"],
        ["attention", "-p", "hello", "--layer", "1", "--head", "2"],
    ],
)
def test_commands_exit_with_the_error(command, tmp_path):
    folder = tiny.write_folder(
        tmp_path,
        tokenizer=tiny.byte_level(),
        settings=tiny.SETTINGS,
        vocab_size=300,
        tensors={
            name: np.where(name == "model.layers.0.input_layernorm.weight", np.float32(np.nan), x)
            for name, x in tiny.weights(tiny.config_dict(vocab_size=300)).items()
        },
    )
    result = optional.invoke([*command, "-m", str(folder), "--ops", "reference"])
    assert result.exit_code == 1 and "NaN" in result.stderr, result.output
    assert result.stdout.strip() in ("", "hello"), "nothing but the prompt"


def test_embeddings_of_nan_are_refused(tmp_path):
    weights = test_encoder.tensors(BertConfig.from_json(test_encoder.CONFIG))
    weights["embeddings.LayerNorm.weight"][3] = np.nan
    test_encoder.write(tmp_path, weights=weights)
    with pytest.raises(
        NpllmValueError,
        match=r"embeddings must be finite, got NaN .* row 0 of 2; are the weights finite",
    ):
        npllm.load(tmp_path).embed(["the cat", "a"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_cosines_of_what_is_not_finite_are_refused(value):
    with pytest.raises(
        NpllmValueError, match=r"embeddings must be finite, got .* in 1 of 2 entries of row 1 of 2"
    ):
        cosine_similarities(np.array([[1, 2], [3, value]]))


def test_perplexity_takes_impossible_tokens_and_no_nan():
    assert score.perplexity(np.array([-1.0, -np.inf])) == np.inf
    for value in (np.nan, np.inf):
        with pytest.raises(
            NpllmValueError, match=r"log_probs must be finite, got .* in 1 of 3 entries"
        ):
            score.perplexity(np.array([-1.0, value, -np.inf]))


# ---------------------------------------------------------------------------------------------------------------- the check itself


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, "bfloat16"])
def test_the_check_names_the_row_and_what_it_holds(kind, dtype):
    rows = np.array([[[0, -np.inf, 1]], [BAD[kind]], [[1, 2, 3]]]).astype(
        npllm.arrays.dtype_named(np.dtype(dtype).name if dtype != "bfloat16" else dtype)
    )
    with pytest.raises(
        NpllmValueError,
        match=rf"it must hold .*, got .*{kind.lstrip('+-')} in [13] of 3 entries of row 1 of 3; hint",
    ):
        check_scores(rows, "it", "hint")
    assert check_scores(rows[::2], "it") is not None
    with pytest.raises(NpllmValueError, match="must be finite"):
        check_finite(rows.astype(np.float64), "it")


@pytest.mark.parametrize("kind", BAD)
def test_the_operations_that_choose_refuse_it_too(kind):
    logits = np.array([[1.0, 2.0, 3.0], BAD[kind]])
    for call in (
        lambda: ops.greedy(logits),
        lambda: ops.sample(logits, np.zeros(2)),
        lambda: choose(logits, Sampling()),
        lambda: next_token_distribution(logits),
        lambda: next_token_distribution(logits, temperature=0),
        lambda: next_token_distribution(logits, top_p=0.5),
        lambda: ops.sample(strict.asarray(logits), strict.zeros(2)),
        lambda: next_token_distribution(strict.asarray(logits)),
    ):
        with pytest.raises(
            NpllmValueError,
            match=r"logits must hold no NaN, no .inf, and in every row one number above -inf",
        ):
            call()


def special(dtype):
    """Numbers of every size that a dtype has, and what is none."""
    largest = float(np.finfo(dtype).max)
    return st.sampled_from(
        [0.0, 1.0, -1.0, 1e-30, -1e-30, 1e9, -1e9, 1e30, largest, -largest, -np.inf, np.inf, np.nan]
    ) | st.floats(-20, 20)


@given(st.data(), st.sampled_from([np.float32, np.float64]), st.sampled_from(list(FILTER_ORDERS)))
def test_a_distribution_sums_to_one_or_the_error_says_why(data, dtype, order):
    """Whatever the logits and the options: and the blame goes to the logits if they are none, else
    to a filter by its name.
    """
    n = data.draw(st.integers(1, 6))
    logits = np.array([data.draw(st.lists(special(dtype), min_size=n, max_size=n))]).astype(dtype)
    options = {
        "temperature": data.draw(
            st.sampled_from(
                [0, 5e-324, 1e-320, 1e-46, 1e-45, 1e-40, 1e-38, 1e-10, 9e-7, 0.5, 2.0, 1e29]
            )
        ),
        "repetition_penalty": data.draw(st.sampled_from([1, 1e-29, 1.2, 1e29])),
        "top_k": data.draw(st.sampled_from([0, 1, 3])),
        "top_p": data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        "min_p": data.draw(st.sampled_from([0.0, 0.5, 1.0])),
    }
    seen = np.array([data.draw(st.lists(st.booleans(), min_size=n, max_size=n))])
    proper = -np.inf < logits.max() < np.inf
    try:
        p = next_token_distribution(logits, order=order, seen=seen, **options)
    except NpllmValueError as error:
        assert ("logits after" in str(error)) == proper and "weights" not in str(error)
        return
    assert proper and (p >= 0).all()
    close(p.sum(axis=-1), np.ones(1))
    token = (
        choose(logits, Sampling(True, **options), seen, np.array([0.5]))
        if options["temperature"]
        else p.argmax(axis=-1)
    )
    assert order != "transformers" or p[0, token[0]] > 0


@given(
    st.data(),
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from([5e-324, 1e-320, 1e-46, 1e-40, 1e-38, 1e-20, 9e-7]),
)
def test_the_colder_the_nearer_to_the_best_token(data, dtype, t):
    """At a temperature that separates any two logits, the likeliest tokens share all of the
    probability, ties evenly.
    """
    logits = np.array(
        [
            data.draw(
                st.lists(
                    st.sampled_from([-np.inf, -1e30, -7.0, -1.0, 0.0, 1.0, 2.0, 1e30]),
                    min_size=2,
                    max_size=6,
                )
            )
        ]
    ).astype(dtype)
    if logits.max() == -np.inf:
        return
    best = logits == logits.max()
    with pytest.MonkeyPatch.context() as patch:
        guard.installed(patch)
        for x in (logits, strict.asarray(logits), guard.Array(logits)):
            y = ops.temperature(x, t)
            host = npllm.arrays.to_numpy(y)
            assert (
                y.dtype == x.dtype
                and np.isfinite(host[logits > -np.inf]).all()
                and (host[logits == -np.inf] == -np.inf).all()
            )
            close(npllm.arrays.to_numpy(ops.softmax(y)), (best / best.sum()).astype(dtype))


@pytest.mark.parametrize("t", [9.9e-7, 1e-6, 1.1e-6])
def test_the_shift_below_a_temperature_changes_no_distribution(t):
    logits = np.random.default_rng(0).standard_normal((4, 50)) * 5e-6
    close(ops.softmax(ops.temperature(logits, t)), ops.softmax(logits / t))


def test_a_filter_that_leaves_nothing_is_named():
    logits = np.array([[1e20, 2e20]], np.float32)
    with pytest.raises(
        NpllmValueError,
        match=r"logits after repetition_penalty = 1e-25 must hold .*; give another repetition_penalty",
    ):
        next_token_distribution(logits, seen=np.ones((1, 2), bool), repetition_penalty=1e-25)


# --------------------------------------------------------------------------------------------------- what it costs on a device: nothing


@pytest.fixture
def device_model(monkeypatch):
    guard.installed(monkeypatch)
    m = tiny.model(ops=ops.blockwise)
    return npllm.Model(m.config, guard.moved(m.params), ops=ops.blockwise)


@pytest.mark.parametrize(
    ("figure", "n"),
    [
        ("greedy", 3),
        ("sampling", 3),
        ("filters", 3),
        ("penalty", 3),
        ("without a cache", 3),
        ("beams", 3),
        ("distribution", 1),
        ("greedy distribution", 1),
        ("score", 1),
        ("packed score", 2),
    ],
)
def test_nothing_is_fetched_that_was_not(device_model, figure, n):
    """One crossing for each token, block of scores or document, as before there was a check."""
    before = guard.Gets.n
    FIGURES[figure](device_model)
    assert guard.Gets.n - before == n


def test_greedy_on_a_device_waits_for_nothing(monkeypatch):
    guard.installed(monkeypatch)
    before = guard.Gets.n
    ops.greedy(guard.Array(np.array([[1.0, np.nan]])))
    assert guard.Gets.n == before
