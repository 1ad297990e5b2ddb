"""attention_steps: each step beside a recomputation in float64 from the step before it and the
weights, and the last one beside the residual stream of the model.
"""

import math
import re

import numpy as np
import pytest
import tiny
from close import close
from hypothesis import given, settings
from hypothesis import strategies as st

from npllm.analysis.step_facts import STEPS, attention_facts
from npllm.analysis.steps import AttentionSteps, attention_steps
from npllm.errors import NpllmError, NpllmValueError
from npllm.ops.mask import bidirectional, causal, documents, longformer_window

IDS = tiny.random_ids(1, 9)
MODELS = {
    "full": tiny.model(dtype=np.float64),
    "window": tiny.model(dtype=np.float64, sliding_window=3),
    "float32": tiny.model(),
    "one head of keys": tiny.model(dtype=np.float64, num_key_value_heads=1),
    "by layer": tiny.model(dtype=np.float64).with_mask(
        [bidirectional(), causal() & longformer_window(4)]
    ),
    "documents": tiny.model(dtype=np.float64).with_mask(
        causal() & documents(np.array([[0] * 4 + [1] * 5]))
    ),
}
SEES = {
    "full": lambda _, i, j: j <= i,
    "window": lambda _, i, j: i - 3 < j <= i,
    "float32": lambda _, i, j: j <= i,
    "one head of keys": lambda _, i, j: j <= i,
    "by layer": lambda layer, i, j: layer == 0 or i - 2 <= j <= i,
    "documents": lambda _, i, j: j <= i and (j < 4) == (i < 4),
}


def wide(x):
    return np.asarray(x, np.float64)


def rotated(row, position, base=10000.0):
    """RoPE of one row: a complex number for each pair of channels, of half-split pairing.

    Frequencies are constants that are rounded to float32.
    """
    half = len(row) // 2
    z = wide(row[:half]) + 1j * wide(row[half:])
    z = z * np.exp(1j * position * wide(np.float32(base ** (-np.arange(half) / half))))
    return np.concatenate([z.real, z.imag])


