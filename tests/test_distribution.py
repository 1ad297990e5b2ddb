"""The exact next-token distribution: what sampling draws from, what Transformers' processors leave,
and what their order changes.
"""

import math
import os

import numpy as np
import oracles
import pytest
import tiny
from close import close
from hypothesis import given
from hypothesis import strategies as st
from optional import invoke

import npllm
from npllm import ops
from npllm.decoding import FILTER_ORDERS, Sampling, choose, next_token_distribution

seeds = st.integers(0, 2**32 - 1)
compute_dtypes = st.sampled_from([np.dtype("float32"), np.dtype("float64")])


def normal(shape, dtype, scale):
    return seeds.map(
        lambda seed: (scale * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)
    )


ORDERS = st.sampled_from(list(FILTER_ORDERS))


@st.composite
def filters(draw, *, greedy=False):
    """Any combination of filters, each on or off."""
    choices = {
        "temperature": st.sampled_from(
            [0, 0.3, 0.7, 1, 1.5, 4.0] if greedy else [0.3, 0.7, 1, 1.5, 4.0]
        ),
        "top_k": st.sampled_from([0, 1, 3, 100]),
        "top_p": st.sampled_from([0.0, 0.3, 0.8, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 0.8, 1.7]),
    }
    return {name: draw(values) for name, values in choices.items() if draw(st.booleans())}


def naive(row, seen, order, options):
    """The filters one by one in the order of the engine, on lists of floats."""

    def on(name):
        return options.get(name) is not None

    def penalised(row):
        return (
            oracles.repetition_penalty(row, seen, options["repetition_penalty"])
            if on("repetition_penalty")
            else row
        )

    def heated(row):
        return [n / options["temperature"] for n in row] if on("temperature") else row

    def kept(row):
        row = oracles.top_k(row, options["top_k"]) if options.get("top_k") else row
        row = oracles.top_p(row, options["top_p"]) if on("top_p") and options["top_p"] < 1 else row
        return oracles.min_p(row, options["min_p"]) if on("min_p") else row

    return oracles.softmax(
        kept(heated(penalised(row))) if order == "transformers" else heated(kept(penalised(row)))
    )


@given(
    shape=st.sampled_from([(7,), (2, 9), (2, 2, 5)]),
    data=st.data(),
    order=ORDERS,
    options=filters(),
    dtype=compute_dtypes,
)
def test_it_is_what_the_filters_leave_one_by_one(shape, data, order, options, dtype):
    logits = data.draw(normal(shape, dtype, 2.0))
    seen = np.random.default_rng(data.draw(seeds)).random(shape) < 0.4
    p = next_token_distribution(logits, order=order, seen=seen, **options)
    rows = [
        naive(row.tolist(), mask, order, options)
        for row, mask in zip(
            logits.reshape(-1, shape[-1]), seen.reshape(-1, shape[-1]), strict=True
        )
    ]
    close(p, np.array(rows).reshape(shape), times=1 if dtype == np.float64 else 1e6)


@given(data=st.data(), order=ORDERS, options=filters(greedy=True))
def test_every_row_is_a_distribution_that_leaves_the_best_token(data, order, options):
    logits = data.draw(normal((3, 11), np.float32, 3.0))
    seen = np.zeros(logits.shape, bool)
    p = next_token_distribution(logits, order=order, seen=seen, **options)
    assert p.dtype == np.float64 and (p >= 0).all()
    close(p.sum(axis=-1), np.ones(3))
    assert (p.argmax(axis=-1) == logits.argmax(axis=-1)).all()
    if options.get("temperature") == 0:
        assert (p.max(axis=-1) == 1).all()


