"""The family beside Hugging Face Transformers, eager attention in float32, with the same random
weights.

NPLLM_REQUIRE_LIVE=1 makes it an error that torch or Transformers is missing.
"""

import copy
import os

import family
import numpy as np
import pytest
import tiny
from close import close

import npllm
from npllm.models import rope

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]

try:
    import torch
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
except ImportError as error:
    if os.environ.get("NPLLM_REQUIRE_LIVE") == "1":
        raise
    pytest.skip(f"Transformers is not installed ({error})", allow_module_level=True)

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)  # tiny matrices
CONFIGS = family.Configs(
    {name: family.scaled(content) for name, content in family.real_configs().items()}
)


def _factors(content):
    return content["rope_scaling"]["short_factor"], content["rope_scaling"]["long_factor"]


LONGROPE = {name: content for name, content in CONFIGS.items() if content["rope_scaling"]}
SWITCHING = [
    name for name, content in LONGROPE.items() if len({*map(tuple, _factors(content))}) == 2
]
LIVE = 2  # times 5e-6, the tolerance of float32: 1e-5 of the largest logit
worst = {}


@pytest.fixture(scope="module", autouse=True)
def _report():
    """Show the largest difference of each model, relative to its largest logit (pytest -s)."""
    yield
    for name, error in worst.items():
        print(f"\n{name}: {error:.1e}", end="")


