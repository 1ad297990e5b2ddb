"""npllm.config.config: every key of a config.json is used, refused, or known to have no effect."""

import dataclasses
import json
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIG, config_dict, write_folder, write_json

import npllm
from npllm import Config, NpllmError
from npllm.config.config import KEYS_WITHOUT_EFFECT, RopeParameters
from npllm.config.strict_json import read_json
from npllm.errors import NpllmOSError, NpllmValueError

LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0]}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "sliding_window": ...}


def read(**changes):
    return Config.from_json(config_dict(**changes))


def refused(*parts, **changes):
    """Raise unless reading fails with a message that names all parts."""
    with pytest.raises(NpllmValueError) as caught:
        read(**changes)
    missing = [part for part in parts if str(part) not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"
    assert len(str(caught.value)) < 1000


def test_every_size_lands_in_its_own_field():
    names = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "sliding_window",
    ]
    values = dict(zip(names, (101, 60, 103, 7, 6, 3, 10, 107, 109, 11), strict=True))
    config = read(**values, rms_norm_eps=2e-6, bos_token_id=4, eos_token_id=[5, 6], pad_token_id=8)
    assert {name: getattr(config, name) for name in names} == values
    assert (config.rms_norm_eps, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        2e-6,
        4,
        (5, 6),
        8,
    )


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        read().vocab_size = 5


def test_file_folder_and_dict_give_the_same(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert Config.from_json(tmp_path) == Config.from_json(str(tmp_path / "config.json")) == read()


def test_reading_does_not_change_the_dict():
    content = config_dict()
    Config.from_json(content)
    assert content == CONFIG


def test_what_may_be_left_out_has_the_default_of_transformers():
    config = read(
        num_key_value_heads=...,
        max_position_embeddings=...,
        original_max_position_embeddings=...,
        rms_norm_eps=...,
        rope_theta=...,
        rope_scaling=...,
        sliding_window=...,
        tie_word_embeddings=...,
        bos_token_id=...,
        torch_dtype=...,
        eos_token_id=...,
        pad_token_id=...,
        hidden_act=...,
        architectures=...,
    )
    assert (
        config.num_key_value_heads == config.num_attention_heads
        and config.head_dim == 8
        and config.d_rope == 8
    )
    assert (config.max_position_embeddings, config.original_max_position_embeddings) == (4096, 4096)
    assert (config.rms_norm_eps, config.rope_parameters, config.sliding_window) == (
        1e-5,
        RopeParameters(),
        None,
    )
    assert (config.tie_word_embeddings, config.eos_token_id, config.pad_token_id, config.dtype) == (
        False,
        (),
        None,
        "float32",
    )
    assert config.architectures == ("Phi3ForCausalLM",)


@pytest.mark.parametrize(
    "key",
    [
        "num_key_value_heads",
        "head_dim",
        "sliding_window",
        "rope_scaling",
        "rope_theta",
        "pad_token_id",
        "eos_token_id",
        "bos_token_id",
        "rms_norm_eps",
        "torch_dtype",
        "max_position_embeddings",
    ],
)
def test_null_means_absent(key):
    assert read(**{key: None}) == read(**{key: ...})


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
def test_a_size_without_a_default_is_required(key):
    refused(key, "None", **{key: ...})
    refused(key, "None", **{key: None})


@pytest.mark.parametrize("value", [0, -1, 2**40, True, 2.0, "8", [8], {}])
@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "sliding_window",
        "original_max_position_embeddings",
    ],
)
def test_sizes_are_positive_integers_of_a_sane_size(key, value):
    refused(key, repr(value), "integer in 1 ...", **{key: value})


def test_layers_have_a_limit_of_their_own():
    refused("num_hidden_layers", 5000, num_hidden_layers=5000)


@pytest.mark.parametrize(
    "key, value",
    [
        ("rms_norm_eps", -1e-5),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", True),
        ("rope_theta", 0),
        ("rope_theta", -5.0),
        ("rope_theta", float("inf")),
        ("rope_theta", [1]),
        ("tie_word_embeddings", 1),
        ("tie_word_embeddings", "false"),
        ("hidden_act", "gelu"),
        ("hidden_act", 3),
        ("eos_token_id", "2"),
        ("eos_token_id", [2, -1]),
        ("eos_token_id", True),
        ("bos_token_id", -1),
        ("pad_token_id", 61),
        ("bos_token_id", 61),
        ("bos_token_id", 1.0),
        ("torch_dtype", "int8"),
        ("dtype", "float8"),
        ("dtype", 5),
        ("rope_scaling", "linear"),
        ("rope_scaling", [1]),
    ],
)
def test_impossible_values_are_refused_by_name(key, value):
    refused("dtype" if "dtype" in key else key, value, **{key: value})


