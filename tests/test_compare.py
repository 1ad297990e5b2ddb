"""`npllm.compare` finds the wrong operation of the wrong layer and names what is wrong with it."""

import numpy as np
import planted_runs
import pytest
import tiny

import npllm
from npllm import ops, testing
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.quantized.block_packing import quantize_blocks
from npllm.quantized.int8 import quantize
from npllm.testing import bugs

SEED = 20251126  # of the layers; printed by every case
RIGHT = (
    "mha", "gqa", "mqa", "window", "longrope_short", "longrope_long", "partial_rotary", "tied",
    "llama3_rope",
)  # fmt: skip

# Operation -> the value that each of its calls in a layer makes, in the order of the calls.
MAKES = {
    "rms_norm": ["input_layernorm", "post_attention_layernorm"],
    "linear": ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    "apply_rope": ["self_attn.q", "self_attn.k"],
    "attention": ["self_attn.heads"],
    "swiglu": ["mlp.swiglu"],
}

# Bundle on which a planted bug shows -> the bugs; None: no name of the list is given.
PLANTED = {
    "window": {
        "attention: C10 w + 1 keys": "C10 w + 1 keys",
        "attention: C10 symmetric": "C10 symmetric",
        "attention: C10 ignored": "C10 ignored",
    },
    "partial_rotary": {"apply_rope: C34 i + d_head/2": "C34 i + d_head/2"},
    "mha": {"attention: C22 q and k swapped": "C22 q and k swapped"},
    "gqa": {
        "attention: C8 tile": "C8 tile",
        "attention: C9 one key late": "C9 one key late",
        "attention: C9 not causal": "C9 not causal",
        "attention: C22 k and v swapped": "C22 k and v swapped",
        "attention: C21 omitted": "C21 omitted",
        "attention: C21 twice": "C21",
        "attention: C23 zero tail to 16": "C23 zero tail to 16",
        "attention: C31 inputs position-major": "C31 inputs position-major",
        "attention: C31 output position-major": "C31 output position-major",
        "attention: first head everywhere": None,
        "attention: last rows skipped": None,
        "apply_rope: C1 interleaved": "C1 interleaved",
        "apply_rope: C26 interleaved table, half-split rotation": "C26 interleaved table",
        "apply_rope: C26 half-split table, interleaved rotation": "C26 half-split table",
        "apply_rope: C27 -sin": "C27 -sin",
        "rms_norm: C28 1 + w": "C28 1 + w",
        "rms_norm: C28 twice": "C28 twice",
        "rms_norm: C29 centred": "C29 centred",
        "rms_norm: C29 eps omitted": "C29 eps omitted",
        "rms_norm: C29 sum of squares": "C29 sum of squares",
        "rms_norm: C30 bfloat16 accumulator": "C30 bfloat16 accumulator",
        "rms_norm: n - 1": None,
        "swiglu: C7 up first": "C7 up first",
        "swiglu: C7 interleaved": "C7 interleaved",
        "swiglu: GELU": "GELU in place of SiLU",
        "swiglu: sigmoid": "sigmoid in place of SiLU",
        "linear: inputs rounded to bfloat16": None,
        "linear: last row repeated": None,
        "linear: tail not summed": None,
        "linear: C30 float16 accumulator": "C30 float16 accumulator",
    },
}
PLACES = {"linear: C30 float16 accumulator": [1, 3], "rms_norm: C29 eps omitted": [0]}
SMALL = ("rms_norm: C29 eps omitted",)  # eps shows in small rows, those of the embedding
CASES = [(bundle, key, name) for bundle, found in PLANTED.items() for key, name in found.items()]


@pytest.mark.parametrize(
    "number",  # that each option is named: test_testing_diagnosis.py
    [pytest.param(n, marks=[pytest.mark.slow] * (n % 3 > 0)) for n in range(len(CASES))],
)
def test_a_planted_mistake_is_localised_and_named(number):
    bundle, key, name = CASES[number]
    rng = np.random.default_rng(SEED + number)
    bug, layer = bugs[key], int(rng.integers(2))
    made = MAKES[bug.op]
    place = int(rng.choice(PLACES.get(key, len(made))))
    layer = 0 if key in SMALL else layer
    call = layer * planted_runs.CALLS[bug.op] + place
    print(f"seed {SEED + number}: {key} in layer {layer} {made[place]} of {bundle}")
    values = planted_runs.wrong_run(bundle, bug.op, bug.fn, {call})
    found = npllm.compare(values, testing.golden(bundle))
    assert [row.name for row in found.wrong] == [f"model.layers.{layer}.{made[place]}"], str(found)
    assert found.status == "differs"
    assert found.first_wrong.introduced > 1
    if name is not None:
        assert name in found.first_wrong.diagnosis, str(found)


