"""attention_steps: each step beside a recomputation from the tapped queries, keys and values."""

import math

import numpy as np
import pytest
import tiny
from close import close
from hypothesis import given, settings
from hypothesis import strategies as st

from npllm.analysis.steps import attention_steps
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


def tapped(model, ids, layer):
    """What the model itself computed in a layer: q, k, v and the mixed values of all heads."""
    seen = {}

    def tap(name, x):
        seen[name] = x
        return x

    model(ids, tap=tap)
    return [
        seen[f"model.layers.{layer}.self_attn.{name}"][0] for name in ("q", "k", "v", "attention")
    ]


@pytest.mark.parametrize("name", MODELS)
@given(st.integers(0, 1), st.integers(0, 3), st.integers(-9, 8))
@settings(max_examples=10)
def test_every_step_is_what_the_formula_gives(name, layer, head, position):
    model, i = MODELS[name], position % 9
    steps = attention_steps(model, IDS, layer=layer, head=head, position=position)
    q, k, v, mixed = tapped(model, IDS, layer)
    kv = head * len(k) // len(q)
    scores = [math.fsum(q[head, i] * key) / math.sqrt(8) for key in k[kv]]
    e = [math.exp(score) if SEES[name](layer, i, j) else 0.0 for j, score in enumerate(scores)]
    weights = np.array(e) / math.fsum(e)
    dtype = q.dtype
    close(steps.scores, np.array(scores), dtype=dtype, times=4)
    close(steps.weights, weights, dtype=dtype, times=8)
    close(steps.weighted_values, weights[:, None] * v[kv], dtype=dtype, times=8)
    close(steps.output, weights @ v[kv], dtype=dtype, times=8)
    close(steps.output, mixed[i, 8 * head : 8 * head + 8], times=8)
    close(steps.all_weights[head, i], steps.weights, times=0)


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
    q, _, _, mixed = tapped(default_model, ids, 10)
    d_head = q.shape[-1]
    assert "".join(steps.tokens) == prompt
    close(steps.output, mixed[-1, 2 * d_head : 3 * d_head], times=8)
    assert abs(steps.weights.sum() - 1) < 1e-5 and steps.all_weights.shape == (9, 5, 5)
    assert not np.triu(steps.all_weights, 1).any()