def _same(ours, theirs, name):
    """Within 1e-5 of the largest logit."""
    theirs = theirs if isinstance(theirs, np.ndarray) else theirs.detach().numpy()
    worst[name] = max(worst.get(name, 0), float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
    close(np.asarray(ours), theirs, times=LIVE)


def _pair(folder, content, weights=None):
    """The same folder as Transformers' model and as ours; su is spelled longrope for Transformers."""
    weights = family.tensors(content) if weights is None else weights
    family.write(folder / "theirs", family.renamed(content), weights)
    auto = {
        "lm": "AutoModelForCausalLM",
        "sequence": "AutoModelForSequenceClassification",
        "token": "AutoModelForTokenClassification",
    }
    ours = npllm.load(family.write(folder / "ours", content, weights))
    theirs, lacks = getattr(transformers, auto[ours.config.head]).from_pretrained(
        folder / "theirs",
        attn_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(lacks.values()), f"Transformers expects other tensors: {lacks}"
    return ours, theirs.eval()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = {}

    def pair(name):
        if name not in made:
            made[name] = _pair(tmp_path_factory.mktemp("live"), CONFIGS[name])
        return made[name]

    return pair


def _logits(model, ids, mask=None, **options):
    """Transformers' logits; with a mask, positions are counted along it, as its own generate does."""
    with torch.no_grad():
        if mask is not None:
            options |= {
                "attention_mask": torch.tensor(mask),
                "position_ids": torch.tensor(np.maximum(mask.cumsum(1) - 1, 0)),
            }
        return model(torch.tensor(ids), **options).logits.numpy()


def _generated(model, ids, n_new, mask=None):
    with torch.no_grad():
        mask = np.ones_like(ids) if mask is None else mask
        out = model.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=n_new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences.numpy(), np.stack([step.numpy() for step in out.logits], axis=1)


def _last_at(model, ids, length):
    """Last logits of one row, computed anew at that length."""
    return _logits(model, ids[:, :length])[0, -1]


# ----------------------------------------------------------------------------------------------------------- the real configs


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_of_a_scaled_real_config(pairs, name):
    """Every position, on both sides of the longrope switch; the tree of modules as well (spec 8.7
    ... 8.11).
    """
    ours, theirs = pairs(name)
    trial = family.Trial(CONFIGS[name])
    for n in (20, trial.ids.shape[1]):
        _same(ours(trial.ids[:, :n]), _logits(theirs, trial.ids[:, :n]), name)
    if "pad_token_id" in CONFIGS[name]:
        assert str(ours) == str(theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decode_of_a_scaled_real_config(pairs, name):
    """Over the window and over the switch: a cached call's last logits are Transformers' for the
    whole at that length.
    """
    ours, theirs = pairs(name)
    trial, cache, start = family.Trial(CONFIGS[name]), ours.new_cache(), 0
    for n in trial.calls:
        last = ours(trial.ids[:, start : start + n], cache=cache)[0, -1]
        start += n
        _same(last, _last_at(theirs, trial.ids, start), name)
    assert start == trial.ids.shape[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_of_transformers_gives_the_same_below_the_switch(pairs, name):
    """Its sliding cache and ours, call by call, all positions (spec 8.24)."""
    ours, theirs = pairs(name)
    trial, cache, start, past = family.Trial(CONFIGS[name]), ours.new_cache(), 0, None
    for n in trial.calls:
        if start + n > 32:
            break
        part = trial.ids[:, start : start + n]
        with torch.no_grad():
            out = theirs(torch.tensor(part), past_key_values=past, use_cache=True)
        past, start = out.past_key_values, start + n
        _same(ours(part, cache=cache), out.logits, name)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_generate_of_a_scaled_real_config(pairs, name):
    """Over the window and over the switch; the scores first, and the tokens because no two scores
    are near each other.
    """
    ours, theirs = pairs(name)
    trial = family.Trial(CONFIGS[name])
    sequence, logits = _generated(theirs, trial.prompt, trial.n_new)
    # on the definitions, whose phases are float32 as Transformers': those of the fast sets are
    # float64, and once, of phi-3-mini-128k, Transformers is off by 1.1e-5 and the fast set by 4e-6
    plain = npllm.Model(ours.config, ours.params, ops=npllm.ops.reference)
    cache, new = plain.new_cache(), sequence[:, : trial.prompt.shape[1]]
    for step in range(logits.shape[1]):
        _same(plain(new, cache=cache, logits_to_keep=1)[:, -1], logits[:, step], name)
        new = sequence[:, trial.prompt.shape[1] + step :][:, :1]
    assert family.margin(logits) > 1e-4 * np.abs(logits).max()
    close(ours.generate(trial.prompt, max_new_tokens=trial.n_new), sequence)


@pytest.mark.parametrize("name", CONFIGS)
def test_left_padding_of_a_scaled_real_config(pairs, name):
    """Where a row holds tokens (spec 8.25, 8.26); then five tokens more with a cache, and greedy
    generate, below the switch.
    """
    ours, theirs = pairs(name)
    trial = family.Trial(CONFIGS[name])
    here = trial.mask == 1
    # on the definitions, whose sums are nearest to Transformers': of Phi-4-mini's short row float32
    # runs differ by up to 1.4e-5
    plain = npllm.Model(ours.config, ours.params, ops=npllm.ops.reference)
    _same(
        plain(trial.rows, attention_mask=trial.mask)[here],
        _logits(theirs, trial.rows, trial.mask)[here],
        name,
    )
    cache = ours.new_cache(2)
    for stop in (12, 17, 18, 19, 20):
        last = ours(
            trial.rows[:, cache.n_ctx : stop], attention_mask=trial.mask[:, :stop], cache=cache
        )[:, -1]
        _same(last, _logits(theirs, trial.rows[:, :stop], trial.mask[:, :stop])[:, -1], name)
    sequence, logits = _generated(theirs, trial.rows, 10, trial.mask)
    ours_generated = ours.generate(trial.rows, attention_mask=trial.mask, max_new_tokens=10)
    assert family.margin(logits) > 1e-4 * np.abs(logits).max()
    fill = ours.generation_config.pad_token_id
    if (
        fill is not None
    ):  # Transformers fills ended rows with the first stop id where there is no pad id, and so do we
        assert (
            fill == theirs.generation_config.pad_token_id
            or theirs.generation_config.pad_token_id is None
        )
    close(ours_generated, sequence)


# -------------------------------------------------------------------------------------------------- where we differ on purpose


@pytest.mark.parametrize(
    "name", [name for name, content in CONFIGS.items() if family.renamed(content) != content]
)
def test_transformers_fails_on_a_su_file_and_we_read_it_as_longrope(tmp_path, name):
    """spec 8.30."""
    folder = family.write(tmp_path, CONFIGS[name])
    with pytest.raises(KeyError):
        transformers.AutoConfig.from_pretrained(folder)
    ids = family.Trial(CONFIGS[name]).ids
    close(npllm.load(folder)(ids), family.load(family.renamed(CONFIGS[name]))(ids), times=0)


@pytest.mark.parametrize("name", SWITCHING)
def test_a_raw_cache_over_the_switch_differs_and_ours_is_transformers_full_recompute(pairs, name):
    """spec 8.15: keys rotated short, query long; we compute the row anew."""
    ours, theirs = pairs(name)
    ids, cache = family.Trial(CONFIGS[name]).ids, ours.new_cache()
    with torch.no_grad():
        past = theirs(torch.tensor(ids[:, :32]), use_cache=True).past_key_values
        raw = theirs(torch.tensor(ids[:, 32:33]), past_key_values=past).logits[0, -1].numpy()
    whole = _last_at(theirs, ids, 33)
    ours(ids[:, :32], cache=cache)
    _same(ours(ids[:, 32:33], cache=cache)[0, -1], whole, name)
    assert np.abs(raw - whole).max() > 1e-2 * np.abs(whole).max()


@pytest.mark.parametrize("name", SWITCHING)
def test_a_short_row_beside_a_long_one_keeps_its_own_factors(pairs, name):
    """spec 8.19: Transformers lets the longest row choose for all; each of our rows is what it is
    alone, there and here.
    """
    ours, theirs = pairs(name)
    content = CONFIGS[name]
    rows = [family.ids_of(ours.config, n, seed=n) for n in (40, 9)]
    ids, mask = family.padded(rows, content["pad_token_id"] or 0)
    together, batch = ours(ids, attention_mask=mask), _logits(theirs, ids, mask)
    for row, mine, other in zip(rows, together, batch, strict=True):
        alone = _logits(theirs, row[None])[0]
        _same(mine[-len(row) :], alone, name)
        beside = np.abs(other[-len(row) :] - alone).max() / np.abs(alone).max()
        assert beside < 1e-5 if len(row) > 32 else beside > 1e-2


@pytest.mark.parametrize("name", SWITCHING)
def test_a_left_padded_row_that_crosses_is_the_unpadded_one(pairs, name):
    """spec 8.18: Transformers compares the padded length, so its cache keeps short keys; ours is
    its own unpadded full run.
    """
    ours, theirs = pairs(name)
    row = family.ids_of(ours.config, 30, seed=5)
    ids, mask = family.padded([row, [3] * 34], CONFIGS[name]["pad_token_id"] or 0)
    ids, mask = ids[:1], mask[:1]
    sequence, logits = _generated(theirs, ids, 8, mask)
    tokens, cache, new = sequence[0, 4:], ours.new_cache(), ids
    theirs_apart = 0.0
    for step in range(logits.shape[1]):
        last = ours(
            new, attention_mask=np.pad(mask, ((0, 0), (0, step)), constant_values=1), cache=cache
        )[0, -1]
        alone = _last_at(theirs, tokens[None], 30 + step)
        _same(last, alone, name)
        theirs_apart = max(
            theirs_apart, np.abs(logits[0, step] - alone).max() / np.abs(alone).max()
        )
        new = sequence[:, 34 + step : 35 + step]
    assert theirs_apart > 1e-2


@pytest.mark.parametrize("name", sorted(set(LONGROPE) - set(SWITCHING)))
def test_factors_that_are_alike_make_the_switch_invisible(pairs, name):
    """Phi-4-mini-reasoning: short_factor equals long_factor, so that a raw cache is right as well."""
    ours, theirs = pairs(name)
    ids = family.Trial(CONFIGS[name]).ids
    with torch.no_grad():
        past = theirs(torch.tensor(ids[:, :32]), use_cache=True).past_key_values
        raw = theirs(torch.tensor(ids[:, 32:33]), past_key_values=past).logits[0, -1]
    _same(ours(ids[:, :33])[0, -1], raw, name)


def test_raw_forward_flips_back_to_short_after_a_long_input(pairs):
    """spec 8.16: in Transformers and here."""
    ours, theirs = pairs("Phi-3.5-mini-instruct")
    ids = family.Trial(CONFIGS["Phi-3.5-mini-instruct"]).ids
    for n in (40, 10, 33, 32):
        _same(ours(ids[:, :n]), _logits(theirs, ids[:, :n]), "Phi-3.5-mini-instruct")


@pytest.mark.parametrize(
    "positions",
    [np.arange(7, 17)[None], np.stack([np.arange(10), np.arange(3, 13)]), np.arange(30, 40)[None]],
)
def test_explicit_positions(pairs, positions):
    """spec 8.21: where both rows are on one side of the switch."""
    ours, theirs = pairs("Phi-4-mini-instruct")
    ids = family.ids_of(ours.config, (len(positions), 10), seed=6)
    _same(
        ours(ids, position_ids=positions),
        _logits(theirs, ids, position_ids=torch.tensor(positions)),
        "explicit positions",
    )


@pytest.mark.parametrize(
    "changes",
    [{"factor": 4.0}, {"attention_factor": 1.25}, {"attention_factor": 1.25, "factor": 4.0}],
)
def test_factors_given_in_the_file(tmp_path, changes):
    """spec 8.20."""
    content = CONFIGS["Phi-3.5-mini-instruct"]
    content = content | {"rope_scaling": content["rope_scaling"] | changes}
    ours, theirs = _pair(tmp_path, content)
    ids = family.Trial(content).ids
    _same(ours(ids), _logits(theirs, ids), "given factors")


def test_new_spelling_of_the_rope_parameters(tmp_path):
    """spec 8.30: what Transformers 5 saves, both `type` and `rope_type` in it, is what we load."""
    content = CONFIGS["Phi-4-mini-instruct"]
    ours, theirs = _pair(tmp_path, content)
    theirs.save_pretrained(tmp_path / "saved")
    assert "rope_parameters" in (tmp_path / "saved" / "config.json").read_text()
    ids = family.Trial(content).ids
    close(npllm.load(tmp_path / "saved")(ids), ours(ids), times=0)


@pytest.mark.parametrize("name", ["Phi-4-mini-instruct", "phi-4"])
def test_shards_that_transformers_wrote(pairs, tmp_path, name):
    """spec 8.11, 8.13: an index and several files, the output matrix left out where it is tied."""
    ours, theirs = pairs(name)
    theirs.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ids = family.Trial(CONFIGS[name]).ids
    close(npllm.load(tmp_path)(ids), ours(ids), times=0)


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"])
def test_weights_stored_in_16_bits_are_computed_in_float32(tmp_path, dtype):
    """spec 8.13: against Transformers with the same weights widened."""
    content = CONFIGS["yujiepan-phi-3-tiny-random"]
    dtype = tiny.DTYPES["BF16"] if dtype == "bfloat16" else dtype
    weights = family.tensors(content, dtype=dtype)
    ours, theirs = _pair(tmp_path, content | {"torch_dtype": np.dtype(dtype).name}, weights)
    ids = family.Trial(content).ids
    _same(ours(ids), _logits(theirs, ids), f"stored as {np.dtype(dtype).name}")


# ------------------------------------------------------------------------------------------------------------- frequencies


@pytest.mark.parametrize("position", [4095, 131071])
@pytest.mark.parametrize(
    "name",
    [name for name, content in family.real_configs().items() if family.renamed(content) == content],
)
def test_cos_and_sin_of_a_real_config_equal_torchs(name, position):
    """spec 8.3: within 1e-5 at position 4095 and 1e-4 at 131071, less where a frequency is one unit
    of its last place off.
    """
    content = family.real_configs()[name]
    config, theirs = npllm.Config.from_json(content), transformers.Phi3Config(**content)
    module = transformers.models.phi3.modeling_phi3.Phi3RotaryEmbedding(theirs)
    cos, sin = (x.detach().numpy()[0] for x in module(torch.zeros(1), torch.tensor([[position]])))
    inv_freq = rope.frequencies(config, rope.frequency_choice(config, position + 1))
    ours = npllm.ops.rope_tables(np.array([position]), inv_freq, rope.attention_factor(config))
    exact = np.tile(inv_freq == module.inv_freq.numpy(), 2)
    assert np.count_nonzero(~exact) <= 2
    for mine, other in zip(ours, (cos, sin), strict=True):
        error = np.abs(mine - other)[0]
        assert error[exact].max() < (1e-5 if position == 4095 else 1e-4)
        assert error.max() < 1e-7 * position


# -------------------------------------------------------------------------------------------------------------------- Llama

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMAS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "no head_dim": {"head_dim": None},
    "llama3": {"rope_scaling": LLAMA3},
    "llama3 tied": {"rope_scaling": LLAMA3, "tie_word_embeddings": True, "head_dim": 16},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "a rotated part that has no effect": {"partial_rotary_factor": 0.5},
    "dynamic": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
        "max_position_embeddings": 16,
        "rope_theta": 10000.0,
    },
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "rope_theta": 10000.0,
    },
    "yarn not truncated": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "truncate": False,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "mscale": 0.7,
            "mscale_all_dim": 0.3,
        },
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
    },
    "longrope": {
        "rope_scaling": {
            "rope_type": "longrope",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        }
    },
}