@pytest.mark.parametrize("bundle", RIGHT)
def test_a_right_run_is_not_accused(bundle):
    for options in ({}, {"ops": "reference"}, {"ops": "reference", "dtype": "float64"}):
        found = npllm.compare(planted_runs.right_run(bundle, **options), testing.golden(bundle))
        assert found.status == "same", str(found)
        assert {row.status for row in found.rows} <= {"within", "amplified"}


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("bundle", RIGHT)
def test_a_right_run_in_16_bits_is_not_accused(bundle, dtype):
    values = planted_runs.right_run(bundle, dtype=dtype, ops=ops.emulate(dtype))
    found = npllm.compare(values, testing.golden(bundle))
    assert found.status == "same", str(found)
    assert f"{dtype}, two roundings" in {row.arithmetic for row in found.rows}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_float32_run_that_is_stored_in_16_bits_is_not_accused(dtype):
    values = planted_runs.right_run("gqa")
    stored = {name: x.astype(npllm.arrays.DTYPES[dtype]) for name, x in values.items()}
    gold = testing.golden("gqa")
    found = npllm.compare(indexed(stored, gold, dtype="float32"), gold)
    assert found.status == "same", str(found)
    stored["model.layers.1.mlp.swiglu"] = stored["model.layers.1.mlp.swiglu"][..., ::-1]
    found = npllm.compare(indexed(stored, gold, dtype="float32"), gold)
    assert [row.name for row in found.wrong] == ["model.layers.1.mlp.swiglu"]


class Indexed(dict):
    """Values with an index."""


def indexed(values, gold, **changes):
    ids = np.asarray(gold.values["input_ids"])
    step = {"input_ids": ids.tolist(), "n_past": 0, "cached": False, "attention_mask": None}
    made = Indexed(values)
    config = npllm.config.strict_json.read_json(gold.folder / "config.json")
    made.index = {"steps": [step], "config": config, "values": {}} | changes
    return made


# ------------------------------------------------------------------ partly recorded


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(n, marks=pytest.mark.slow) for n in range(4, 12))]
)
def test_the_first_recorded_descendant_is_accused(seed):
    rng = np.random.default_rng(SEED + seed)
    print("seed", SEED + seed)
    key = ["swiglu: C7 up first", "attention: C8 tile", "rms_norm: C28 1 + w"][seed % 3]
    bug = bugs[key]
    layer = int(rng.integers(2))
    place = int(rng.integers(planted_runs.CALLS[bug.op]))
    call = layer * planted_runs.CALLS[bug.op] + place
    values = planted_runs.wrong_run("gqa", bug.op, bug.fn, {call})
    right = planted_runs.right_run("gqa", ops="reference")
    names = [name for name in values if rng.random() < 0.4 or name == "lm_head"]
    found = npllm.compare({name: values[name] for name in names}, testing.golden("gqa"))
    wrong = [row.name for row in found.wrong]
    origin = f"model.layers.{layer}.{MAKES[bug.op][place]}"
    differs = [n for n in names if not np.array_equal(values[n], right[n])]
    assert wrong[0] == differs[0], str(found)
    assert list(values).index(wrong[0]) >= list(values).index(origin)
    clean = npllm.compare({name: right[name] for name in names}, testing.golden("gqa"))
    assert clean.status == "same", str(clean)


LAYERS = ("model.layers.0", "model.layers.1", "lm_head")
HIDDEN = {
    "attention: C9 not causal": ({0}, "C9 not causal in self_attn.heads"),
    "rms_norm: C29 centred": ({3}, "C29 centred in post_attention_layernorm"),
    "swiglu: GELU": ({0}, "GELU in place of SiLU (tanh) in mlp.swiglu"),
    "apply_rope: C27 -sin": ({2, 3}, "C27 -sin in self_attn.q and self_attn.k"),
    "linear: C31 weight [d_in, d_out]": ({5}, "C31 weight [d_in, d_out] in self_attn.o_proj"),
}


@pytest.mark.parametrize("key", HIDDEN)
def test_a_mistake_between_the_outputs_of_two_layers_is_named(key):
    calls, says = HIDDEN[key]
    values = planted_runs.wrong_run("gqa", bugs[key].op, bugs[key].fn, calls)
    found = npllm.compare({name: values[name] for name in LAYERS}, testing.golden("gqa"))
    layer = min(calls) // planted_runs.CALLS[bugs[key].op]
    assert [row.name for row in found.wrong] == [f"model.layers.{layer}"]
    assert says in found.first_wrong.diagnosis