@given(seed=seeds, options=filters())
def test_sampling_with_evenly_spread_u_reproduces_it(seed, options):
    """A part p[i] of all u draws token i, to within one step of the grid at each end."""
    n, rng = 4000, np.random.default_rng(seed)
    logits, seen = rng.standard_normal((1, 9)).astype(np.float32) * 2, rng.random((1, 9)) < 0.4
    u = (np.arange(n) + 0.5) / n
    drawn = choose(
        np.repeat(logits, n, axis=0), Sampling(True, **options), np.repeat(seen, n, axis=0), u
    )
    p = next_token_distribution(logits, seen=seen, **options)[0]
    assert (np.abs(np.bincount(drawn, minlength=9) - n * p) <= 2).all()
    assert set(drawn) <= set(np.flatnonzero(p))


def test_the_orders_differ_where_a_temperature_meets_top_p():
    """Probabilities 1/2, 1/4, 1/8, 1/8.  Hot first: 0.37, 0.26, 0.18, 0.18, of which top_p 0.7
    needs three; cold nucleus first: two.
    """
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125]))
    hot_first = next_token_distribution(logits, temperature=2.0, top_p=0.7)
    hot_last = next_token_distribution(logits, temperature=2.0, top_p=0.7, order="llama.cpp")
    root = np.sqrt([0.5, 0.25, 0.125])
    close(hot_first, np.append(root / root.sum(), 0))
    close(hot_last, np.append(root[:2] / root[:2].sum(), [0, 0]))


@pytest.mark.parametrize("order", FILTER_ORDERS)
def test_top_p_comes_before_min_p(order):
    """Of 0.4, 0.3, 0.2, 0.1 top_p 0.75 leaves three, and min_p 0.45 all of them; min_p first would
    leave 0.44, 0.33, 0.22 and top_p two.
    """
    p = next_token_distribution(
        np.log(np.array([0.4, 0.3, 0.2, 0.1])), top_p=0.75, min_p=0.45, order=order
    )
    close(p, np.array([4, 3, 2, 0]) / 9)


@given(data=st.data(), options=filters())
def test_the_orders_agree_without_temperature_and_with_top_k_alone(data, options):
    logits, seen = data.draw(normal((2, 11), np.float64, 2.0)), np.zeros((2, 11), bool)
    for same in (
        options | {"temperature": 1},
        {name: x for name, x in options.items() if name in ("temperature", "top_k")},
    ):
        close(
            *(
                next_token_distribution(logits, order=order, seen=seen, **same)
                for order in FILTER_ORDERS
            )
        )


@given(data=st.data(), p=st.sampled_from([0.3, 0.8, 0.95]), t=st.sampled_from([1.5, 3.0]))
def test_a_temperature_that_comes_last_lets_no_token_in(data, p, t):
    logits = data.draw(normal((11,), np.float64, 2.0))
    first, last = (
        next_token_distribution(logits, order=order, temperature=t, top_p=p) > 0
        for order in FILTER_ORDERS
    )
    assert (last == (next_token_distribution(logits, top_p=p) > 0)).all()
    assert (first | ~last).all()  # the hot nucleus holds the cold one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "vllm"}, "order must be one of transformers, llama.cpp, got 'vllm'"),
        ({"top_p": 1.5}, "top_p must be .* got 1.5"),
        ({"temperature": -1}, "temperature must be .* got -1"),
        ({"top_k": 2.5}, "top_k must be an integer .* got 2.5"),
        (
            {"repetition_penalty": 1.2},
            r"repetition_penalty = 1.2 needs `seen`, .* \[2, 5\] of the logits; got None",
        ),
    ],
)
def test_what_cannot_be_raises(options, message):
    with pytest.raises(npllm.NpllmError, match=message):
        next_token_distribution(np.zeros((2, 5)), **options)


# -------------------------------------------------------------------------------------------------------------- log_softmax


@given(data=st.data(), shape=st.sampled_from([(5,), (2, 7)]), dtype=compute_dtypes)
def test_log_softmax_is_the_logarithm_of_softmax(data, shape, dtype):
    x = data.draw(normal(shape, dtype, 5.0))
    close(ops.log_softmax(x), np.log(ops.softmax(x.astype(np.float64))), dtype=dtype)
    close(
        ops.log_softmax(x + dtype.type(3)), ops.log_softmax(x), times=10
    )  # a shift changes nothing
    close(ops.log_softmax(np.moveaxis(x, -1, 0), axis=0), np.moveaxis(ops.log_softmax(x), -1, 0))