def recomputed(model, steps, name):
    """Every step of AttentionSteps from the one before it, in float64: name -> array."""
    s, i, d = steps, steps.position, 8
    layer = model.params.layers[s.layer]
    w, o = wide(layer.qkv_proj), wide(layer.o_proj)
    n_kv = (len(w) // d - 4) // 2
    rows = {
        "q": slice(d * s.head, d * s.head + d),
        "k": slice(d * (4 + s.kv_head), d * (5 + s.kv_head)),
        "v": slice(d * (4 + n_kv + s.kv_head), d * (5 + n_kv + s.kv_head)),
    }
    gain, stream, x = wide(layer.input_layernorm), wide(s.stream), wide(s.x)
    e = [
        math.exp(score) if SEES[name](s.layer, i, j) else 0.0
        for j, score in enumerate(wide(s.scores))
    ]
    return {
        "x": np.array([gain * r / math.sqrt(math.fsum(r * r) / len(r) + 1e-5) for r in stream]),
        "q": w[rows["q"]] @ x[i],
        "k": x @ w[rows["k"]].T,
        "v": x @ w[rows["v"]].T,
        "rotated_q": rotated(s.q, i),
        "rotated_k": np.array([rotated(row, j) for j, row in enumerate(s.k)]),
        "scores": np.array([math.fsum(wide(s.rotated_q) * r) / math.sqrt(d) for r in s.rotated_k]),
        "weights": np.array(e) / math.fsum(e),
        "weighted_values": np.array([w * wide(v) for w, v in zip(s.weights, s.v, strict=True)]),
        "output": np.array([math.fsum(column) for column in s.weighted_values.T]),
        "o_proj": o @ wide(s.merged),
        "stream_after": stream[i] + wide(s.o_proj),
    }


@pytest.mark.parametrize("name", MODELS)
@given(st.integers(0, 1), st.integers(0, 3), st.integers(-9, 8))
@settings(max_examples=6)
def test_every_step_follows_from_the_one_before_it(name, layer, head, position):
    model, i = MODELS[name], position % 9
    steps = attention_steps(model, IDS, layer=layer, head=head, position=position)
    assert (steps.layer, steps.head, steps.position) == (layer, head, i)
    for step, desired in recomputed(model, steps, name).items():
        close(getattr(steps, step), desired, dtype=steps.x.dtype, times=8)
    close(steps.merged[8 * head : 8 * head + 8], wide(steps.output), dtype=steps.x.dtype, times=8)
    assert steps.visible.tolist() == [SEES[name](layer, i, j) for j in range(9)]
    close(steps.all_weights[head, i], steps.weights, times=0)


@pytest.mark.parametrize("name", MODELS)
def test_the_steps_begin_and_end_in_the_residual_stream_of_the_model(name):
    """The input of the layer, all heads side by side, and the stream behind attention."""
    model, seen = MODELS[name], {}
    model(IDS, tap=lambda name, x: seen.setdefault(name, x))
    first = {0: "model.embed_tokens", 1: "model.layers.0"}
    for layer, position in ((0, 8), (1, 3)):
        merged = []
        for head in range(4):
            steps = attention_steps(model, IDS, layer=layer, head=head, position=position)
            close(steps.stream, seen[first[layer]][0], times=0)
            residual = seen[f"model.layers.{layer}.residual"][0, position]
            close(steps.stream_after, residual, times=0)
            merged.append(steps.output)
        close(steps.merged, np.concatenate(merged), times=8)


def test_steps_are_in_the_order_of_the_computation_and_documented():
    """The table of the command, the fields, and the docstring say the same."""
    fields = [name for name in AttentionSteps._fields if name in STEPS]
    assert fields == list(STEPS) and len(STEPS) == 14
    numbers = [number for number, _, _ in STEPS.values()]
    assert numbers == sorted(numbers) and set(numbers) == set(range(1, 11))
    sizes = {"n_ctx": 9, "d_model": 32, "d_head": 8, "n_head*d_head": 32}
    steps = attention_steps(MODELS["full"], IDS, layer=1, head=3)
    parts = re.split(r"^ {4}(?=[\w, ]+ : )", AttentionSteps.__doc__, flags=re.M)
    written = {name: part for part in parts[1:] for name in part.split(" : ")[0].split(", ")}
    for name, (number, axes, _) in STEPS.items():
        assert axes in written[name] and f"Step {number}:" in written[name], name
        assert getattr(steps, name).shape == tuple(sizes[a] for a in axes[1:-1].split(", ")), name


def test_facts_have_every_step_with_its_shape_and_length():
    steps = attention_steps(MODELS["full"], IDS, layer=1, head=3, position=2)
    facts = attention_facts(steps)
    assert [step["name"] for step in facts["steps"]] == list(STEPS)
    lengths = {step["name"]: step["length"] for step in facts["steps"]}
    assert lengths.pop("stream_after") == pytest.approx(math.hypot(*steps.stream_after), rel=1e-12)
    assert lengths.pop("k") == pytest.approx(math.hypot(*steps.k[2]), rel=1e-12)
    assert {name for name, x in lengths.items() if x is None} == {
        "scores",
        "weights",
        "weighted_values",
    }
    assert [row["visible"] for row in facts["keys"]] == [True] * 3 + [False] * 6
    assert facts["token"] == steps.tokens[2] and (facts["head"], facts["kv_head"]) == (3, 1)


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_every_head_are_distributions_over_what_is_visible(name):
    steps = attention_steps(MODELS[name], IDS, layer=1, head=0)
    assert steps.all_weights.shape == (4, 9, 9)
    close(steps.all_weights.sum(axis=-1), np.ones((4, 9), steps.weights.dtype))
    sees = np.array([[SEES[name](1, i, j) for j in range(9)] for i in range(9)])
    close(steps.all_weights > 0, np.broadcast_to(sees, (4, 9, 9)))
    close(steps.weighted_values.sum(axis=0), steps.output)
    assert steps.tokens == [str(n) for n in IDS[0]], (
        "a model without a tokenizer names tokens by id"
    )


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"layer": 2}, r"layer must lie in 0 \.\.\. 1, got 2"),
        ({"layer": -1}, "layer must lie in"),
        ({"head": 4}, r"head must lie in 0 \.\.\. 3, got 4"),
        ({"head": -1}, "head must lie in"),
        ({"position": 9}, r"position must lie in -9 \.\.\. 8, got 9"),
        ({"position": -10}, "position must lie in"),
    ],
)
def test_a_layer_head_or_position_that_does_not_exist_raises(choice, message):
    with pytest.raises(NpllmValueError, match=message):
        attention_steps(MODELS["full"], IDS, **{"layer": 0, "head": 0} | choice)


def test_one_prompt_is_followed_and_not_the_first_of_several():
    with pytest.raises(NpllmError, match="one prompt"):
        attention_steps(MODELS["full"], tiny.random_ids(2, 5), layer=0, head=0)


def test_a_text_needs_a_tokenizer():
    with pytest.raises(NpllmError, match="tokenizer"):
        attention_steps(MODELS["full"], "hello", layer=0, head=0)


@pytest.mark.weights
def test_the_default_checkpoint_is_followed_through_a_text(default_model):
    prompt = "The capital of France is"
    steps = attention_steps(default_model, prompt, layer=10, head=2)
    ids = np.array([default_model.tokenizer.encode(prompt)])
    seen = {}
    default_model(ids, tap=lambda name, x: seen.setdefault(name, x))
    assert "".join(steps.tokens) == prompt
    close(steps.output, seen["model.layers.10.self_attn.heads"][0, 2, -1], times=8)
    close(steps.stream_after, seen["model.layers.10.residual"][0, -1], times=8)
    assert abs(steps.weights.sum() - 1) < 1e-5 and steps.all_weights.shape == (9, 5, 5)
    assert not np.triu(steps.all_weights, 1).any()