def test_logits_alone_are_enough_to_say_whether_a_run_is_right():
    gold = testing.golden("gqa")
    right = planted_runs.right_run("gqa")
    assert npllm.compare({"lm_head": right["lm_head"]}, gold).status == "same"
    bug = bugs["rms_norm: C29 eps outside the root"]
    wrong = planted_runs.wrong_run("gqa", bug.op, bug.fn, {0})
    assert npllm.compare({"lm_head": wrong["lm_head"]}, gold).status == "differs"


# ------------------------------------------------------------------ what is no wrong operation


def test_positions_that_are_shifted_are_harmless():
    gold = testing.golden("gqa")
    model = npllm.load(gold.folder, ops="reference")
    ids = gold.values["input_ids"]
    values = planted_runs.run(model, ids, position_ids=np.arange(ids.shape[1]) + 1)
    found = npllm.compare(values, gold)
    harmless = {row.op for row in found.rows if row.status == "harmless"}
    assert found.status == "same", str(found)
    assert harmless == {
        "model.rotary_emb.cos", "model.rotary_emb.sin", "self_attn.q", "self_attn.k",
    }  # fmt: skip
    assert "C32 position off by one" in {row.diagnosis for row in found.rows}


def test_a_small_mistake_is_wrong_and_not_harmless():
    """eps left out where rows are large: 2.8 budgets, which no reader sees."""
    bug = bugs["rms_norm: C29 eps omitted"]
    found = npllm.compare(planted_runs.wrong_run("gqa", bug.op, bug.fn, {3}), testing.golden("gqa"))
    assert [row.name for row in found.wrong] == ["model.layers.1.post_attention_layernorm"]


def test_positions_that_are_scaled_are_not():
    gold = testing.golden("gqa")
    model = npllm.load(gold.folder, ops="reference")
    ids = gold.values["input_ids"]
    found = npllm.compare(
        planted_runs.run(model, ids, position_ids=2 * np.arange(ids.shape[1])), gold
    )
    assert [row.name for row in found.wrong] == ["model.rotary_emb.cos", "model.rotary_emb.sin"]


def test_a_wrong_input_is_inherited_and_said_once():
    bug = bugs["rms_norm: C28 twice"]
    found = npllm.compare(planted_runs.wrong_run("gqa", bug.op, bug.fn, {0}), testing.golden("gqa"))
    after = found.rows[found.rows.index(found.first_wrong) + 1 :]
    assert {row.status for row in after} <= {"inherited", "amplified", "within"}
    row = next(row for row in after if row.op == "self_attn.qkv_proj")
    assert row.status == "inherited"
    assert row.total > 1e4
    assert row.introduced < 1
    assert row.inherited == pytest.approx(row.total, rel=1e-3)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.swiglu"])
def test_a_value_that_never_flowed_is_a_wrong_capture(name):
    values = planted_runs.right_run("gqa")
    values[name] = values[name] + np.float32(1)
    found = npllm.compare(values, testing.golden("gqa"))
    assert {row.name: row.status for row in found.wrong} == {name: "wrong capture"}


def test_the_last_token_only_is_a_wrong_capture():
    values = planted_runs.right_run("gqa")
    name = "model.layers.1.input_layernorm"
    values[name] = values[name][:, -1:]
    found = npllm.compare(values, testing.golden("gqa"))
    assert {row.name: row.status for row in found.wrong} == {name: "wrong capture"}
    assert "shape [2, 1, 16] for [2, 9, 16]" in found.first_wrong.note


def test_queries_that_were_recorded_before_their_rotation_are_a_wrong_capture():
    values = planted_runs.right_run("gqa")
    for leaf in "qk":
        front = "model.layers.1.self_attn."
        values[front + leaf] = values[f"{front}{leaf}_proj"]
    found = npllm.compare(values, testing.golden("gqa"))
    assert {row.name: row.status for row in found.wrong} == {
        "model.layers.1.self_attn.q": "wrong capture",
        "model.layers.1.self_attn.k": "wrong capture",
    }, str(found)


def test_nan_is_said_first_and_where():
    values = planted_runs.right_run("gqa")
    values["model.layers.1.mlp.down_proj"][1, 3, 5] = np.nan
    values["model.layers.1"][1, 3, 5] = np.nan
    for name in ("model.norm", "lm_head.input", "lm_head"):
        values[name][1, 3] = np.nan
    found = npllm.compare(values, testing.golden("gqa"))
    assert [row.name for row in found.wrong] == ["model.layers.1.mlp.down_proj"]
    assert "1 of 288 entries NaN, first at [1, 3, 5]" in found.first_wrong.note


def test_an_infinity_is_wrong():
    values = planted_runs.right_run("gqa")
    values["model.layers.1.mlp.down_proj"][1, 3, 5] = np.inf
    found = npllm.compare(values, testing.golden("gqa"))
    assert found.first_wrong.name == "model.layers.1.mlp.down_proj"


# ------------------------------------------------------------------ what is compared before values


