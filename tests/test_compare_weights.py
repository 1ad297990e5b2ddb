"""The parameters of a port are looked at before its values."""

import ml_dtypes
import numpy as np
import planted_runs
import pytest
from safetensors.numpy import load_file, save_file

import npllm
from npllm import testing
from npllm.errors import NpllmOSError, NpllmTypeError, NpllmValueError
from npllm.tracing.comparison.row_orders import qkv_index

GQA = testing.golden("gqa")
CONFIG = npllm.Config.from_json(GQA.folder)
QKV = "model.layers.1.self_attn.qkv_proj.weight"
GATE_UP = "model.layers.0.mlp.gate_up_proj.weight"


def weights():
    return load_file(GQA.folder / "model.safetensors")


def findings(**changes):
    changed = {name.replace("/", "."): x for name, x in changes.items()}
    found = npllm.compare(planted_runs.right_run("gqa"), GQA, weights=weights() | changed)
    return {one.name: (one.status, one.says) for one in found.weights if one.status != "same"}


def undone(order):
    return np.argsort(qkv_index(CONFIG, order))


CHANGES = {
    "rope pairs": (QKV, lambda x: x[undone("rope")], "interleaved RoPE pairs (C1"),
    "per head": (QKV, lambda x: x[undone("per-head interleave")], "C6 per-head interleave"),
    "v first": (QKV, lambda x: x[undone("k and v swapped")], "C22 k and v swapped"),
    "up first": (GATE_UP, lambda x: np.concatenate([x[24:], x[:24]]), "C7 up first"),
    "mixed": (GATE_UP, lambda x: np.stack([x[:24], x[24:]], 1).reshape(48, -1), "C7 interleaved"),
    "turned": ("model.layers.0.mlp.down_proj.weight", lambda x: x.T, "C31: transposed"),
    "buffer": (
        "model.layers.0.self_attn.o_proj.weight",
        lambda x: x.T.copy().reshape(x.shape),
        "C31",
    ),
    "gain": ("model.norm.weight", lambda x: x - 1, "C28: holds w - 1"),
    "rows": ("lm_head.weight", lambda x: x[::-1].copy(), "the same rows in another order"),
    "scale": ("model.embed_tokens.weight", lambda x: 4 * x, "multiplied by 4"),
    "cut": ("lm_head.weight", lambda x: x[:-1], "shape [28, 16] for [29, 16]"),
    "nan": ("lm_head.weight", lambda x: np.where(x > 0.5, np.nan, x), "NaN"),
    "other": ("model.norm.weight", lambda x: x * np.linspace(0, 2, 16), "other values"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_done_to_a_parameter_is_said(change):
    name, made, says = CHANGES[change]
    found = findings(**{name.replace(".", "/"): made(weights()[name]).astype(np.float32)})
    assert list(found) == [name]
    status, text = found[name]
    assert says in text
    assert status in ("other order", "different")


def test_parameters_of_another_place_are_said():
    w = weights()
    table = {"lm_head/weight": w["model.embed_tokens.weight"]}
    assert findings(**table) == {
        "lm_head.weight": ("different", "C33 tied: holds the embedding table")
    }
    gain = {"model/norm/weight": w["model.layers.0.input_layernorm.weight"]}
    assert findings(**gain) == {
        "model.norm.weight": ("different", "holds model.layers.0.input_layernorm.weight")
    }


def test_the_same_parameters_are_the_same_split_or_fused():
    w = weights()
    assert findings() == {}
    x = w.pop(QKV)
    parts = np.split(x, [16, 24])
    for leaf, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
        w[QKV.replace("qkv_proj", leaf)] = part
    found = npllm.compare(planted_runs.right_run("gqa"), GQA, weights=w)
    assert {one.status for one in found.weights} == {"same"}
    assert found.status == "same"


def test_missing_and_unknown_names_are_said():
    w = weights()
    w["extra"] = w.pop("model.norm.weight")
    found = npllm.compare(planted_runs.right_run("gqa"), GQA, weights=w)
    assert {one.name: one.status for one in found.weights if one.status != "same"} == {
        "model.norm.weight": "missing",
        "extra": "unknown",
    }
    assert "weights: extra: is no parameter of this checkpoint" in str(found)


@pytest.mark.parametrize(("given", "got"), [({}, "no name"), ({"x": np.ones(2)}, "got x")])
def test_parameters_that_have_nothing_in_common_are_an_error(given, got):
    with pytest.raises(NpllmValueError, match=f"none of the {len(given)} names.*{got}"):
        npllm.compare(planted_runs.right_run("gqa"), GQA, weights=given)


def test_rounded_parameters_are_computed_with(tmp_path):
    """Those of 8 bits, and of bfloat16: the port is right for the weights it has."""
    for make in (lambda x: np.round(32 * x) / 32, lambda x: x.astype(ml_dtypes.bfloat16)):
        w = {name: make(x).astype(np.float32) for name, x in weights().items()}
        folder = tmp_path / str(id(make))
        folder.mkdir()
        save_file(w, folder / "model.safetensors")
        (folder / "config.json").write_text((GQA.folder / "config.json").read_text())
        mine = planted_runs.run(npllm.load(folder), GQA.values["input_ids"])
        assert npllm.compare(mine, GQA).status == "differs"
        found = npllm.compare(mine, GQA, weights=folder)
        assert {one.status for one in found.weights} == {"rounded"}
        assert found.status == "same", str(found)


def test_wrong_parameters_are_reason_enough_to_differ():
    w = weights()
    w["model.norm.weight"] = w["model.norm.weight"][::-1].copy() * 3
    assert npllm.compare(planted_runs.right_run("gqa"), GQA, weights=w).status == "differs"


def test_what_is_no_file_of_parameters_is_an_error(tmp_path):
    mine = planted_runs.right_run("gqa")
    with pytest.raises(NpllmOSError, match="no such file or folder"):
        npllm.compare(mine, GQA, weights=tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(NpllmOSError, match="is not a readable safetensors file"):
        npllm.compare(mine, GQA, weights=tmp_path / "bad.safetensors")
    with pytest.raises(NpllmTypeError, match="must be a mapping from names to arrays"):
        npllm.compare(mine, GQA, weights=3)
    with pytest.raises(NpllmTypeError, match=r"model\.norm\.weight must be an array of"):
        npllm.compare(mine, GQA, weights=weights() | {"model.norm.weight": np.arange(16)})
