"""The published config.json files: what they say, and the frequencies that follow from it."""

import contextlib
import json
import re
from pathlib import Path

import family
import numpy as np
import pytest
from close import close

from npllm import ops
from npllm.analysis import inspect
from npllm.checkpoints.phi3_layout import expected_shapes, load_params
from npllm.config.config import Config
from npllm.models import rope

MINI = ((3072, 32), (32, 32, 96), 8192, 32064, 10000.0)
MEDIUM = ((5120, 40), (40, 10, 128), 17920, 32064, 10000.0)
PHI4_MINI = ((3072, 32), (24, 8, 128), 8192, 200064, 10000.0)
SHORT, LONG = (4096, 4096), (131072, 4096)
# file: (hidden, layers), (heads, kv heads, head_dim), intermediate, vocab, theta; rope type,
# rotated channels, (max, original max), window, tied, (bos, eos, pad), dtype
TABLE = {
    "phi-3-mini-4k-instruct.dotnet-machinelearning": (
        *MINI,
        "default",
        96,
        SHORT,
        2047,
        False,
        (1, 32000, 32000),
        "bfloat16",
    ),
    "Phi-3-mini-4k-instruct.onnx-diagnostic": (
        *MINI,
        "default",
        96,
        SHORT,
        2047,
        False,
        (1, 32000, 32000),
        "bfloat16",
    ),
    "phi-3-mini-128k-instruct.dotnet-machinelearning": (
        *MINI,
        "longrope",
        96,
        LONG,
        262144,
        False,
        (1, 32000, 32000),
        "bfloat16",
    ),
    "Phi-3-mini-128k-instruct.longrope": (
        *MINI,
        "longrope",
        96,
        LONG,
        262144,
        False,
        (1, 32000, 32000),
        "bfloat16",
    ),
    "Phi-3.5-mini-instruct": (
        *MINI,
        "longrope",
        96,
        LONG,
        262144,
        False,
        (1, 32000, 32000),
        "bfloat16",
    ),
    "phi-3-medium-4k-instruct.dotnet-machinelearning": (
        *MEDIUM,
        "default",
        128,
        SHORT,
        2047,
        False,
        (1, 32000, 32000),
        "bfloat16",
    ),
    "phi-3-medium-128k-instruct.dotnet-machinelearning": (
        *MEDIUM,
        "longrope",
        128,
        LONG,
        131072,
        False,
        (1, 32000, None),
        "bfloat16",
    ),
    "phi-4": (
        *MEDIUM[:3],
        100352,
        250000.0,
        "default",
        128,
        (16384, 16384),
        None,
        False,
        (100257, 100265, 100349),
        "bfloat16",
    ),
    "phi-4.original-dec2024": (
        *MEDIUM[:3],
        100352,
        250000.0,
        "default",
        128,
        (16384, 16384),
        None,
        False,
        (100257, 100257, 100257),
        "bfloat16",
    ),
    "Phi-4-reasoning-plus.from-derivative": (
        *MEDIUM[:3],
        100352,
        500000.0,
        "default",
        128,
        (32768, 32768),
        None,
        False,
        (100257, 100265, 100349),
        "bfloat16",
    ),
    "Phi-4-mini-instruct": (
        *PHI4_MINI,
        "longrope",
        96,
        LONG,
        262144,
        True,
        (199999, 199999, 199999),
        "bfloat16",
    ),
    "Phi-4-mini-reasoning": (
        *PHI4_MINI,
        "longrope",
        96,
        LONG,
        262144,
        True,
        (199999, 199999, 199999),
        "bfloat16",
    ),
    "Xenova-tiny-random-Phi3ForCausalLM": (
        (32, 2),
        (4, 4, 8),
        64,
        32064,
        10000.0,
        "default",
        8,
        SHORT,
        2047,
        False,
        (1, 32000, 32000),
        "float32",
    ),
    "yujiepan-phi-3-tiny-random": (
        (16, 2),
        (4, 4, 4),
        32,
        32064,
        10000.0,
        "longrope",
        4,
        LONG,
        262144,
        False,
        (1, 32000, 32000),
        "float16",
    ),
}
# Parameters in all, from the shapes alone.
PARAMETERS = {
    "phi-3-mini-4k-instruct.dotnet-machinelearning": 3_821_079_552,
    "Phi-4-mini-instruct": 3_836_021_760,
    "phi-3-medium-4k-instruct.dotnet-machinelearning": 13_960_238_080,
    "phi-4": 14_659_507_200,
}
# Frequencies made with torch: name in the file -> config.json
TORCH = {
    name: name
    for name in (
        "Phi-3-mini-128k-instruct.longrope",
        "Phi-3-mini-4k-instruct.onnx-diagnostic",
        "Phi-3.5-mini-instruct",
        "Phi-4-mini-reasoning",
        "Xenova-tiny-random-Phi3ForCausalLM",
        "phi-3-medium-128k-instruct.dotnet-machinelearning",
        "phi-3-medium-4k-instruct.dotnet-machinelearning",
        "phi-3-mini-128k-instruct.dotnet-machinelearning",
        "phi-3-mini-4k-instruct.dotnet-machinelearning",
        "phi-4",
    )
} | {"Phi-4-reasoning(theta from litgpt)": "Phi-4-reasoning-plus.from-derivative"}


