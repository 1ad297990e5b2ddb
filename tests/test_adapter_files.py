"""LoRA adapter folders: what is refused, and in which words; the commands."""

import json
import shutil

import lora
import numpy as np
import optional
import pytest
import tiny

import npllm
from npllm.checkpoints.adapters.reader import read_adapter
from npllm.config.config import Config
from npllm.errors import NpllmOSError, NpllmValueError

CONFIG = Config.from_json(tiny.CONFIG)
LLAMA = Config.from_json(
    tiny.config_dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        sliding_window=...,
        original_max_position_embeddings=...,
    )
)
GOOD = lora.factors(tiny.CONFIG)
NAME = "base_model.model.model.layers.0.self_attn.o_proj"


def refused(path, tensors=GOOD, leaves=lora.FUSED, config=CONFIG, **settings):
    """The message with which a folder is refused."""
    folder = lora.write_adapter(path / "a", tensors, leaves, **settings)
    with pytest.raises(NpllmValueError) as error:
        read_adapter(folder, config)
    return str(error.value)


def changed(**changes):
    """GOOD with some tensors replaced, by the end of their name; None leaves one out."""
    names = {f"{NAME}.{end.replace('__', '.')}": x for end, x in changes.items()}
    return {n: x for n, x in (GOOD | names).items() if x is not None}


A, B = GOOD[f"{NAME}.lora_A.weight"], GOOD[f"{NAME}.lora_B.weight"]
WRONG = {
    "transposed A": (
        changed(lora_A__weight=A.T.copy()),
        r"o_proj.lora_A.weight must be [d_rank, d_in] = [4, 32], got [32, 4] (it is transposed)",
    ),
    "transposed B": (
        changed(lora_B__weight=B.T.copy()),
        r"o_proj.lora_B.weight must be [d_out, d_rank] = [32, 4], got [4, 32] (it is transposed)",
    ),
    "missing A": (
        changed(lora_A__weight=None),
        "o_proj.lora_A.weight is missing: it must be [d_rank, d_in] = [4, 32]",
    ),
    "missing B": (
        changed(lora_B__weight=None),
        "o_proj.lora_B.weight is missing: it must be [d_out, d_rank] = [32, 4]",
    ),
    "wrong rank": (
        changed(lora_A__weight=A[:3].copy(), lora_B__weight=B[:, :3].copy()),
        "o_proj.lora_A.weight must be [d_rank, d_in] = [4, 32], got [3, 32] (r or rank_pattern",
    ),
    "another d_model": (
        changed(lora_A__weight=np.zeros((4, 30), np.float32)),
        "o_proj.lora_A.weight must be [d_rank, d_in] = [4, 32], got [4, 30]",
    ),
    "integers": (
        changed(lora_A__weight=A.astype(np.int64)),
        "o_proj.lora_A.weight must be one of BF16, F16, F32, F64, got I64",
    ),
    "magnitude": (changed(lora_magnitude_vector=B[:, 0].copy()), "belongs to DoRA, which is not"),
    "bias of B": (changed(lora_B__bias=B[:, 0].copy()), "belongs to lora_bias, which is not"),
    "surplus layer": (
        GOOD | {"base_model.model.model.layers.2.self_attn.o_proj.lora_A.weight": A},
        "model.layers.2.self_attn.o_proj.lora_A.weight is of no module of the model, which has "
        "model.layers.1.self_attn.o_proj ...",
    ),
    "no prefix": (GOOD | {"o_proj.lora_A.weight": A}, "must begin with base_model.model."),
    "not a number": (
        changed(lora_A__weight=np.where(np.arange(32) == 3, np.nan, A).astype(np.float32)),
        "o_proj.lora_A.weight must be finite, but 4 of its 128 entries are NaN or infinity",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors(case, tmp_path):
    tensors, words = WRONG[case]
    message = refused(tmp_path, tensors)
    assert words in message
    assert str(tmp_path / "a" / "adapter_model.safetensors") in message


SETTINGS = {
    "use_dora": True,
    "bias": "all",
    "lora_bias": True,
    "fan_in_fan_out": True,
    "layer_replication": [[0, 2]],
    "trainable_token_indices": [1],
    "target_parameters": ["experts"],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "megatron_config": {"a": 1},
    "kasa_config": {"a": 1},
    "init_lora_weights": "pissa",
    "peft_type": "IA3",
    "a_key_of_tomorrow": 1,
    "r": 0,
    "lora_alpha": float("inf"),
    "rank_pattern": {"o_proj": "4"},
    "alpha_pattern": [1],
    "layers_to_transform": "1",
    "modules_to_save": "lm_head",
    "target_modules": "(",
}


@pytest.mark.parametrize("key", SETTINGS)
def test_settings_that_would_change_numbers_are_refused_by_name(key, tmp_path):
    message = refused(tmp_path, **{key: SETTINGS[key]})
    assert "adapter_config.json" in message
    assert key in message or (key == "target_modules" and "regular expression" in message)
    assert str(SETTINGS[key])[:3] in message or key == "lora_alpha"


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": True, "peft_version": "0.21.2", "revision": None, "loftq_config": {}},
        {"init_lora_weights": "gaussian", "use_dora": None, "fan_in_fan_out": False},
        {"a_key_of_tomorrow": None, "auto_mapping": {"a": "b"}},
    ],
)
def test_settings_that_change_nothing_pass(settings, tmp_path):
    adapter = read_adapter(lora.write_adapter(tmp_path / "a", GOOD, **settings), CONFIG)
    assert adapter.n_parameters == sum(x.size for x in GOOD.values())


def test_names_of_no_module(tmp_path):
    assert "chooses no module of the model" in refused(tmp_path, {}, ["c_attn"])


