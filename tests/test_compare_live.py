"""Mistakes planted in a Transformers model are found by `npllm.compare`: layer, operation, name.

The layer, the wrong option and the mode are drawn; NPLLM_PLANT_SEED draws others.  `pytest -s` shows
the table.
"""

import contextlib
import copy
import os

import numpy as np
import pytest
import tiny

import npllm
from npllm import ops
from npllm.tracing.comparison.compare import compare

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
planted = pytest.importorskip("planted_in_transformers")
pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]

SEED = int(os.environ.get("NPLLM_PLANT_SEED", "19"))
KINDS = list(getattr(planted, "KINDS", ()))
table = []


@pytest.fixture(scope="module", autouse=True)
def _report():
    yield
    print(f"\nNPLLM_PLANT_SEED={SEED}")
    for row in table:
        print(" | ".join(f"{cell:{width}}" for cell, width in zip(row, WIDTHS, strict=True)))


WIDTHS = (46, 13, 4, 24, 8, 28, 0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same random weights as our model and as Transformers', by config."""
    made = {}

    def pair(config):
        key = repr(config)
        if key not in made:
            weights = tiny.weights(tiny.config_dict(**config))
            folder = tiny.write_folder(tmp_path_factory.mktemp("m"), tensors=weights, **config)
            load = transformers.AutoModelForCausalLM.from_pretrained
            theirs = load(folder, attn_implementation="eager", dtype=torch.float32).eval()
            made[key] = npllm.load(folder), theirs
        return made[key]

    return pair


@pytest.fixture(scope="module")
def golds(models):
    """npllm's float64 trace, by config and mode."""
    made = {}

    def gold(config, mode):
        key = repr(config), mode
        if key not in made:
            ours, run = models(config)[0], planted.run_of(mode)
            if run.labels is not None:
                apart = ops.mask.documents(run.labels)
                rules = [ours.mask_rule(n) & apart for n in range(ours.config.num_hidden_layers)]
                ours = ours.with_mask(rules)
            made[key] = npllm.trace(
                ours,
                run.ids,
                dtype="float64",
                attention_mask=run.mask,
                position_ids=run.positions,
                max_new_tokens=run.n_new,
            )
        return made[key]

    return gold


def recorded(theirs, mode, gold, by_column=False):
    """Transformers' run, on the tokens of the gold."""
    from npllm.tracing.recorders.torch_recorder import record

    run = planted.run_of(mode)
    options = {}
    if run.n_new:
        new = [step["input_ids"] for step in gold.index["steps"][1:]]
        options["new_ids"] = torch.tensor(np.concatenate(new, axis=1))
    if run.positions is not None and not by_column:
        options["position_ids"] = torch.tensor(run.positions)
    if run.mask is not None:
        options["attention_mask"] = torch.tensor(run.mask)
    return record(theirs, torch.tensor(run.ids), **options)


# What one mistake makes wrong at once.
BESIDE = {
    "model.rotary_emb.cos": ["model.rotary_emb.sin"],
    "self_attn.q": ["self_attn.k"],
    "self_attn.q_proj": ["self_attn.k_proj", "self_attn.v"],
    "self_attn.k_proj": ["self_attn.v"],
    "self_attn.cached_k": ["self_attn.cached_v"],
    "mlp.gate": ["mlp.up"],
}


def check(models, golds, mistake, mode, number):
    """Plant, record, compare; a row of the table, and what is not as it should be."""
    ours, theirs = models(mistake.config)
    gold = golds(mistake.config, mode)
    by_column = mistake.kind == "C18"
    with contextlib.ExitStack() as stack:
        planted.plant(mistake, theirs, number, stack)
        mine = recorded(theirs, mode, gold, by_column)
    found = compare(mine, gold, model=ours)
    first = found.first_wrong
    layer = number if mistake.layer else None
    said = (
        (first.layer, first.op, first.diagnosis) if first else (None, "-", "; ".join(found.notes))
    )
    wanted = f"{mistake.kind} {mistake.option}".strip()
    table.append((wanted, mode, str(layer), "/".join(mistake.op), str(said[0]), said[1], said[2]))
    if by_column:
        right = first is None and "C18 column index" in said[2]
    else:
        right = said[0] == layer and said[1] in mistake.op and mistake.name in said[2]
    allowed = {*mistake.op, *(other for op in mistake.op for other in BESIDE.get(op, ()))}
    others = [row.name for row in found.wrong if row.layer != layer or row.op not in allowed]
    right = right and not others
    return "" if right else f"{table[-1]}\nwanted {mistake.name!r}, accused also {others}\n{found}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_mistake_is_found_and_named(models, golds, kind):
    rng = np.random.default_rng([SEED, KINDS.index(kind)])
    mistake = planted.KINDS[kind][rng.integers(len(planted.KINDS[kind]))]
    mode = mistake.modes[rng.integers(len(mistake.modes))]
    wrong = check(models, golds, mistake, mode, int(rng.integers(3)))
    assert not wrong, wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_option_is_found_in_every_mode(models, golds, kind):
    rng = np.random.default_rng([SEED, KINDS.index(kind)])
    wrong = [
        check(models, golds, mistake, mode, int(rng.integers(3)))
        for mistake in planted.KINDS[kind]
        for mode in mistake.modes
    ]
    wrong = [text for text in wrong if text]
    assert not wrong, "\n\n".join(wrong)


def test_there_are_25_mistakes():
    assert len(KINDS) >= 25


CONFIGS = ("BASE", "BIASES", "LONG", "PARTIAL", "WINDOW")


@pytest.mark.parametrize("mode", ["prefill", "cached", "padded", "padded cached", "packed", "far"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_right_run_is_not_accused(models, golds, config, mode):
    config = getattr(planted, config)
    if mode == "far" and config["max_position_embeddings"] < 2000:
        pytest.skip("positions do not fit")
    ours, theirs = models(config)
    gold = golds(config, mode)
    found = compare(recorded(theirs, mode, gold), gold, model=ours)
    assert found.first_wrong is None, str(found)
    assert found.status == "same"


@pytest.mark.parametrize("mode", ["prefill", "cached", "padded", "packed"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_right_run_in_16_bits_is_not_accused(models, golds, dtype, attention, mode):
    """Transformers rounds twice in RMSNorm and SwiGLU: the level is said, no operation is accused."""
    ours, theirs = models(planted.BASE)
    gold = golds(planted.BASE, mode)
    theirs = copy.deepcopy(theirs).to(getattr(torch, dtype))
    theirs.set_attn_implementation(attention)
    found = compare(recorded(theirs, mode, gold), gold, model=ours)
    assert found.first_wrong is None, str(found)
    assert found.status == "same"
    said = {row.arithmetic for row in found.rows if row.op.endswith(("norm", "swiglu"))}
    assert any("two roundings" in text for text in said), said
