"""Values of which a few entries were recorded, as llama-eval-callback prints them."""

import numpy as np
import planted_runs
import pytest
import tiny

import npllm
from npllm import testing
from npllm.config.strict_json import read_json
from npllm.errors import NpllmValueError
from npllm.testing import bugs

GQA = testing.golden("gqa")


class Recorded(dict):
    """Values with an index."""


def ends(values, names=None, unit=0.0):
    """Keep three entries at each end of every axis, rounded to multiples of a unit."""
    cut, about = Recorded(), {}
    for name, x in values.items():
        if names is not None and name not in names:
            continue
        kept = [np.unique(np.r_[0:3, n - 3 : n] % n) for n in x.shape]
        part = x[np.ix_(*kept)].astype(np.float64)
        cut[name] = np.round(part / unit) * unit if unit else part.astype(np.float32)
        about[name] = {"status": "partial", "kept": [axis.tolist() for axis in kept]}
        about[name] |= {"rounded to": unit} if unit else {}
    ids = GQA.values["input_ids"].tolist()
    step = {"input_ids": ids, "n_past": 0, "cached": False, "attention_mask": None}
    cut.index = {"steps": [step], "values": about, "dtype": None}
    cut.index["config"] = read_json(GQA.folder / "config.json")
    return cut


@pytest.mark.parametrize("unit", [0.0, 1e-4])
def test_a_right_run_is_not_accused(unit):
    found = npllm.compare(ends(planted_runs.right_run("gqa"), unit=unit), GQA)
    assert found.status == "same", str(found)
    assert {row.note.split(";")[0] for row in found.rows} == {"partial"}


@pytest.mark.parametrize("unit", [0.0, 1e-4])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_value_that_is_wrong_is_accused_and_no_later_one(unit, layer):
    bug = bugs["attention: C8 tile"]
    values = planted_runs.wrong_run("gqa", bug.op, bug.fn, {layer})
    found = npllm.compare(ends(values, unit=unit), GQA)
    assert [row.name for row in found.wrong] == [f"model.layers.{layer}.self_attn.heads"]
    assert "inherited" in {row.status for row in found.rows}


def test_rotary_pairs_that_stand_otherwise_are_said():
    values = planted_runs.right_run("gqa")
    back = np.argsort(np.r_[0:4:2, 1:4:2])
    for name, x in values.items():
        if name.rsplit(".", 1)[-1] in ("q", "k", "q_proj", "k_proj"):
            values[name] = x[..., back]
    values = {name: x for name, x in values.items() if not name.endswith("qkv_proj")}
    found = npllm.compare(ends(values), GQA)
    assert found.status == "same", str(found)
    assert any("interleaved RoPE pairs" in row.note for row in found.rows)


def test_a_partial_value_beside_whole_ones_is_not_computed_with():
    values = planted_runs.right_run("gqa")
    name = "model.layers.0.mlp.swiglu"
    mine = ends(values, [name])
    mine[name] += 1
    mine |= {other: x for other, x in values.items() if other != name}
    found = npllm.compare(mine, GQA)
    assert [row.name for row in found.wrong] == [name]
    assert {row.status for row in found.rows if row.name != name} <= {"within", "amplified"}


def test_indices_that_do_not_fit_are_an_error_or_wrong():
    mine = ends(planted_runs.right_run("gqa"), ["lm_head"])
    about = mine.index["values"]["lm_head"]
    about["kept"][2][-1] = 10**9
    assert npllm.compare(mine, GQA).status == "differs"
    for wrong in ([[0]], "x", [["a"], [0], [0]], [[[0], 1], [0], [0]], [[-1], [0], [0]], None):
        about["kept"] = wrong
        if wrong is None:
            assert npllm.compare(mine, GQA).status == "not decidable"
            continue
        with pytest.raises(NpllmValueError, match="kept of lm_head must be a list of indices"):
            npllm.compare(mine, GQA)


def test_a_unit_that_no_float_holds_counts_as_none():
    mine = ends(planted_runs.right_run("gqa"), ["lm_head"])
    mine.index["values"]["lm_head"]["rounded to"] = 10**400
    assert (
        npllm.compare(mine, GQA).status
        == npllm.compare(ends(planted_runs.right_run("gqa"), ["lm_head"]), GQA).status
    )


@pytest.mark.slow
def test_many_layers_of_which_nothing_was_recorded_take_no_time():
    """There are 2**30 paths through 30 layers; every value is looked at once."""
    model = tiny.model(num_hidden_layers=30)
    ids = tiny.random_ids(1, 5)
    gold = npllm.trace(model, ids, dtype="float64")
    found = npllm.compare(npllm.trace(model, ids, layers=[0]), gold, model=model)
    assert found.status in ("same", "not decidable"), str(found)
    values = {name: np.array(gold[name]) for name in gold}
    values["model.layers.0.mlp.swiglu"] *= 2
    kept = {name: x for name, x in values.items() if "layers." not in name or "layers.0." in name}
    wrong = npllm.compare(kept, gold, model=model)
    assert wrong.first_wrong.name == "model.layers.0.mlp.swiglu"
