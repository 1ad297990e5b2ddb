"""Llama folders: split projections, fused at load; the same mathematics."""

import tracemalloc

import family
import numpy as np
import pytest
import tiny
from close import close
from hypothesis import given
from hypothesis import strategies as st

import npllm
from npllm.checkpoints.phi3_layout import load_params
from npllm.config.config import Config
from npllm.models import rope

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def _as_phi3(weights, n_layer=2):
    """The same tensors with fused projections, under the names of Phi-3."""
    weights = dict(weights)
    for number in range(n_layer):
        for fused, parts in FUSED.items():
            rows = [weights.pop(f"model.layers.{number}.{part}.weight") for part in parts]
            weights[f"model.layers.{number}.{fused}.weight"] = np.concatenate(rows)
    return weights


def _both(**changes):
    """A Llama model, and a Phi-3 model of the same weights."""
    content = LLAMA | changes
    weights = family.tensors(content)
    phi3 = content | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
    return family.load(content, weights), family.load(phi3, _as_phi3(weights))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": None},
        {"num_key_value_heads": 1},
        {"head_dim": 12},
        {"head_dim": None},
        {"rms_norm_eps": 1e-6},
    ],
)
def test_a_llama_folder_gives_the_very_bits_of_the_same_weights_fused(changes):
    """spec 8.53, 8.34: tied or not, every grouping of heads, head_dim beside the width of the
    model.
    """
    llama, phi3 = _both(**changes)
    ids = family.ids_of(llama.config, (2, 11))
    close(llama(ids), phi3(ids), times=0)
    caches = llama.new_cache(2), phi3.new_cache(2)
    for part in (ids[:, :6], ids[:, 6:7], ids[:, 7:]):
        close(llama(part, cache=caches[0]), phi3(part, cache=caches[1]), times=0)


@given(st.sampled_from(["float32", "float16", "bfloat16"]), st.integers(0, 99))
def test_split_and_fused_are_the_same_bytes(dtype, seed):
    """spec 8.53: cutting the fused rows again gives every tensor back, byte for byte; the rest is
    the file's own.
    """
    weights = family.tensors(LLAMA, seed, npllm.arrays.dtype_named(dtype))
    layers = family.load(LLAMA | {"torch_dtype": dtype}, weights).params.layers
    for number, layer in enumerate(layers):
        for fused, parts in FUSED.items():
            names = [f"model.layers.{number}.{part}.weight" for part in parts]
            ends = np.cumsum([weights[name].shape[0] for name in names])[:-1]
            for name, rows in zip(
                names, np.split(getattr(layer, fused.split(".")[1]), ends), strict=True
            ):
                assert (
                    rows.dtype == weights[name].dtype and rows.tobytes() == weights[name].tobytes()
                )
        assert (
            layer.o_proj.tobytes()
            == weights[f"model.layers.{number}.self_attn.o_proj.weight"].tobytes()
        )


def test_a_conversion_at_load_equals_fusing_first():
    weights = family.tensors(LLAMA)
    wide = family.load(LLAMA, weights, dtype="float64").params.layers[0]
    close(
        wide.qkv_proj,
        _as_phi3(weights)["model.layers.0.self_attn.qkv_proj.weight"].astype(np.float64),
        times=0,
    )