@pytest.mark.parametrize(
    "key, value",
    [
        ("attention_bias", True),
        ("mlp_bias", True),
        ("lm_head_bias", True),
        ("quantization_config", {"quant_method": "awq"}),
        ("add_cross_attention", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
    ],
)
def test_what_would_change_the_numbers_and_is_not_implemented_is_refused(key, value):
    refused(key, "not implemented", **{key: value})


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias", "lm_head_bias"])
def test_a_bias_that_is_off_is_accepted(key):
    assert read(**{key: False}) == read()


def test_heads_must_divide():
    refused("num_attention_heads", "num_key_value_heads", 4, 3, num_key_value_heads=3)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.4, 1.5, -1.0])
def test_the_rotated_part_is_even_and_inside_the_head(fraction):
    refused("partial_rotary_factor", fraction, partial_rotary_factor=fraction)


def test_partial_rope_truncates_like_transformers():
    assert read(partial_rotary_factor=0.75).d_rope == 6
    assert read(partial_rotary_factor=0.8).d_rope == 6  # int(6.4)


def test_head_dim_may_differ_from_hidden_size_over_heads():
    assert read(head_dim=16).head_dim == 16


@pytest.mark.parametrize("model_type", ["mistral", "gpt2", None, 5, ["phi3"]])
def test_another_model_type_is_refused(model_type):
    refused("model_type", repr(model_type), model_type=model_type)


@pytest.mark.parametrize(
    "names", [["Phi3VForCausalLM"], ["LlamaForCausalLM"], "Phi3ForCausalLM", [], [3], {"a": 1}]
)
def test_another_architecture_is_refused(names):
    refused("architectures", architectures=names)


# ----------------------------------------------------------------------------------------------------------- both spellings of rope


def test_old_and_new_spelling_of_rope_agree():
    old = read(rope_theta=5000, rope_scaling=None, partial_rotary_factor=0.5)
    new = read(
        rope_theta=...,
        rope_scaling=...,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 5000.0,
            "partial_rotary_factor": 0.5,
        },
    )
    assert old == new and old.rope_parameters == RopeParameters("default", 5000.0, 0.5)
    assert isinstance(old.rope_parameters.rope_theta, float)


def test_old_and_new_spelling_of_longrope_agree():
    old = read(rope_scaling={"type": "longrope", **LONG}, original_max_position_embeddings=32)
    new = read(
        rope_theta=...,
        rope_scaling=...,
        original_max_position_embeddings=...,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 32,
            **LONG,
        },
    )
    assert old == new
    assert old.rope_parameters.short_factor == (
        1.0,
        1.1,
        1.2,
        1.3,
    ) and old.rope_parameters.long_factor == (1.0, 2.0, 4.0, 8.0)
    assert old.original_max_position_embeddings == 32


def test_rope_scaling_wins_over_rope_parameters():
    config = read(
        rope_scaling={"rope_type": "default", "rope_theta": 7.0},
        rope_parameters={"rope_theta": 9.0},
    )
    assert config.rope_parameters.rope_theta == 7.0


def test_rope_type_wins_over_type():
    assert (
        read(rope_scaling={"type": "longrope", "rope_type": "default"}).rope_parameters.rope_type
        == "default"
    )


def test_nested_rope_values_win_over_top_level_ones():
    config = read(
        rope_theta=5.0,
        rope_parameters={"rope_theta": 7.0},
        partial_rotary_factor=0.5,
        rope_scaling=None,
    )
    assert (config.rope_parameters.rope_theta, config.rope_parameters.partial_rotary_factor) == (
        7.0,
        0.5,
    )


def test_the_original_context_at_top_level_wins():
    config = read(
        original_max_position_embeddings=32,
        rope_scaling={"type": "longrope", "original_max_position_embeddings": 16, **LONG},
    )
    assert config.original_max_position_embeddings == 32


@pytest.mark.parametrize("spelling", ["su", "yarn", "longrope"])
def test_old_names_of_longrope(spelling):
    assert read(rope_scaling={"type": spelling, **LONG}).rope_parameters.rope_type == "longrope"


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "llama3", "nonsense", ""])
def test_rope_types_that_phi3_does_not_have_are_refused(rope_type):
    refused("rope_type", repr(rope_type), rope_scaling={"type": rope_type, "factor": 2.0})


@pytest.mark.parametrize("missing", ["short_factor", "long_factor"])
def test_longrope_needs_both_factors(missing):
    refused(missing, "missing", rope_scaling={"type": "longrope", **LONG, missing: None})


@pytest.mark.parametrize(
    "factors",
    [
        [1.0] * 3,
        [1.0] * 5,
        [],
        [1.0, 2.0, -1.0, 1.0],
        [0.0] * 4,
        ["1"] * 4,
        [None] * 4,
        "1234",
        4,
        [1.0, 1.0, 1.0, float("nan")],
    ],
)
def test_longrope_factors_are_one_positive_number_for_each_pair(factors):
    refused(
        "" if isinstance(factors, list) and None in factors else "short_factor",
        rope_scaling={"type": "longrope", **LONG, "short_factor": factors},
    )