def test_log_softmax_stays_finite_where_probabilities_vanish_and_exponentials_overflow():
    x = np.array(
        [[0.0, -1000.0, -np.inf], [1000.0, 1000.0, -1000.0], [-np.inf, -np.inf, -np.inf]],
        np.float32,
    )
    close(
        ops.log_softmax(x),
        np.array(
            [[0, -1000, -np.inf], [-math.log(2), -math.log(2), -2000 - math.log(2)], [-np.inf] * 3],
            np.float32,
        ),
    )


# ---------------------------------------------------------------------------------------------------- of a model, and a command


def test_of_a_model_it_counts_the_prompt_as_seen_and_padding_as_nothing():
    model = tiny.model(dtype=np.float64)
    ids, valid = np.array([[0, 5, 9], [4, 6, 7]]), np.array([[0, 1, 1], [1, 1, 1]])
    logits = model(ids, attention_mask=valid)[:, -1]
    seen = np.zeros((2, 61), bool)
    seen[0, [5, 9]] = seen[1, [4, 6, 7]] = True
    options = {"repetition_penalty": 1.8, "temperature": 0.7, "top_k": 20}
    close(
        model.next_token_distribution(ids, attention_mask=valid, **options),
        next_token_distribution(logits, seen=seen, **options),
    )
    close(
        model.next_token_distribution(ids, attention_mask=valid),
        ops.softmax(logits.astype(np.float64)),
        times=0,
    )


def test_topk_shows_probabilities_after_the_filters(tmp_path):
    backend = tiny.byte_level()
    folder = tiny.write_folder(
        tmp_path / "tiny",
        tokenizer=backend,
        settings=tiny.SETTINGS,
        vocab_size=backend.get_vocab_size(),
    )
    model, options = npllm.load(folder), {"temperature": 2.0, "top_p": 0.1}
    for order in FILTER_ORDERS:
        result = invoke(
            [
                "topk",
                "-m",
                str(folder),
                "hello",
                "-k",
                "300",
                "--temp",
                "2",
                "--top-p",
                "0.1",
                "--order",
                order,
            ]
        )
        p = np.sort(model.next_token_distribution("hello", order=order, **options)[0])[::-1]
        assert [
            line.split()[-1 if "█" not in line else -2] for line in result.stdout.splitlines()
        ] == [f"{x:.4f}" for x in p if x > 0]


@pytest.mark.live
@pytest.mark.filterwarnings("ignore")
@given(data=st.data(), options=filters())
def test_transformers_processors_leave_the_same(data, options):
    if os.environ.get("NPLLM_REQUIRE_LIVE") != "1":
        pytest.importorskip(
            "torch", reason="compares with Transformers, and torch is not installed"
        )
        pytest.importorskip(
            "transformers", reason="compares with Transformers, which is not installed"
        )
    import torch
    from transformers import GenerationConfig, GenerationMixin, Phi3Config

    logits = data.draw(normal((2, 40), np.float32, 3.0))
    ids = np.random.default_rng(data.draw(seeds)).integers(0, 40, (2, 6))
    seen = np.zeros(logits.shape, bool)
    seen[np.arange(2)[:, None], ids] = True
    if options.get("top_p") == 0:
        del options["top_p"]  # Transformers refuses it
    config = GenerationConfig(do_sample=True, **{"top_k": 0} | options)
    mixin = GenerationMixin()
    mixin.config = Phi3Config()
    processors = mixin._get_logits_processor(config, input_ids_seq_length=6)
    expected = torch.softmax(
        processors(torch.tensor(ids), torch.tensor(logits)).double(), dim=-1
    ).numpy()
    p = next_token_distribution(logits, seen=seen, **options)
    assert ((p > 0) == (expected > 0)).all()
    close(p, expected, times=1e7)