@pytest.mark.parametrize("name", LLAMAS)
def test_llama_folders(tmp_path, name):
    """spec 8.53: prefill, cached decode over the switch of dynamic and longrope, greedy generate,
    the tree of modules.
    """
    content = LLAMA | LLAMAS[name]
    content = {key: value for key, value in content.items() if value is not None}
    ours, theirs = _pair(tmp_path, content)
    ids, cache, name = family.ids_of(ours.config, (1, 40)), ours.new_cache(), f"llama, {name}"
    for n in (12, 40):
        _same(ours(ids[:, :n]), _logits(theirs, ids[:, :n]), name)
    start = 0
    for n in (10, 1, 5, 1, 1, 12, 1, 9):
        last = ours(ids[:, start : start + n], cache=cache)[0, -1]
        start += n
        _same(last, _last_at(theirs, ids, start), name)
    sequence, logits = _generated(theirs, ids[:, :10], 5)
    assert family.margin(logits) > 1e-4 * np.abs(logits).max() and str(ours) == str(theirs)
    close(ours.generate(ids[:, :10], max_new_tokens=5), sequence)


@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "llama3", "longrope"])
def test_a_rotated_part_of_llama_heads_fails_on_both_sides(name):
    content = {
        key: value
        for key, value in (LLAMA | LLAMAS[name] | {"partial_rotary_factor": 0.5}).items()
        if value is not None
    }
    with pytest.raises(
        npllm.NpllmError,
        match=f"partial_rotary_factor must be 1 for model_type llama and rope_type {name}, got 0.5",
    ):
        npllm.Config.from_json(content)
    with pytest.raises(
        RuntimeError, match="must match the size"
    ):  # a copy: Transformers writes into rope_scaling
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**copy.deepcopy(content)))(
            torch.tensor([[5, 6]])
        )


