"""model.run: values are replaced by name, in a plain run and a cached one."""

import dataclasses

import guard
import numpy as np
import pytest
import tiny
from close import close

import npllm
from npllm import ops
from npllm.errors import NpllmError, NpllmValueError
from npllm.models.params import Params
from npllm.models.patch import value_names
from npllm.tracing.graph import graph

MODEL = tiny.model(ops=ops.blockwise)
IDS = tiny.random_ids(2, 6)
NAMES = value_names(MODEL.config, cached=True)


def flipped(x):
    return np.flip(x, axis=-1)


@pytest.mark.parametrize("cached", [False, True])
def test_the_names_are_those_of_a_run(cached):
    names = value_names(MODEL.config, cached=cached)
    assert set(names) == set(graph(2, cached=cached)) and len(names) == len(set(names))
    assert names[-1] == "lm_head"


@pytest.mark.parametrize("name", NAMES)
def test_a_patch_does_what_a_tap_does(name):
    def tap(at, x):
        return flipped(x) if at == name else x

    def cache():
        filled = MODEL.new_cache(2)
        MODEL(IDS[:, :2], cache=filled)
        return filled

    found = MODEL.run(IDS[:, 2:], patch={name: flipped}, cache=cache())
    close(found, MODEL(IDS[:, 2:], cache=cache(), tap=tap), times=0)
    assert np.abs(found - MODEL(IDS[:, 2:], cache=cache())).max() > 1e-3


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.0", "model.layers.1.mlp.up"])
def test_an_array_from_another_run_takes_the_place_of_a_value(name):
    """The whole residual stream of a run makes the rest of the other run the same."""
    other = tiny.random_ids(2, 6, seed=1)
    value = npllm.trace(MODEL, other)[name]
    found = MODEL.run(IDS, patch={name: value})
    if name != "model.layers.1.mlp.up":
        close(found, MODEL(other), times=1)
    assert np.abs(found - MODEL(IDS)).max() > 1e-3


def test_a_head_that_is_ablated_has_no_output_weights():
    """The same as a checkpoint whose o_proj has zeros in the columns of that head."""
    at = 2

    def without(heads):
        return heads * (np.arange(4) != at)[:, None, None]

    found = MODEL.run(IDS, patch={"model.layers.1.self_attn.heads": without})
    weight = MODEL.params.layers[1].o_proj.copy()
    weight[:, 8 * at : 8 * at + 8] = 0
    layers = (MODEL.params.layers[0], MODEL.params.layers[1]._replace(o_proj=weight))
    params = Params(*MODEL.params._replace(layers=layers))
    close(found, npllm.Model(MODEL.config, params, ops=ops.blockwise)(IDS), times=1)


def test_several_patches_and_a_tap_that_sees_them():
    seen = {}
    zero = np.zeros((2, 6, 32), np.float32)
    patch = {"model.layers.0": zero, "model.norm": lambda x: 2 * x}
    logits = MODEL.run(IDS, patch=patch, tap=lambda name, x: seen.setdefault(name, x))
    assert not seen["model.layers.0"].any() and not seen["model.layers.1.input_layernorm"].any()
    close(logits, 2 * (seen["model.norm"] / 2) @ MODEL.params.lm_head.T, times=4)
    assert "model.layers.0.self_attn.weights" not in seen


def test_a_tap_that_asks_for_weights_gets_them():
    class Spy:
        pairs = True

        def __init__(self):
            self.seen = []

        def __call__(self, name, x):
            self.seen.append(name)
            return x

    spy = Spy()
    MODEL.run(IDS, patch={"model.norm": flipped}, tap=spy)
    assert "model.layers.1.self_attn.weights" in spy.seen