def _config(name):
    return Config.from_json(family.shared_file("configs", name + ".json"))


@pytest.mark.parametrize("name", TABLE)
def test_a_published_config_says_what_the_table_says_and_warns_of_nothing(name):
    """spec 8.30, 8.32, 8.35 (pad null, torch_dtype), 8.38: the su files parse, integer theta,
    auto_map is not followed.
    """
    config = _config(name)
    rope_parameters = config.rope_parameters
    assert TABLE[name] == (
        (config.hidden_size, config.num_hidden_layers),
        (config.num_attention_heads, config.num_key_value_heads, config.head_dim),
        config.intermediate_size,
        config.vocab_size,
        rope_parameters.rope_theta,
        rope_parameters.rope_type,
        config.d_rope,
        (config.max_position_embeddings, config.original_max_position_embeddings),
        config.sliding_window,
        config.tie_word_embeddings,
        (config.bos_token_id, *config.eos_token_id, config.pad_token_id),
        config.dtype,
    )
    assert (config.rms_norm_eps, config.hidden_act, config.model_type, config.head) == (
        1e-5,
        "silu",
        "phi3",
        "lm",
    )


def test_every_published_config_stands_in_the_table():
    family.shared_file("configs")
    assert set(family.real_configs()) == set(TABLE)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_shapes_add_up_to_the_published_number_of_parameters(name):
    assert (
        sum(
            int(np.prod(shape, dtype=np.int64)) for shape in expected_shapes(_config(name)).values()
        )
        == PARAMETERS[name]
    )


@pytest.mark.parametrize("name", TORCH)
def test_frequencies_and_attention_factor_equal_torchs(name):
    """spec 8.3: within 1 unit of the last place in all but one entry of each array; the factor
    exactly.
    """
    config, made = (
        _config(TORCH[name]),
        np.load(family.shared_file("spec", "real_inv_freq_torch.npz")),
    )
    for choice, kind in enumerate(("short_or_default", "long")):
        if f"{name}|{kind}" not in made:
            assert kind == "long" and config.rope_parameters.rope_type == "default"
            continue
        ours, torchs = rope.frequencies(config, choice), made[f"{name}|{kind}"]
        assert (ours.dtype, ours.shape) == (torchs.dtype, torchs.shape)
        apart = np.abs(ours.view(np.int32) - torchs.view(np.int32))
        assert apart.max() <= 1 and np.count_nonzero(apart) <= 1, (kind, apart)
    assert rope.attention_factor(config) == float(made[f"{name}|attention_factor"])


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize(("position", "tolerance"), [(4095, 1e-5), (131071, 1e-4)])
def test_cos_and_sin_far_out_equal_the_float64_values_of_torchs_angles(name, position, tolerance):
    """spec 8.3: the angle is a float32 product, everything else float64."""
    config, made = (
        _config(TORCH[name]),
        np.load(family.shared_file("spec", "real_inv_freq_torch.npz")),
    )
    long = int(
        config.rope_parameters.rope_type == "longrope"
        and position >= config.original_max_position_embeddings
    )
    torchs = made[f"{name}|{'long' if long else 'short_or_default'}"]
    angle = np.tile(torchs * np.float32(position), 2).astype(np.float64)
    scale = rope.attention_factor(config)
    cos, sin = ops.rope_tables(
        np.array([position]),
        rope.frequencies(config, rope.frequency_choice(config, position + 1)),
        scale,
    )
    differing = np.concatenate(
        [rope.frequencies(config, long) != torchs] * 2
    )  # one entry at most: one unit of its last place
    for ours, exact in ((cos, np.cos(angle)), (sin, np.sin(angle))):
        error = np.abs(ours[0] - scale * exact)
        assert (
            error[~differing].max() < tolerance
            and error.max() < tolerance + 1e-7 * angle.max() * differing.any()
        )


def test_a_config_that_names_no_original_length_has_4096_and_the_top_level_one_wins():
    """spec 8.31."""
    content = family.longrope()
    nested = content["rope_scaling"] | {"original_max_position_embeddings": 32}
    read = Config.from_json
    assert read(content | {"rope_scaling": nested}).original_max_position_embeddings == 8
    del content["original_max_position_embeddings"]
    assert read(content).original_max_position_embeddings == 4096
    assert read(content | {"rope_scaling": nested}).original_max_position_embeddings == 32