def test_a_chosen_module_without_tensors(tmp_path):
    tensors = {n: x for n, x in GOOD.items() if ".o_proj." not in n}
    message = refused(tmp_path, tensors)
    assert message.count("is missing") == 4


def test_a_tensor_that_the_settings_do_not_choose(tmp_path):
    message = refused(tmp_path, GOOD, [x for x in lora.FUSED if x != "o_proj"])
    assert "is of model.layers.0.self_attn.o_proj, which adapter_config.json does not" in message


def test_fused_names_on_llama_and_split_names_on_phi3(tmp_path):
    split = lora.split_of(tiny.CONFIG, GOOD)
    for config in (CONFIG, LLAMA):
        fused = read_adapter(lora.write_adapter(tmp_path / "f", GOOD), config)
        parts = read_adapter(lora.write_adapter(tmp_path / "s", split, lora.SPLIT), config)
        assert fused.updates.keys() == parts.updates.keys()
        assert [u.first for u in parts.updates[0, "qkv_proj"]] == [0, 32, 48]
        assert [u.first for u in parts.updates[1, "gate_up_proj"]] == [0, 40]
        assert len(fused.updates[0, "qkv_proj"]) == 1


def test_a_part_in_modules_to_save(tmp_path):
    message = refused(tmp_path, lora.split_of(tiny.CONFIG, GOOD), lora.SPLIT[1:],
                      modules_to_save=["q_proj"])  # fmt: skip
    assert "modules_to_save names model.layers.0.self_attn.q_proj, which is a block" in message


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_that_peft_saves_beside_their_update(tied, tmp_path):
    path = tiny.write_folder(tmp_path / "m", tie_word_embeddings=tied)
    table = tiny.weights(tiny.config_dict(tie_word_embeddings=tied))["model.embed_tokens.weight"]
    tensors = lora.factors(tiny.CONFIG, ["embed_tokens"])
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    folder = lora.write_adapter(tmp_path / "a", tensors | {name: table}, ["embed_tokens"])
    model = npllm.load(path, adapter=folder, ops="reference")
    assert model.params.embed_tokens.base is model.base_params.embed_tokens
    assert tied == (model.params.lm_head is model.params.embed_tokens.base)
    for other, words in ((table + 1, "another embed_tokens"), (table[:60], "must be .*61.*60")):
        lora.write_adapter(folder, tensors | {name: other}, ["embed_tokens"])
        with pytest.raises(NpllmValueError, match=words):
            npllm.load(path, adapter=folder)


def test_files_that_are_missing_or_pickles(tmp_path):
    folder = lora.write_adapter(tmp_path / "a", None)
    with pytest.raises(NpllmOSError, match=r"but no adapter_model.safetensors"):
        read_adapter(folder, CONFIG)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(NpllmOSError, match=r"adapter_model.bin: may hold Python pickles"):
        read_adapter(folder, CONFIG)
    with pytest.raises(NpllmOSError, match=r"holds no adapter_config.json"):
        read_adapter(tmp_path / "none", CONFIG)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(NpllmValueError, match=r"adapter_config.json"):
        read_adapter(folder, CONFIG)


def test_an_encoder_takes_no_adapter(tmp_path, monkeypatch):
    import npllm.loading

    monkeypatch.setattr(npllm.loading, "_load", lambda *_: object())
    with pytest.raises(NpllmValueError, match="goes with language models"):
        npllm.load(tmp_path, adapter=tmp_path)


# ------------------------------------------------------------------------------------- the commands


@pytest.fixture
def folders(tmp_path):
    vocab = tiny.byte_level().get_vocab_size()
    path = tiny.write_folder(
        tmp_path / "m", tokenizer=tiny.byte_level(), settings=tiny.SETTINGS, vocab_size=vocab
    )
    return str(path), str(lora.write_adapter(tmp_path / "style", GOOD))


def run(*arguments):
    result = optional.invoke(list(arguments))
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_commands_take_an_adapter(folders):
    path, folder = folders
    args = ("topk", "hello", "-m", path, "--json")
    base, adapted = run(*args), run(*args, "--adapter", folder)
    assert base != adapted
    model = npllm.load(path, adapter=folder)
    ids = model.tokenizer.encode("hello")
    assert adapted[0]["id"] == int(model([ids])[0, -1].argmax())


def test_inspect_names_the_adapter(folders):
    path, folder = folders
    facts = run("inspect", "-m", path, "--adapter", folder, "--json")["adapter"]
    assert facts["parameters"] == sum(x.size for x in GOOD.values())
    assert facts["modules"]["o_proj"] == {"updates": 2, "ranks": [4], "scales": [2.0]}
    result = optional.invoke(["inspect", "-m", path, "--adapter", folder])
    assert "updates of rank 4, times 2" in result.stdout


def test_trace_and_compare_take_an_adapter(folders, tmp_path):
    path, folder = folders
    both = ("-m", path, "--adapter", folder)
    for name, dtype in (("mine", ()), ("gold", ("--dtype", "float64"))):
        found = run("trace", "hello", *both, "-o", str(tmp_path / name), "--json", *dtype)
        assert found["adapter"] == "style"
    mine, gold = str(tmp_path / "mine"), str(tmp_path / "gold")
    assert run("compare", mine, gold, *both, "--json")["status"] == "same"
    result = optional.invoke(["compare", mine, gold, "-m", path])
    assert result.exit_code == 2 and "the adapter is style in the gold, None" in result.stderr


def test_a_missing_adapter_is_one_line(folders):
    path, folder = folders
    shutil.rmtree(folder)
    result = optional.invoke(["topk", "hello", "-m", path, "--adapter", folder])
    assert result.exit_code == 1 and "holds no adapter_config.json" in result.stderr
