"""What objects show of themselves: short, true, with the mask in it."""

import numpy as np
import pytest
import tiny

from npllm import ops
from npllm.errors import NpllmError
from npllm.ops import mask

DOCUMENTS = mask.documents(np.array([[0, 0, 1]]))


@pytest.mark.parametrize(
    "rule, text",
    [
        (mask.causal(), "causal()"),
        (mask.causal() & ~mask.sliding_window(4), "causal() & ~sliding_window(4)"),
        (mask.causal() & DOCUMENTS, "causal() & documents(<int64 [1, 3]>)"),
    ],
)
def test_repr_of_a_rule_is_what_makes_it(rule, text):
    assert repr(rule) == text


@pytest.mark.parametrize(
    "rule", [mask.causal(), mask.sliding_window(2), mask.causal() & DOCUMENTS, ~mask.causal()]
)
def test_dense_is_the_rule_at_every_pair(rule):
    table = rule.dense(3)
    assert table.dtype == bool
    assert table.shape[-2:] == (3, 3)
    for i in range(3):
        for j in range(3):
            assert (table[..., i, j] == rule(np.array([i]), np.array([j]))[..., 0]).all()


def test_dense_takes_a_count():
    assert mask.bidirectional().dense(0).shape == (0, 0)
    with pytest.raises(NpllmError, match="n must"):
        mask.causal().dense(-1)


def test_repr_of_a_model_has_its_operations_and_its_mask():
    model = tiny.model(ops="reference")
    assert repr(model).startswith("<npllm.Model phi3, reference ops, mask ")
    assert repr(model.with_mask(mask.causal())).endswith("ops, mask causal()>")
    n = model.config.num_hidden_layers
    rules = [mask.sliding_window(2)] + [mask.causal()] * (n - 1)
    shown = f"mask sliding_window(2) in 1 layers, causal() in {n - 1} layers>"
    assert repr(model.with_mask(rules)).endswith(shown)


def test_repr_of_a_cache_follows_it():
    model = tiny.model()
    cache = model.new_cache(n_batch=2)
    model(tiny.random_ids(2, 5), cache=cache)
    assert repr(cache).startswith(f"<npllm.KVCache n_batch 2, {cache.n_layer} layers, 5 of ")
    assert repr(cache).endswith(f"{cache.n_bytes:,} bytes>")


def test_repr_of_params_has_shapes_and_no_numbers():
    params = tiny.model().params
    shape = list(params.embed_tokens.shape)
    assert repr(params).startswith(f"Params(embed_tokens=<float32 {shape}>, layers=<")
    assert f"<{len(params.layers)} x LayerParams>" in repr(params)
    assert f"down_proj=<float32 {list(params.layers[0].down_proj.shape)}>" in repr(params.layers[0])
    assert "None" not in repr(params.layers[0])


def test_dir_of_ops_shows_operations_only():
    assert dir(ops) == sorted(ops.__all__)
    assert not {"frequencies", "opset", "residual", "feedforward"} & set(dir(ops))
    assert all(hasattr(ops, name) for name in dir(ops))


def test_a_lost_batch_axis_is_named_and_rows_are_not():
    model = tiny.model(ops="reference")
    hidden = model.model(tiny.random_ids(1, 5))
    with pytest.warns(UserWarning, match=r"leave out its \[0\]"):
        assert model.lm_head(hidden[0]).shape == model.lm_head(hidden).shape[1:]
    assert model.lm_head(hidden[:, -1]).ndim == 2  # warnings are errors here