def test_other_tokens_leave_nothing_to_compare():
    gold = testing.golden("gqa")
    mine = indexed(planted_runs.right_run("gqa"), gold)
    mine.index["steps"][0]["input_ids"][1][4] += 1
    found = npllm.compare(mine, gold)
    assert found.status == "differs"
    assert found.rows == []
    assert "input_ids differ at 1 of 18 positions, first at [1, 4]" in str(found)


def test_names_that_are_missing_and_unknown_are_said():
    values = planted_runs.right_run("gqa")
    del values["model.layers.0.mlp.up"]
    values["h.0.attn"] = values["lm_head"]
    with pytest.warns(UserWarning, match="names that no map knows"):
        text = str(npllm.compare(values, testing.golden("gqa")))
    assert "not recorded: model.layers.0.mlp.up" in text
    assert "left out: h.0.attn" in text


def test_names_that_are_no_text_are_an_error():
    with pytest.raises(NpllmTypeError, match="names of values must be str, got 1"):
        npllm.compare({1: np.zeros((2, 9, 29))}, testing.golden("gqa"))


def test_integers_are_an_error():
    with pytest.raises(NpllmTypeError, match="got int64"):
        npllm.compare({"lm_head": np.zeros((2, 9, 29), np.int64)}, testing.golden("gqa"))


def test_a_config_that_differs_is_said():
    gold = testing.golden("gqa")
    mine = indexed(planted_runs.right_run("gqa"), gold)
    mine.index["config"] = mine.index["config"] | {"rms_norm_eps": 1e-6, "rope_theta": 500.0}
    text = str(npllm.compare(mine, gold))
    assert "C29: config: rms_norm_eps is 1e-06 in mine, 1e-05 in gold" in text
    assert "C25, C3, C4 or C5: config: rope_parameters is {'rope_theta': 500.0}" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": []}, "steps must be a list of at least one"),
        ({"steps": [3]}, "step 0 must be an object"),
        ({"steps": [{"input_ids": [[1], [2, 3]]}]}, "input_ids must be integers"),
        ({"steps": [{"input_ids": [["<script>"]]}]}, "input_ids must be integers"),
        ({"steps": [{"input_ids": [[1]], "n_past": -1}]}, "n_past must be an integer"),
        ({"steps": [{"input_ids": [[1]], "attention_mask": [[1, 1]]}]}, r"must be \[1, 1\]"),
        ({"config": None}, "must hold the content of config.json"),
    ],
)
def test_a_hostile_index_is_an_error(change, message):
    gold = testing.golden("gqa")
    with pytest.raises(NpllmValueError, match=message):
        npllm.compare(gold, indexed(gold.values, gold, **change))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 48}, "hidden_size is 32 in the gold, 48 in the model"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 2 in the gold, 3 in the model"),
        ({"seed": 5}, "model.embed_tokens of the gold is another one"),
    ],
)
def test_weights_that_did_not_make_the_gold_accuse_nothing(changes, says):
    gold = npllm.trace(tiny.model(), tiny.random_ids(1, 5), dtype="float64")
    with pytest.raises(NpllmValueError, match=says):
        npllm.compare(gold, gold, model=tiny.model(**changes))


@pytest.mark.parametrize("bug", [False, True])
def test_weights_in_block_formats_are_widened(bug):
    dense = tiny.model(intermediate_size=64)
    layers = tuple(
        layer._replace(gate_up_proj=quantize_blocks(layer.gate_up_proj, "Q8_0"))
        for layer in dense.params.layers
    )
    table = quantize_blocks(dense.params.embed_tokens, "Q4_1")
    params = dense.params._replace(layers=layers, embed_tokens=table)
    model = npllm.Model(dense.config, params)
    ids = tiny.random_ids(1, 5)
    gold = npllm.trace(model, ids, dtype="float64")
    wrong = {"swiglu": lambda gate, up: ops.swiglu(up, gate)} if bug else {}
    found = npllm.compare(npllm.trace(model.with_ops(**wrong), ids), gold, model=model)
    name = found.first_wrong.name if bug else None
    assert (found.status, name) == (
        ("differs", "model.layers.0.mlp.swiglu") if bug else ("same", None)
    )


def test_a_packed_embedding_is_gathered():
    dense = tiny.model()
    table = quantize(dense.params.embed_tokens)
    model = npllm.Model(dense.config, dense.params._replace(embed_tokens=table))
    ids = tiny.random_ids(1, 5)
    gold = npllm.trace(model, ids, dtype="float64")
    assert npllm.compare(npllm.trace(model, ids), gold, model=model).status == "same"
    wrong = dict(npllm.trace(model, ids)) | {"lm_head": 2 * gold["lm_head"]}
    assert npllm.compare(wrong, gold, model=model).first_wrong.name == "lm_head"
