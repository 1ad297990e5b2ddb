"""Cached steps use the run's own past; padding is not judged; packed documents are kept apart."""

import family
import numpy as np
import planted_runs
import pytest
import tiny

import npllm
from npllm import ops
from npllm.errors import NpllmOSError
from npllm.testing import bugs

IDS = tiny.random_ids(2, 7, seed=5)
N_NEW = 2


class Run(dict):
    """Recorded values with an index."""


def steps_of(model, ids=IDS, valid=None, n_new=N_NEW):
    """A prefill and decode steps with a cache, recorded by a tap; always the same tokens."""
    values, steps, cache = Run(), [], model.new_cache(len(ids))
    valid = np.ones(ids.shape, int) if valid is None else valid
    more = tiny.random_ids(len(ids), n_new, seed=6)
    for t in range(n_new + 1):
        new = ids if t == 0 else more[:, t - 1 : t]
        valid = valid if t == 0 else np.pad(valid, ((0, 0), (0, 1)), constant_values=1)
        found = planted_runs.run(model, new, cache=cache, attention_mask=valid)
        values |= {name + (f"@{t}" if t else ""): x for name, x in found.items()}
        n_past = valid.shape[1] - new.shape[1]
        positions = np.maximum(np.cumsum(valid, 1) - 1, 0)[:, n_past:]
        steps.append({"input_ids": new.tolist(), "attention_mask": valid.tolist()})
        steps[-1] |= {"n_past": n_past, "cached": True, "position_ids": positions.tolist()}
    values.index = {"steps": steps, "config": tiny.config_dict(), "values": {}}
    return values


def both(changes=None, wrong=None, **options):
    """A float32 run, with an operation that is wrong in some calls; its gold and its model."""
    changes = changes or {}
    model = tiny.model(ops="reference", **changes)
    gold = steps_of(tiny.model(ops="reference", dtype=np.float64, **changes), **options)
    gold.index["config"] = tiny.config_dict(**changes)
    if wrong is not None:
        op, fn, calls = wrong
        right = getattr(ops.reference, op)
        one = ops.reference.replace(**{op: planted_runs.once(right, fn, calls)})
        model = tiny.model(ops=one, **changes)
    mine = steps_of(model, **options)
    mine.index["config"] = gold.index["config"]
    return mine, gold, tiny.model(**changes)


LEFT = np.array([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])
SETTINGS = {
    "cached": {},
    "left-padded": {"valid": LEFT},
    "window": {"changes": {"sliding_window": 4}},
    "window and padding": {"changes": {"sliding_window": 4}, "valid": LEFT},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_right_run_is_not_accused(setting):
    mine, gold, model = both(**SETTINGS[setting])
    found = npllm.compare(mine, gold, model=model)
    assert found.status == "same", str(found)
    assert {row.step for row in found.rows} == {0, 1, 2}
    assert {row.status for row in found.rows} <= {"within", "amplified"}


MISTAKES = {
    "swiglu: C7 up first": ("mlp.swiglu", [0, 1, 2]),
    "attention: C8 tile": ("self_attn.heads", [0, 1, 2]),
    "attention: C32 one slot early": ("self_attn.heads", [1, 2]),
    "apply_rope: C27 -sin": ("self_attn.q", [0, 1, 2]),
}


CASES = [(key, made, step) for key, (made, steps) in MISTAKES.items() for step in steps]


@pytest.mark.parametrize(
    ("setting", "key", "made", "step"),
    [
        pytest.param(setting, *case, marks=[] if (n + m) % 2 == 0 else pytest.mark.slow)
        for n, setting in enumerate(SETTINGS)
        for m, case in enumerate(CASES)
    ],
)
def test_a_mistake_in_one_step_is_found_there(setting, key, made, step):
    bug = bugs[key]
    call = (2 * step + 1) * planted_runs.CALLS[bug.op]
    wrong = (bug.op, bug.fn, {call})
    found = npllm.compare(*both(wrong=wrong, **SETTINGS[setting])[:2], model=tiny_model(setting))
    name = f"model.layers.1.{made}" + (f"@{step}" if step else "")
    assert [row.name for row in found.wrong] == [name], str(found)
    assert key.split(": ")[1] in found.first_wrong.diagnosis


def tiny_model(setting):
    return tiny.model(**SETTINGS[setting].get("changes", {}))


def test_a_cache_that_holds_other_rows_is_the_wrong_op():
    """With our past in place of theirs the next layer would be accused."""
    mine, gold, model = both()
    name = "model.layers.1.self_attn.cached_k@1"
    spoiled = mine[name].copy()
    spoiled[:, :, :-1] = np.roll(spoiled[:, :, :-1], 1, axis=0)
    mine[name] = spoiled
    right = model
    found = npllm.compare(mine, gold, model=right)
    assert found.first_wrong.name == name
    assert found.first_wrong.status == "wrong capture", "what attention computed is right"


def test_a_cache_that_flows_wrongly_is_named():
    front = "model.layers.1.self_attn.cached_"

    def spoil(name, x):
        if name.startswith(front) and x.shape[-2] == len(IDS[0]) + 1:
            x = x.copy()
            x[:, :, :-1] = np.roll(x[:, :, :-1], 1, axis=0)
        return x

    _, gold, model = both()
    mine = steps_of(Tapped(tiny.model(ops="reference"), spoil))
    mine.index["config"] = gold.index["config"]
    found = npllm.compare(mine, gold, model=model)
    assert [(row.name, row.diagnosis) for row in found.wrong] == [
        (front + "k@1", "C32 another request's rows"),
        (front + "v@1", "C32 another request's rows"),
    ], str(found)


class Tapped:
    """A model in which a tap changes values before another sees them."""

    def __init__(self, model, change):
        self.model, self.change, self.new_cache = model, change, model.new_cache

    def __call__(self, ids, *, tap, **options):
        return self.model(ids, tap=lambda name, x: tap(name, self.change(name, x)), **options)


def test_a_past_that_was_not_recorded_is_computed_from_the_keys():
    mine, gold, model = both(wrong=("swiglu", bugs["swiglu: C7 up first"].fn, {3}))
    kept = Run({name: x for name, x in mine.items() if ".cached_" not in name})
    kept.index = mine.index
    found = npllm.compare(kept, gold, model=model)
    assert [row.name for row in found.wrong] == ["model.layers.1.mlp.swiglu@1"]


def test_a_past_that_nobody_recorded_is_not_decidable():
    mine, gold, model = both()
    step = mine.index["steps"][1]
    cut, right = Run(), Run()
    for run, source in ((cut, mine), (right, gold)):
        run |= {n.removesuffix("@1"): x for n, x in source.items() if n.endswith("@1")}
        run.index = source.index | {"steps": [step]}
    found = npllm.compare(cut, right, model=model)
    states = {row.op: row.status for row in found.rows if row.layer == 0}
    assert states["self_attn.cached_k"] == "not decidable"
    assert states["self_attn.heads"] == "within"
    assert found.status == "same"


def test_padding_may_hold_anything():
    mine, gold, model = both(valid=LEFT)
    for name, x in mine.items():
        if "@" not in name and x.ndim == 3 and x.shape[1] == 7:
            x[1, :3] = np.nan
    assert npllm.compare(mine, gold, model=model).status == "same"
    mine["model.layers.0.mlp.swiglu"][1, 3] = np.nan
    assert npllm.compare(mine, gold, model=model).status == "differs"


def test_columns_as_positions_are_said():
    mine, gold, model = both(valid=LEFT)
    mine.index["steps"][0]["position_ids"] = [list(range(7))] * 2
    text = str(npllm.compare(mine, gold, model=model))
    assert "C18 column index: position_ids differ in row 1: mine 0, 1, 2, 3 ..." in text
    assert "all by 3, which changes q and k and no score" in text


# ------------------------------------------------------------------ packed rows

POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2]])