def test_mask_positions_and_kept_logits_are_those_of_a_call():
    options = {"attention_mask": np.array([[0, 0, 1, 1, 1, 1], [1] * 6])}
    options |= {"position_ids": np.arange(6) + 3, "logits_to_keep": 2}
    found = MODEL.run(IDS, patch={"model.layers.0": lambda x: x}, **options)
    close(found, MODEL(IDS, **options), times=1)
    with pytest.raises(NpllmValueError, match="logits_to_keep must be an integer"):
        MODEL.run(IDS, patch={}, logits_to_keep=-1)


def test_no_patch_is_a_plain_run():
    close(MODEL.run(IDS, patch={}), MODEL(IDS), times=1)


UNKNOWN = {
    "model.layers.2": "'model.layers.2', which is no value of this run.*there are model.layers.1",
    "model.layers.N.mlp.up": "no value of this run",
    "model.layers.0.self_attn.cached_k": "no value of this run.*self_attn.k",
    "model.layers.0.self_attn.weights": "no value of this run that can be replaced",
    "model.layers.*": "no value of this run",
    7: "patch has 7, which is no value of this run",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_name_is_refused(name):
    with pytest.raises(NpllmValueError, match=UNKNOWN[name]):
        MODEL.run(IDS, patch={name: flipped})


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (lambda _: None, "the patch of model.norm must return an array of numpy, got builtins"),
        (lambda x: x.astype(np.float64), "must return an array of numpy, float32, got.* float64"),
        (lambda x: x[:, :1], r"the patch of model.norm must return the shape \[2, 6, 32\]"),
        (np.zeros((6, 32), np.float32), r"shape \[2, 6, 32\], got \[6, 32\]"),
        (0.0, "the patch of model.norm must be a function or an array, got float"),
    ],
)
def test_what_a_patch_returns_is_checked(new, said):
    with pytest.raises(NpllmError, match=said):
        MODEL.run(IDS, patch={"model.norm": new})
    with pytest.raises(NpllmError, match="patch must map names to functions or arrays"):
        MODEL.run(IDS, patch=[("model.norm", new)])


def test_a_value_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="read-only"):
        MODEL.run(IDS, patch={"model.norm": lambda x: np.negative(x, out=x)})


@pytest.mark.parametrize("kind", ["function", "array"])
def test_a_patch_that_never_fires_is_named_and_the_cache_stays(kind):
    """A kernel of the caller's own computes the feed-forward network as a whole."""
    model = MODEL.with_ops(mlp_block=lambda x, *_: x * 2)
    new = flipped if kind == "function" else np.zeros((2, 3, 40), np.float32)
    cache = model.new_cache(2)
    model(IDS[:, :3], cache=cache)
    with pytest.raises(NpllmValueError, match=r"the patch of model.layers.1.mlp.up never fired"):
        model.run(IDS[:, 3:], patch={"model.layers.1.mlp.up": new}, cache=cache)
    assert cache.n_ctx == 3
    close(model(IDS[:, 3:], cache=cache), model(IDS)[:, 3:], times=2)


def test_a_classifier_has_no_lm_head():
    config = dataclasses.replace(MODEL.config, architectures=("Phi3ForTokenClassification",))
    params = MODEL.params._replace(lm_head=None, score=np.ones((2, 32), np.float32))
    model = npllm.Model(config, params._replace(score_bias=np.zeros(2, np.float32)))
    found = model.run(IDS, patch={"model.norm": np.ones((2, 6, 32), np.float32)})
    close(found, np.full((2, 6, 2), 32, np.float32))
    with pytest.raises(NpllmValueError, match="'lm_head', which is no value of this run"):
        model.run(IDS, patch={"lm_head": flipped})


def test_a_host_array_is_moved_to_the_device(monkeypatch):
    guard.installed(monkeypatch)
    model = npllm.Model(MODEL.config, guard.moved(MODEL.params), ops=ops.blockwise)
    zero = np.zeros((2, 6, 32), np.float32)
    patch = {"model.layers.0": zero, "model.layers.1.residual": lambda x: x * 2}
    found = model.run(IDS, patch=patch)
    assert isinstance(found, guard.Array)
    close(found.get(), MODEL.run(IDS, patch=patch), times=4)
