"""Other orders of the same numbers are said and undone; an order that is a mistake is one."""

import numpy as np
import planted_runs
import pytest

import npllm
from npllm import ops, testing
from npllm.testing import bugs

HALVES = np.r_[0:4:2, 1:4:2]  # where our channels stand among interleaved pairs


def interleaved(values):
    """The values of a port that keeps queries and keys as interleaved pairs, as GGUF files do."""
    changed = dict(values)
    back = np.argsort(HALVES)
    for name, x in values.items():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("q", "k", "q_proj", "k_proj"):
            changed[name] = x[..., back]
        if leaf == "qkv_proj":
            heads = x.reshape(*x.shape[:-1], 8, 4).copy()  # 4 queries, 2 keys, 2 values
            heads[..., :6, :] = heads[..., :6, :][..., back]
            changed[name] = heads.reshape(x.shape)
    return changed


@pytest.mark.parametrize("left_out", [(), ("qkv_proj",), ("qkv_proj", "q_proj", "k_proj")])
def test_interleaved_pairs_are_an_order(left_out):
    values = interleaved(planted_runs.right_run("gqa"))
    values = {n: x for n, x in values.items() if n.rsplit(".", 1)[-1] not in left_out}
    found = npllm.compare(values, testing.golden("gqa"))
    assert found.status == "same", str(found)
    note = next(row.note for row in found.rows if row.op == "self_attn.q")
    assert "channels 2i and 2i + 1 stand for i and i + d_rope/2" in note


def test_interleaved_rotation_of_other_weights_is_a_mistake():
    bug = bugs["apply_rope: C1 interleaved"]
    values = planted_runs.wrong_run("gqa", bug.op, bug.fn, {0, 1, 2, 3})
    found = npllm.compare(values, testing.golden("gqa"))
    assert {row.op for row in found.wrong} == {"self_attn.q", "self_attn.k"}
    assert {row.diagnosis for row in found.wrong} == {"C1 interleaved"}


LAYOUTS = {
    "heads behind positions": (lambda x: np.swapaxes(x, 1, 2), ("q", "k", "v", "heads")),
    "heads side by side": (
        lambda x: np.swapaxes(x, 1, 2).reshape(2, 9, -1),
        ("q", "k", "v", "q_proj", "k_proj"),
    ),
    "n_batch and n_seq as one axis": (lambda x: x.reshape(18, -1), ("o_proj", "swiglu", "norm")),
    "transposed": (lambda x: np.transpose(x, (2, 0, 1)), ("o_proj", "swiglu", "lm_head")),
    "half a table": (lambda x: x[:, : x.shape[1] // 2], ("cos", "sin")),
    "a table of interleaved columns": (lambda x: x[:, [0, 2, 1, 3]], ("cos", "sin")),
    "a table with a batch": (lambda x: np.stack([x, x]), ("cos", "sin")),
    "heads apart": (lambda x: x.reshape(2, 9, 4, 4), ("attention",)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_said_and_undone(layout):
    change, leaves = LAYOUTS[layout]
    values = planted_runs.right_run("gqa")
    is_changed = {name: name.rsplit(".", 1)[-1] in leaves for name in values}
    changed = {name: change(x) if is_changed[name] else x for name, x in values.items()}
    found = npllm.compare(changed, testing.golden("gqa"))
    assert found.status == "same", str(found)
    if layout != "a table with a batch":
        assert all(row.note for row in found.rows if is_changed[row.name])
    broken = {name: x + 1 if is_changed[name] else x for name, x in changed.items()}
    assert npllm.compare(broken, testing.golden("gqa")).status == "differs"


def test_another_order_of_heads_is_said():
    order = [2, 0, 3, 1]
    values = planted_runs.right_run("mha")
    for name, x in values.items():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("q", "k", "v", "q_proj", "k_proj", "heads"):
            values[name] = x[:, order]
    values = {n: x for n, x in values.items() if not n.endswith((".qkv_proj", ".attention"))}
    found = npllm.compare(values, testing.golden("mha"))
    assert found.status == "same", str(found)
    assert "heads in the order [1, 3, 0, 2]" in {row.note for row in found.rows}


def test_another_order_of_the_heads_of_the_output_alone_is_a_mistake():
    def shuffled(*args, **options):
        return ops.attention(*args, **options)[:, [2, 0, 3, 1]]

    values = planted_runs.wrong_run("mha", "attention", shuffled, {1})
    found = npllm.compare(values, testing.golden("mha"))
    assert [row.name for row in found.wrong] == ["model.layers.1.self_attn.heads"]


def test_rows_of_up_before_those_of_gate_are_an_order_of_the_fused_map():
    values = planted_runs.right_run("gqa")
    for name, x in values.items():
        if name.endswith("gate_up_proj"):
            values[name] = np.concatenate([x[..., 24:], x[..., :24]], axis=-1)
    found = npllm.compare(values, testing.golden("gqa"))
    assert found.status == "same", str(found)
    notes = {row.note for row in found.rows if row.op == "mlp.gate_up_proj"}
    assert notes == {"C7 up first: rows of up, then of gate"}


def exchanged(values, front="model.layers.0.mlp."):
    values[front + "gate"], values[front + "up"] = values[front + "up"], values[front + "gate"]
    return values


def test_gate_and_up_that_were_only_recorded_so_are_a_wrong_capture():
    found = npllm.compare(exchanged(planted_runs.right_run("gqa")), testing.golden("gqa"))
    assert {row.op: row.status for row in found.wrong} == {
        "mlp.gate": "wrong capture",
        "mlp.up": "wrong capture",
    }


def test_gate_and_up_that_are_exchanged_are_a_mistake():
    seen = {}

    def tap(name, x):
        if name == "model.layers.0.mlp.gate_up_proj":
            seen["other"] = np.concatenate([x[..., 24:], x[..., :24]], axis=-1)
        if name in ("model.layers.0.mlp.gate", "model.layers.0.mlp.up"):
            x = seen["other"][..., :24] if name.endswith("gate") else seen["other"][..., 24:]
        seen[name] = np.array(x)
        return seen[name]

    gold = testing.golden("gqa")
    npllm.load(gold.folder, ops="reference")(gold.values["input_ids"], tap=tap)
    found = npllm.compare({n: x for n, x in seen.items() if n != "other"}, gold)
    assert {row.op: row.diagnosis for row in found.wrong} == {
        "mlp.gate": "C7 up first",
        "mlp.up": "C7 up first",
    }