def test_unknown_rope_keys_warn_by_name():
    with pytest.warns(UserWarning, match="ramp_speed"):
        read(rope_scaling={"type": "default", "ramp_speed": 3})


# -------------------------------------------------------------------------------------------------------------------- unknown keys


def test_unknown_keys_warn_by_name_and_change_nothing():
    with pytest.warns(UserWarning, match="my_finetune, your_finetune"):
        assert read(my_finetune=3, your_finetune=None) == read()


def test_the_warning_points_at_who_loads_the_model(tmp_path):
    folder = write_folder(tmp_path)
    write_json(folder / "config.json", config_dict(my_finetune=3))
    with pytest.warns(UserWarning, match="my_finetune") as caught:
        npllm.load(folder)
    assert caught[0].filename == __file__


def test_keys_without_effect_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            read(**dict.fromkeys(KEYS_WITHOUT_EFFECT - {"id2label", "num_labels"}, "x")) == read()
        )


def test_torch_dtype_is_the_old_name_of_dtype():
    assert (
        read(torch_dtype="bfloat16").dtype
        == read(torch_dtype=..., dtype="bfloat16").dtype
        == "bfloat16"
    )
    assert read(torch_dtype="float16", dtype="torch.bfloat16").dtype == "bfloat16"


# ------------------------------------------------------------------------------------------------------------- Llama, and the heads


def test_llama_may_have_biases_and_its_own_rope_types():
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    config = read(
        **LLAMA,
        attention_bias=True,
        mlp_bias=True,
        rope_scaling=llama3,
        original_max_position_embeddings=...,
    )
    assert (
        config.attention_bias and config.mlp_bias and config.original_max_position_embeddings == 32
    )
    assert (
        read(**LLAMA, rope_scaling={"type": "yarn", "factor": 2.0}).rope_parameters.rope_type
        == "yarn"
    )


def test_llama_ropes_refuse_missing_and_contradictory_numbers():
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}
    refused("high_freq_factor", 4.0, 1.0, **LLAMA, rope_scaling=llama3)
    refused("factor", "missing", **LLAMA, rope_scaling={"rope_type": "linear"})
    refused("factor", -2.0, **LLAMA, rope_scaling={"rope_type": "linear", "factor": -2.0})


def test_dynamic_rope_stretches_the_context():
    assert read(**LLAMA, rope_scaling={"type": "dynamic", "factor": 2.5}).context_length == 160
    assert read().context_length == 64


@pytest.mark.parametrize(
    "suffix, head",
    [
        ("ForCausalLM", "lm"),
        ("ForSequenceClassification", "sequence"),
        ("ForTokenClassification", "token"),
    ],
)
def test_the_architecture_names_the_head(suffix, head):
    assert read(architectures=["Phi3" + suffix]).head == head


def test_classes_are_counted_by_their_names():
    assert read(id2label={"0": "a", "1": "b", "2": "c"}).num_labels == 3
    assert read(num_labels=5, id2label={"0": "a"}).num_labels == 5
    assert read().num_labels == 2


# --------------------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "content, why",
    [
        (b"\xff\xfe{\x00}\x00", "UTF-8"),
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1, 2]", "list"),
        (b"null", "NoneType"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_files_that_are_no_json_object_are_refused_with_the_path(tmp_path, content, why):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(NpllmValueError, match=why) as caught:
        Config.from_json(path)
    assert str(path) in str(caught.value)


def test_a_byte_order_mark_is_no_content(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(CONFIG).encode())
    assert Config.from_json(tmp_path) == read()


def test_a_missing_file_is_an_oserror(tmp_path):
    with pytest.raises(NpllmOSError, match=r"config\.json.*No such file"):
        Config.from_json(tmp_path)
    with pytest.raises(NpllmOSError):
        read_json(str(tmp_path / "no\0name"))


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
    max_leaves=5,
)


@given(
    st.dictionaries(
        st.sampled_from(
            [
                *CONFIG,
                "head_dim",
                "rope_parameters",
                "partial_rotary_factor",
                "id2label",
                "num_labels",
                "layer_types",
                "quantization_config",
                "resid_pdrop",
                "dtype",
            ]
        ),
        junk,
        max_size=3,
    )
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whatever_stands_in_the_file_the_error_is_ours(changes):
    try:
        read(**changes)
    except NpllmError as error:
        assert len(str(error)) < 1000


@given(
    st.dictionaries(
        st.sampled_from(
            [
                "type",
                "rope_type",
                "rope_theta",
                "short_factor",
                "long_factor",
                "factor",
                "truncate",
                "attention_factor",
                "original_max_position_embeddings",
                "partial_rotary_factor",
            ]
        ),
        junk,
    )
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whatever_stands_in_rope_scaling_the_error_is_ours(nested):
    try:
        read(rope_scaling=nested)
    except NpllmError as error:
        assert len(str(error)) < 1000