@pytest.mark.parametrize(
    ("original", "factor", "theta", "d_head"),
    [(8192, 8.0, 500000.0, 128), (8192, 32.0, 500000.0, 64)],
)
def test_llama3_frequencies_of_the_published_models(original, factor, theta, d_head):
    """spec 8.53: Llama 3.1 and 3.2, within one unit of the last place but for two entries."""
    scaling = LLAMA3 | {"original_max_position_embeddings": original, "factor": factor}
    content = LLAMA | {
        "rope_theta": theta,
        "head_dim": d_head,
        "max_position_embeddings": 131072,
        "rope_scaling": scaling,
    }
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](transformers.LlamaConfig(**content), "cpu")
    ours = rope.frequencies(npllm.Config.from_json(content), 0)
    apart = np.abs(ours.view(np.int32) - theirs.numpy().view(np.int32))
    assert ours.shape == theirs.shape and np.count_nonzero(apart > 1) <= 2 and apart.max() <= 4


# -------------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("family_name", ["Phi3", "Llama"])
@pytest.mark.parametrize("side", ["left", "right", "none", "all padding"])
def test_classifier_heads(tmp_path, head, family_name, side):
    """spec 8.37: the pooled token is the last one that is no padding, whichever side that stands
    on.
    """
    base = family.longrope(64, sliding_window=6) if family_name == "Phi3" else LLAMA
    labels = {
        "id2label": {str(i): f"label {i}" for i in range(5)},
        "label2id": {f"label {i}": i for i in range(5)},
    }
    ours, theirs = _pair(
        tmp_path, base | labels | {"architectures": [family_name + head], "pad_token_id": 0}
    )
    ids = family.ids_of(ours.config, (3, 9))
    if side != "none":
        ids[1, slice(0, 3) if side == "left" else slice(6, None)] = 0
    if side == "all padding":
        ids[2] = 0
    mask = (ids != 0).astype(int)
    rows = mask.any(axis=1)  # a row that sees no key is the mean of all values there and zero here
    here = mask == 1 if head == "ForTokenClassification" else rows
    _same(
        ours(ids, attention_mask=mask)[here],
        _logits(theirs, ids, mask)[here],
        f"{family_name}{head}",
    )
    _same(
        ours(ids), _logits(theirs, ids), f"{family_name}{head}"
    )  # no mask: pooled by the pad id alone
    assert ours(ids).shape == ((3, 9, 5) if head == "ForTokenClassification" else (3, 5)) and str(
        ours
    ) == str(theirs)