def packed(model, **options):
    values = Run(planted_runs.run(model, IDS[:1], position_ids=POSITIONS, **options))
    step = {"input_ids": IDS[:1].tolist(), "position_ids": POSITIONS.tolist(), "n_past": 0}
    values.index = {"steps": [step | {"cached": False, "attention_mask": None}], "values": {}}
    values.index["config"] = tiny.config_dict()
    return values


@pytest.mark.parametrize("is_apart", [True, False])
def test_documents_are_apart_where_the_gold_keeps_them_apart(is_apart):
    labels = np.array([[0, 0, 0, 0, 1, 1, 1]])
    rule = ops.mask.causal() & ops.mask.documents(labels)
    rules = [rule, ops.mask.causal()] if is_apart else [ops.mask.causal(), rule]
    models = [tiny.model(ops="reference", dtype=np.float64), tiny.model(ops="reference")]
    gold = packed(models[0].with_mask(rules[0]))
    right = packed(models[1].with_mask(rules[0]))
    wrong = packed(models[1].with_mask(rules[1]))
    assert npllm.compare(right, gold, model=tiny.model()).status == "same"
    found = npllm.compare(wrong, gold, model=tiny.model())
    assert {row.op for row in found.wrong} == {"self_attn.heads"}
    if is_apart:
        assert {row.diagnosis for row in found.wrong} == {"C19 no document mask"}


def test_a_cache_that_is_computed_anew_is_not_accused():
    """LongRoPE: with the ninth token every key gets the long factors."""
    model = family.model(family.longrope(8), dtype="float32")
    ids = tiny.random_ids(1, 7)
    gold = npllm.trace(model, ids, dtype="float64", max_new_tokens=3)
    found = npllm.compare(npllm.trace(model, ids, max_new_tokens=3), gold, model=model)
    assert found.status == "same", str(found)
    open_ones = {row.name for row in found.rows if row.status == "not decidable"}
    assert open_ones == {
        f"model.layers.{n}.self_attn.cached_{x}@2"
        for n in range(len(model.params.layers))
        for x in "kv"
    }


def test_a_trace_without_its_index_is_incomplete(tmp_path):
    model = tiny.model()
    gold = npllm.trace(model, IDS, dtype="float64")
    npllm.trace(model, IDS, folder=tmp_path / "mine")
    (tmp_path / "mine" / "index.json").unlink()
    with pytest.raises(NpllmOSError, match=r"no index\.json: it is incomplete"):
        npllm.compare(tmp_path / "mine", gold, model=model)