@pytest.mark.parametrize(
    ("biased", "leaves"),
    [
        ("attention_bias", {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj")}),
        ("mlp_bias", {"mlp": ("gate_proj", "up_proj", "down_proj")}),
    ],
)
def test_biases_are_added_where_the_config_says_so(biased, leaves):
    """A bias in every map of that half: each one changes the result, and zeros change nothing."""
    content = LLAMA | {biased: True}
    plain, weights = family.load(LLAMA), family.tensors(content)
    ids = family.ids_of(plain.config, (1, 7))
    names = [
        f"model.layers.1.{half}.{leaf}.bias" for half, parts in leaves.items() for leaf in parts
    ]
    assert {name for name in weights if name.endswith("bias") and ".1." in name} == set(names)
    weights = family.tensors(LLAMA) | {
        name: np.zeros_like(x) for name, x in weights.items() if name.endswith("bias")
    }
    close(family.load(content, weights)(ids), plain(ids), times=0)
    for name in names:
        changed = family.load(
            content, weights | {name: np.linspace(1, 2, weights[name].size, dtype=np.float32)}
        )
        if "k_proj" in name:  # at position 0 a softmax over one key is 1, whatever the key
            close(changed(ids)[:, 0], plain(ids)[:, 0], times=0)
        assert np.abs(changed(ids)[:, 1:] - plain(ids)[:, 1:]).max() > 1e-4


def test_a_bias_by_hand():
    """The fused bias is q, k, v below each other."""
    content = LLAMA | {"attention_bias": True, "mlp_bias": True}
    weights = family.tensors(content)
    layer = family.load(content, weights).params.layers[1]
    for field, half, leaves in (
        ("qkv_bias", "self_attn", ("q_proj", "k_proj", "v_proj")),
        ("gate_up_bias", "mlp", ("gate_proj", "up_proj")),
        ("o_bias", "self_attn", ("o_proj",)),
        ("down_bias", "mlp", ("down_proj",)),
    ):
        by_hand = np.concatenate([weights[f"model.layers.1.{half}.{leaf}.bias"] for leaf in leaves])
        close(np.array(getattr(layer, field)), by_hand, times=0)


def test_missing_biases_and_split_tensors_are_listed_by_their_names():
    content = LLAMA | {"attention_bias": True}
    with pytest.raises(npllm.NpllmError, match=r"missing: .*self_attn\.k_proj\.bias"):
        family.load(content, family.tensors(LLAMA))
    lacking = {
        name: x for name, x in family.tensors(LLAMA).items() if "layers.1.mlp.up_proj" not in name
    }
    with pytest.raises(npllm.NpllmError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        family.load(LLAMA, lacking)
    with pytest.raises(npllm.NpllmError, match=r"unknown: .*qkv_proj"):
        family.load(LLAMA, _as_phi3(family.tensors(LLAMA)))


def test_fusing_never_holds_both_forms(tmp_path):
    """Python's own memory at its peak is the fused weights and less than one layer more."""
    content = LLAMA | {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
    }
    weights = family.tensors(content)
    fused = sum(
        x.nbytes
        for name, x in weights.items()
        if any(part in name for parts in FUSED.values() for part in parts)
    )
    folder, config = family.write(tmp_path, content, weights), Config.from_json(content)
    del weights
    tracemalloc.start()
    try:
        params = load_params(folder, config)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert fused <= peak < fused + fused / config.num_hidden_layers + 2**20
    assert (
        not params.layers[0].o_proj.flags.writeable and not params.embed_tokens.flags.writeable
    )  # views of the file


# ------------------------------------------------------------------------------------------- frequencies, from their formulas


def _config(scaling, **changes):
    return Config.from_json(LLAMA | {"rope_scaling": scaling} | changes)


def test_linear_turns_position_m_like_position_m_over_factor():
    config, plain = _config({"type": "linear", "factor": 4.0}), _config(None)
    close(rope.frequencies(config, 0) * 4, rope.frequencies(plain, 0))


@pytest.mark.parametrize("cached", [False, True])
def test_positions_four_times_as_far_apart_turn_like_plain_ones_under_a_linear_factor_of_four(
    cached,
):
    """spec 8.21: explicit positions are what RoPE sees, to the bit, since the factor is a power of
    two.
    """
    linear, plain = (
        family.model(LLAMA | {"rope_scaling": x}) for x in ({"type": "linear", "factor": 4.0}, None)
    )
    ids = family.ids_of(plain.config, (2, 9))
    caches = (linear.new_cache(2), plain.new_cache(2)) if cached else (None, None)
    close(
        linear(ids, position_ids=4 * np.arange(9), cache=caches[0]),
        plain(ids, cache=caches[1]),
        times=0,
    )


@pytest.mark.parametrize(
    ("original", "factor", "theta", "d_head"),
    [(8192, 8.0, 500000.0, 128), (8192, 32.0, 500000.0, 64)],
)
def test_llama3_keeps_short_waves_slows_long_ones_and_blends_between(
    original, factor, theta, d_head
):
    """spec 8.53: the numbers of Llama 3.1 and 3.2, by the formula in float64."""
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    config = _config(scaling, head_dim=d_head, rope_theta=theta, max_position_embeddings=131072)
    inv = 1 / theta ** (np.arange(0, d_head, 2) / d_head)
    turns = original * inv / (2 * np.pi)
    blend = (turns - 1) / 3
    expected = np.where(
        turns < 1, inv / factor, np.where(turns > 4, inv, (1 - blend) * inv / factor + blend * inv)
    )
    assert np.abs(rope.frequencies(config, 0) / expected - 1).max() < 3e-6
    assert rope.attention_factor(config) == 1 and {True} == set(
        (np.diff(rope.frequencies(config, 0)) < 0).tolist()
    )


@given(st.integers(4, 40), st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 16))
def test_dynamic_rope_with_a_cache_is_a_full_pass_at_every_length(first, calls, chunk):
    """Its base grows with every token beyond the context of the training, so that every call
    computes the row anew.
    """
    model = family.model(
        LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 20}
    )
    ids, cache = family.ids_of(model.config, (1, 76), seed=first), model.new_cache()
    with family.prefill_chunk(chunk):
        for n in [first, *calls]:
            last = model(ids[:, cache.n_ctx : cache.n_ctx + n], cache=cache)[0, -1]
            close(last, family.alone(model, ids[0, : cache.n_ctx]))


def test_dynamic_rope_is_the_default_below_the_context_of_the_training_and_goes_beyond_it():
    scaling = {"type": "dynamic", "factor": 4.0}
    dynamic, plain = (
        family.model(LLAMA | {"rope_scaling": x, "max_position_embeddings": 20})
        for x in (scaling, None)
    )
    ids = family.ids_of(plain.config, (1, 80))
    close(dynamic(ids[:, :20]), plain(ids[:, :20]), times=0)
    assert dynamic(ids).shape[1] == 80
    with pytest.raises(npllm.NpllmError, match="80"):
        dynamic(np.concatenate([ids, ids[:, :1]], axis=1))


def test_yarn_slows_long_waves_and_keeps_short_ones():
    config = _config(
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        head_dim=64,
        max_position_embeddings=2048,
    )
    ratio = rope.frequencies(config, 0) / rope.frequencies(_config(None, head_dim=64), 0)
    close(ratio[[0, -1]], np.array([1, 0.25], np.float32))
    assert (np.diff(ratio) <= 1e-6).all() and np.count_nonzero((ratio > 0.26) & (ratio < 0.99)) > 5
    assert rope.attention_factor(config) == pytest.approx(0.1 * np.log(4) + 1, rel=1e-15)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_by_its_formula_in_float64(truncate):
    """Between the pairs that turn beta_fast and beta_slow times in the original context, the factor
    sets in linearly.
    """
    d, base, factor, original, fast, slow = 64, 10000.0, 4.0, 512, 20.0, 2.0
    config = _config(
        {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": fast,
            "beta_slow": slow,
            "truncate": truncate,
        },
        head_dim=d,
        max_position_embeddings=2048,
    )
    low, high = (
        d * np.log(original / (2 * np.pi * turns)) / (2 * np.log(base)) for turns in (fast, slow)
    )
    low, high = (np.floor(low), np.ceil(high)) if truncate else (low, high)
    ramp = np.clip((np.arange(d // 2) - low) / (high - low), 0, 1)
    inv = base ** (-np.arange(0, d, 2) / d)
    assert (
        np.abs(rope.frequencies(config, 0) / (inv / factor * ramp + inv * (1 - ramp)) - 1).max()
        < 3e-6
    )


@pytest.mark.parametrize("length", [21, 40, 80])
def test_dynamic_rope_beyond_its_context_is_a_larger_base(length):
    """base * (factor * n / n_original - factor + 1) ** (d / (d - 2)), d = 8 rotated channels."""
    model = family.model(
        LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 20}
    )
    theta = 10000.0 * (4.0 * length / 20 - 3) ** (8 / 6)
    wide, ids = (
        family.model(LLAMA | {"rope_theta": theta, "max_position_embeddings": 80}),
        family.ids_of(model.config, (1, length)),
    )
    close(model(ids), wide(ids))


@pytest.mark.parametrize("head_dim", [6, 16])
def test_head_dim_is_what_the_file_says_and_not_the_width_over_the_heads(head_dim):
    """spec 8.53, 8.34, 8.5: scores are scaled by the root of the explicit head_dim."""
    model = family.model(LLAMA | {"head_dim": head_dim})
    assert (
        model.params.layers[0].qkv_proj.shape == (8 * head_dim, 32)
        and model.config.d_rope == head_dim
    )
    seen = {}
    model(family.ids_of(model.config, (1, 3)), tap=lambda name, x: seen.setdefault(name, x))
    q, k, v = (seen[f"model.layers.0.self_attn.{x}"][0] for x in "qkv")
    scores = np.einsum("hid,hjd->hij", q, np.repeat(k, 2, axis=0)) / np.sqrt(head_dim)
    scores[:, *np.triu_indices(3, 1)] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    y = np.einsum("hij,hjd->ihd", p / p.sum(-1, keepdims=True), np.repeat(v, 2, axis=0)).reshape(
        1, 3, -1
    )
    close(seen["model.layers.0.self_attn.attention"], y)


def test_a_llama_folder_has_no_window():
    """A key of Mistral's in a Llama file changes nothing in Transformers; here it is not followed
    in silence.
    """
    with pytest.warns(UserWarning, match="sliding_window"):
        assert Config.from_json(LLAMA | {"sliding_window": 8}).sliding_window is None


@pytest.mark.parametrize(
    "changes",
    [
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}},
        {"partial_rotary_factor": 2.0},
    ],
)
def test_the_default_rope_of_llama_rotates_whole_heads_and_says_so(changes):
    with pytest.warns(
        UserWarning,
        match=r"partial_rotary_factor = (0\.5|2\.0) has no effect with model_type llama and rope_type default",
    ):
        model = family.load(LLAMA | changes, family.tensors(LLAMA))
    ids = family.ids_of(model.config, (1, 9))
    assert model.config.d_rope == model.config.head_dim
    close(model(ids), family.load(LLAMA)(ids), times=0)


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 2.0},
        {"type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 2, "long_factor": [2.0] * 2},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
)
def test_the_other_ropes_of_llama_refuse_a_part_of_a_head_by_name(scaling):
    name = scaling.get("rope_type", scaling.get("type"))
    with pytest.raises(
        npllm.NpllmError,
        match=f"partial_rotary_factor must be 1 for model_type llama and rope_type {name}, got 0.5",
    ):
        Config.from_json(LLAMA | {"rope_scaling": scaling, "partial_rotary_factor": 0.5})
    whole = {
        key: [1.0] * 4
        for key in scaling
        if key.endswith("_factor") and isinstance(scaling[key], list)
    }
    Config.from_json(LLAMA | {"rope_scaling": scaling | whole, "partial_rotary_factor": 1})


def test_the_tokens_of_tiny_llama_and_of_its_fused_twin_are_the_same():
    llama, phi3 = _both()
    ids = tiny.random_ids(2, 5)
    close(llama.generate(ids, max_new_tokens=9), phi3.generate(ids, max_new_tokens=9))