@pytest.mark.parametrize("spelled", ["su", "yarn", "longrope"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_su_and_yarn_are_longrope_under_either_key_old_or_new(spelled, key):
    """spec 8.30."""
    content = family.longrope()
    factors = {name: content["rope_scaling"][name] for name in ("short_factor", "long_factor")}
    old = Config.from_json(content | {"rope_scaling": factors | {key: spelled}})
    new = {
        name: value for name, value in content.items() if name not in ("rope_scaling", "rope_theta")
    }
    new = Config.from_json(new | {"rope_parameters": factors | {key: spelled, "rope_theta": 10000}})
    assert old == new == Config.from_json(content)
    ids = family.ids_of(old, (1, 12))
    both = [
        family.load(content | {"rope_scaling": factors | {key: name}})(ids)
        for name in (spelled, "longrope")
    ]
    close(both[0], both[1], times=0)


@pytest.mark.parametrize(
    ("rope_changes", "expected"),
    [
        ({}, np.sqrt(1 + np.log(16) / np.log(8))),
        ({"factor": 4.0}, np.sqrt(1 + np.log(4) / np.log(8))),
        ({"factor": 0.5}, 1.0),
        ({"attention_factor": 1.25, "factor": 4.0}, 1.25),
    ],
)
def test_attention_factor_follows_the_file_and_else_the_formula(rope_changes, expected):
    """spec 8.20."""
    content = family.longrope()
    assert (
        rope.attention_factor(
            Config.from_json(content | {"rope_scaling": content["rope_scaling"] | rope_changes})
        )
        == expected
    )


def test_attention_factor_is_one_where_nothing_was_stretched():
    """spec 8.20: max equals original."""
    assert (
        rope.attention_factor(Config.from_json(family.longrope(max_position_embeddings=8))) == 1.0
    )


# ------------------------------------------------------------------------------------------------- a checkpoint of 29 gigabytes

PHI_4 = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "vocab_size": 100352,
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "hidden_act": "silu",
    "max_position_embeddings": 16384,
    "original_max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 250000,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def _write_holes(folder, n_shards):
    """A folder of phi-4's size whose files hold headers and, beyond them, nothing that takes room
    on the disk.
    """
    names, weight_map = sorted(expected_shapes(Config.from_json(PHI_4)).items()), {}
    for shard in range(n_shards):
        file, entries, stop = f"model-{shard + 1:05}-of-{n_shards:05}.safetensors", {}, 0
        for name, shape in names[shard::n_shards]:
            start, stop = stop, stop + 2 * int(np.prod(shape, dtype=np.int64))
            entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, stop]}
            weight_map[name] = file
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)  # tensors at an odd byte would be copied
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + stop)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(json.dumps(PHI_4))
    return folder


@contextlib.contextmanager
def touches_at_most(n_bytes):
    """What is read from files, and what a process holds of mapped files, stays below n_bytes."""
    facts = Path("/proc/self/io"), Path("/proc/self/status")
    if not all(fact.exists() for fact in facts):
        pytest.skip("needs Linux's /proc to count bytes")

    def counted():
        read = re.search(r"rchar: (\d+)", facts[0].read_text())
        held = re.search(r"VmRSS:\s+(\d+) kB", facts[1].read_text())
        return int(read[1]), 1024 * int(held[1])

    before = counted()
    yield
    assert all(after - then < n_bytes for then, after in zip(before, counted(), strict=True))


def test_facts_of_a_29_gigabyte_checkpoint_come_at_once_from_the_headers_alone(
    tmp_path, monkeypatch
):
    """spec 8.13: an index and six shards."""
    folder = _write_holes(tmp_path, 6)
    monkeypatch.setattr(np, "memmap", lambda *_, **__: pytest.fail("a tensor was mapped"))
    with touches_at_most(2**24):
        facts = inspect.checkpoint_facts(folder)
    assert (facts["parameters"], facts["bytes"], facts["files"]) == (
        PARAMETERS["phi-4"],
        2 * PARAMETERS["phi-4"],
        6,
    )
    assert facts["dtypes"] == ["bfloat16"] and facts["kv_bytes_per_token"] == 2 * 40 * 10 * 128 * 4


def test_loading_maps_29_gigabytes_without_reading_them(tmp_path):
    """Views of the files: nothing is copied until a product touches it."""
    folder, config = _write_holes(tmp_path, 6), Config.from_json(PHI_4)
    with touches_at_most(2**24):
        params = load_params(folder, config)
    assert params.lm_head.shape == (100352, 5120) and not any(
        x.flags.writeable for x in params.layers[39] if x is not None
    )
