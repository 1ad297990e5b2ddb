"""`npllm.quantize` writes GGUF files that give back what their source holds."""

import errno
import json
import shutil
import tempfile
import tracemalloc
from functools import cache
from pathlib import Path

import numpy as np
import optional
import pytest
from close import close
from gguf_files import TEMPLATE, metadata, tensors, vocabulary, write, write_tiny, write_twin
from nasty import strings
from quantised_folders import FIELDS, LLAMA, SCHEMES, write_pair

import npllm
from npllm.arrays import widen
from npllm.checkpoints.gguf import writer as writing
from npllm.checkpoints.gguf.reader import GGUFFile
from npllm.checkpoints.gguf.sources import gguf_source
from npllm.checkpoints.gguf.tensor_types import FILE_TYPES, ModelSizes, tensor_type
from npllm.checkpoints.gguf.tokenizer import read_tokenizer
from npllm.checkpoints.gguf.weights import half_split, interleaved
from npllm.errors import NpllmOSError, NpllmValueError
from npllm.models.rope import attention_factor, frequencies
from npllm.quantized import block_packing
from npllm.quantized.block_packing import quantize_blocks
from npllm.quantized.block_weight import BlockWeight

gguf = optional.module("gguf")

ARCHS = ("phi3", "llama")
IDS = np.random.default_rng(0).integers(6, 260, (2, 20))
SETTINGS = {
    "chat_template": TEMPLATE,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "</s>",
}


@cache
def tokenizer(arch):
    """A byte-level tokenizer whose pre-tokenizer GGUF has a name for, as a string."""
    norm = {"output_norm.weight": tensors(arch, "F32")["output_norm.weight"]}
    with tempfile.TemporaryDirectory() as parent:
        path = write(Path(parent) / "x.gguf", metadata(arch), norm, arch)
        return read_tokenizer(GGUFFile(path)).to_str()


@pytest.fixture
def folder(tmp_path):
    """Function (architecture, ...) -> (folder in float32, its tensors under GGUF's names)."""

    def make(arch="phi3", tied=False, seed=0, **changes):
        found = tensors(arch, "F32", seed, tied)
        path = write_twin(
            tmp_path / "model", found, arch, bos_token_id=0, eos_token_id=1, **changes
        )
        (path / "tokenizer.json").write_text(tokenizer(arch))
        (path / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
        return path, {name: wide for name, (_, wide, _) in found.items()}

    return make


def quantized(path, file_type, name="out.gguf", **options):
    return npllm.quantize(path, path.parent / name, file_type, progress=False, **options)


# --- what is written is what was meant


@pytest.mark.parametrize(
    ("arch", "file_type"),
    [
        pytest.param(arch, file_type, marks=[] if (n + m) % 2 == 0 else pytest.mark.slow)
        for n, arch in enumerate(ARCHS)
        for m, file_type in enumerate(FILE_TYPES)
    ],
)
def test_every_tensor_is_that_of_the_source_rounded_to_its_type(folder, arch, file_type):
    path, wide = folder(arch)
    stored = GGUFFile(quantized(path, file_type)).tensors
    assert set(stored) == set(wide)
    sizes = ModelSizes(2, False, True)
    for name, x in wide.items():
        kind = tensor_type(name, x.shape, FILE_TYPES[file_type], sizes)
        assert stored[name].kind == kind
        if kind in ("F32", "F16", "BF16"):
            want = x.astype(
                {"F16": np.float16, "F32": np.float32}.get(kind, stored[name].stored.dtype)
            )
            np.testing.assert_array_equal(stored[name].stored, want)
        else:
            np.testing.assert_array_equal(stored[name].rows, quantize_blocks(x, kind).blocks)


def packed_and_floats(path, scheme, arch):
    """A folder of a scheme and one of floats, with a tokenizer that GGUF has a place for."""
    changes = {"vocab_size": len(vocabulary()["tokenizer.ggml.tokens"]), "num_attention_heads": 2}
    changes |= {"bos_token_id": 0, "eos_token_id": 1} | (LLAMA if arch == "llama" else {})
    pair = write_pair(path, scheme, **changes)
    for folder in pair:
        (folder / "tokenizer.json").write_text(tokenizer(arch))
        (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    return pair


@pytest.mark.parametrize("name", ["gptq", "gptq act-order", "pack asymmetric", "int"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_quantised_folder_is_read_as_its_floats(tmp_path, name, arch):
    packed, floats = packed_and_floats(tmp_path, SCHEMES[name], arch)
    ours, theirs = (
        npllm.load(quantized(x, "f32", f"{x.name}.gguf"), ops="reference") for x in (packed, floats)
    )
    np.testing.assert_array_equal(ours(IDS), theirs(IDS))


@pytest.mark.parametrize(("name", "kind"), [("gptq", "q4_0"), ("int", "q8_0")])
def test_blocks_of_the_wanted_type_are_copied_from_a_quantised_folder(tmp_path, name, kind):
    packed, floats = packed_and_floats(tmp_path, SCHEMES[name], "phi3")
    ours, theirs = npllm.load(quantized(packed, kind)).params, npllm.load(floats).params
    for field in FIELDS:
        x = getattr(ours.layers[0], field)
        assert x.format == kind.upper()
        np.testing.assert_array_equal(x.widened(), getattr(theirs.layers[0], field))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_file_in_float32_is_the_same_model(folder, arch, tied):
    path, _ = folder(arch, tied)
    theirs, ours = npllm.load(path), npllm.load(quantized(path, "f32"))
    np.testing.assert_array_equal(ours(IDS), theirs(IDS))
    assert ours.config.tie_word_embeddings == tied
    for name in ("hidden_size", "head_dim", "rms_norm_eps", "sliding_window", "rope_parameters"):
        assert getattr(ours.config, name) == getattr(theirs.config, name)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_model_of_4_bits_computes_with_the_rounded_weights(folder, arch):
    path, wide = folder(arch)
    model = npllm.load(quantized(path, "q4_k_s"))
    layer = model.params.layers[1]
    down = quantize_blocks(wide["blk.1.ffn_down.weight"], "Q4_K")
    assert isinstance(layer.down_proj, BlockWeight)
    np.testing.assert_array_equal(layer.down_proj.blocks, down.blocks)
    theirs = npllm.load(path).params.layers[1].qkv_proj
    ours = widen(layer.qkv_proj, np.float32)
    assert np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)) < 0.08


def test_rows_of_heads_are_put_back_in_order():
    x = np.random.default_rng(0).standard_normal((4 * 64, 32))
    np.testing.assert_array_equal(half_split(interleaved(x, 4), 4), x)
    np.testing.assert_array_equal(interleaved(x, 4)[1], x[32])
    with pytest.raises(NpllmValueError, match="3 heads of even width, got 256 rows"):
        interleaved(x, 3)


@pytest.mark.parametrize("arch", ARCHS)
def test_tokens_template_and_stop_ids_are_kept(folder, arch):
    path, _ = folder(arch)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5, 4]}))
    theirs, ours = npllm.load(path), npllm.load(quantized(path, "q8_0"))
    for text in ("hello <|user|>w", "a 12 é\n\n b", "  HELLO're <|end|> \n x"):
        assert ours.tokenizer.encode(text) == theirs.tokenizer.encode(text)
    assert ours.tokenizer.chat_template == theirs.tokenizer.chat_template == TEMPLATE
    assert ours.tokenizer.special_tokens == theirs.tokenizer.special_tokens
    ends = set(theirs.generation_config.eos_token_id)
    assert ends <= set(ours.generation_config.eos_token_id)
    assert ours.generation_config.eos_token_id[0] == 1


def test_metadata_are_those_that_the_converter_writes(folder):
    path, _ = folder("phi3", sliding_window=40)
    found = GGUFFile(quantized(path, "q5_k_m")).metadata
    wanted = metadata("phi3") | {
        "general.architecture": "phi3",
        "general.file_type": 17,
        "general.quantization_version": 2,
        "phi3.attention.sliding_window": 40,
        "phi3.rope.scaling.original_context_length": 128,
    }
    for key, value in wanted.items():
        assert found[key] == (pytest.approx(value) if isinstance(value, float) else value), key


def test_longrope_is_kept(folder):
    rng = np.random.default_rng(0)
    scaling = {"type": "longrope"} | {
        f"{name}_factor": rng.uniform(1, 40, 32).tolist() for name in ("long", "short")
    }
    path, _ = folder(rope_scaling=scaling, original_max_position_embeddings=16)
    theirs, ours = npllm.load(path), npllm.load(quantized(path, "f32"))
    for choice in (0, 1):
        close(frequencies(ours.config, choice), frequencies(theirs.config, choice))
    assert attention_factor(ours.config) == pytest.approx(attention_factor(theirs.config), rel=1e-6)
    for n in (9, 20):
        close(ours(IDS[:, :n]), theirs(IDS[:, :n]), times=4)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.5},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
    ids=["linear", "llama3"],
)
def test_scaled_frequencies_of_llama_are_kept(folder, scaling):
    top = scaling.get("original_max_position_embeddings", 128)
    path, _ = folder("llama", rope_scaling=scaling, original_max_position_embeddings=top)
    theirs, ours = npllm.load(path), npllm.load(quantized(path, "f32"))
    close(frequencies(ours.config, 0), frequencies(theirs.config, 0))


def test_of_two_tied_matrices_in_a_file_that_differ_both_are_written(folder):
    from safetensors.numpy import load_file, save_file

    path, wide = folder(tied=True)
    held = load_file(path / "model.safetensors")
    save_file(
        held | {"lm_head.weight": 2 * held["model.embed_tokens.weight"]}, path / "model.safetensors"
    )
    with pytest.warns(UserWarning, match="differ, so both are used"):
        stored = GGUFFile(quantized(path, "f32")).tensors
    np.testing.assert_array_equal(stored["output.weight"].stored, 2 * wide["token_embd.weight"])


# --- from GGUF to GGUF


@pytest.mark.parametrize("arch", ARCHS)
def test_a_gguf_file_becomes_another_and_equal_types_are_copied(tmp_path, arch):
    kinds = {"ffn_down": "Q6_K", "attn_output": "F16", "output": "Q6_K"}
    first, found = write_tiny(
        tmp_path / "a.gguf", arch, lambda name: kinds.get(name.split(".")[-2], "Q4_K")
    )
    second = quantized(first, "q4_k_m", "b.gguf")
    stored, before = GGUFFile(second), GGUFFile(first)
    for name, (raw, wide, kind) in found.items():
        if stored.tensors[name].kind == kind and len(wide.shape) == 2:
            np.testing.assert_array_equal(stored.tensors[name].rows, raw)
    q = stored.tensors["blk.0.attn_output.weight"]
    want = quantize_blocks(found["blk.0.attn_output.weight"][1], "Q4_K")
    np.testing.assert_array_equal(q.rows, want.blocks)
    kept = {key: x for key, x in stored.metadata.items() if key in before.metadata}
    assert kept == before.metadata
    assert stored.metadata["general.file_type"] == 15


def test_a_file_may_replace_its_own_source(tmp_path):
    path, found = write_tiny(tmp_path / "a.gguf", "phi3", "F32")
    model = npllm.load(path)
    quantized(path, "q8_0", "a.gguf", overwrite=True)
    want = quantize_blocks(found["output.weight"][1], "Q8_0")
    np.testing.assert_array_equal(npllm.load(path).params.lm_head.blocks, want.blocks)
    np.testing.assert_array_equal(model.params.lm_head, found["output.weight"][1])


# --- memory, and interruptions


def test_one_tensor_at_a_time_is_in_memory(folder, monkeypatch):
    """Beside it what the search of a band holds, which is smaller than the rest of this model."""
    monkeypatch.setattr(block_packing, "BAND", 2**13)
    path, wide = folder("phi3")
    source, largest = gguf_source(path), max(x.nbytes for x in wide.values())
    tracemalloc.start()
    writing.write_gguf(source, path.parent / "x.gguf", FILE_TYPES["q4_k_m"], progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * largest < sum(x.nbytes for x in wide.values()) / 3


def test_an_error_leaves_nothing_and_the_old_file_stays(folder, monkeypatch):
    path, _ = folder()
    output = quantized(path, "q8_0")
    before = output.read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(NpllmOSError, match=r"out.gguf: cannot be written \(No space left .*room"):
        quantized(path, "q4_0", overwrite=True)
    assert output.read_bytes() == before
    assert sorted(x.name for x in path.parent.iterdir()) == ["model", "out.gguf"]


def test_a_disk_without_room_is_named_before_the_work(folder, monkeypatch):
    path, _ = folder()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1000))
    with pytest.raises(NpllmOSError, match=r"out.gguf needs .* MB, but its disk has 0 MB free"):
        quantized(path, "f32")
    assert [x.name for x in path.parent.iterdir()] == ["model"]


# --- what cannot be written


def test_an_existing_file_is_kept(folder):
    path, _ = folder()
    quantized(path, "q4_0")
    with pytest.raises(NpllmOSError, match=r"out.gguf: exists; .*--force"):
        quantized(path, "q4_0")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("out.bin", "output must end with .gguf"),
        ("missing/out.gguf", "missing: no such folder"),
        ("sub.gguf", "sub.gguf: is a folder"),
    ],
)
def test_a_bad_output_is_named(folder, name, words):
    path, _ = folder()
    (path.parent / "sub.gguf").mkdir()
    with pytest.raises((NpllmOSError, NpllmValueError), match=words):
        quantized(path, "q4_0", name)


@pytest.mark.parametrize(
    ("arch", "change", "words"),
    [
        ("llama", {"attention_bias": True}, "tensors|attention_bias and mlp_bias must be false"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type yarn has no"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type dynamic has no",
        ),
        ("phi3", {"architectures": ["Phi3ForSequenceClassification"]}, "is no language model"),
        ("phi3", {"model_type": "bert"}, "an encoder .bert. cannot be written"),
        ("phi3", {"head_dim": 32}, "n_head . d_head = 128 must be d_model = 256"),
        (
            "llama",
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 2.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "llama3 must have low_freq_factor 1",
        ),
    ],
    ids=["bias", "yarn", "dynamic", "classifier", "bert", "head_dim", "llama3"],
)
def test_a_model_that_gguf_cannot_hold_is_named(folder, arch, change, words):
    path, _ = folder(arch, **change)
    with pytest.raises(NpllmValueError, match=words) as caught:
        quantized(path, "q8_0")
    assert str(path) in str(caught.value)
    assert [x.name for x in path.parent.iterdir()] == ["model"]


def test_a_tokenizer_that_gguf_has_no_name_for_is_refused(folder):
    from tiny import byte_level

    path, _ = folder()
    byte_level().save(str(path / "tokenizer.json"))
    with pytest.raises(NpllmValueError, match="must split text as one of smollm, llama-bpe"):
        quantized(path, "q8_0")
    (path / "tokenizer.json").unlink()
    with pytest.raises(NpllmOSError, match=r"tokenizer.json: no such file"):
        quantized(path, "q8_0")


def test_a_normalizer_that_gguf_has_no_place_for_is_refused(folder):
    path, _ = folder()
    content = json.loads((path / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        NpllmValueError, match=r"has no place for this tokenizer: .* other token ids"
    ):
        quantized(path, "q8_0")


def test_a_stop_id_without_a_place_is_named(folder):
    path, _ = folder()
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 9, 10, 11]}))
    with pytest.warns(UserWarning, match=r"has no place for the stop ids \[11\]"):
        quantized(path, "q8_0")


@pytest.mark.parametrize(
    ("value", "file_type", "words"),
    [
        (np.nan, "q4_0", "NaN or infinity"),
        (1e6, "f16", "1e.06 is larger than F16 can hold; bf16 and f32 can"),
        (1e9, "q8_0", "a scale must be at most 65504"),
    ],
    ids=["nan", "f16", "q8_0"],
)
def test_a_weight_that_does_not_fit_its_type_is_named(folder, value, file_type, words):
    from safetensors.numpy import load_file, save_file

    path, _ = folder()
    held = load_file(path / "model.safetensors")
    held["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(held, path / "model.safetensors")
    with pytest.raises(NpllmValueError, match=rf"blk.1.ffn_down.weight: .*{words}"):
        quantized(path, file_type)


def test_infinity_is_kept_where_a_type_has_it():
    x = np.array([[np.inf, 1, -np.inf, 70000.0]], np.float32)
    with pytest.raises(NpllmValueError, match="70000 is larger than F16"):
        writing.converted(x, "F16")
    np.testing.assert_array_equal(writing.converted(x[:, :3], "F16"), x[:, :3])


def test_without_the_package_the_error_says_how_to_install_it(folder, monkeypatch):
    import sys

    path, _ = folder()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(npllm.errors.MissingExtraError, match=r'pip install -e ".\[fetch\]"'):
        quantized(path, "q8_0")


# --- the command


def command(*args):
    return optional.invoke(["quantize", *map(str, args)])


def test_the_command_writes_a_file_and_says_what_it_is(folder):
    path, _ = folder()
    output = path.parent / "x.gguf"
    result = command("-m", path, "--type", "Q4_K_M", "-o", output, "--json")
    facts = json.loads(result.stdout)
    assert result.exit_code == 0 and facts["file"] == str(output) and facts["type"] == "q4_k_m"
    assert facts["bytes"] < output.stat().st_size and set(facts["types"]) >= {"Q4_K", "Q6_K"}
    again = command("-m", path, "-o", output)
    assert again.exit_code == 1 and "--force" in again.output
    forced = command("-m", path, "-o", output, "--type", "q8_0", "--force")
    assert forced.exit_code == 0 and str(output) in forced.stdout
    assert GGUFFile(output).metadata["general.file_type"] == 7


def test_an_unknown_type_is_wrong_usage():
    result = command("-o", "x.gguf", "--type", "q4km")
    assert result.exit_code == 2 and "did you mean q4_" in result.output


# --- the default model


@pytest.mark.weights
def test_the_default_model_as_gguf_has_its_tokens_and_weights(
    default_folder, default_model, tmp_path
):
    ours = npllm.load(npllm.quantize(default_folder, tmp_path / "x.gguf", "bf16", progress=False))
    theirs = default_model
    texts = strings()
    assert [x for x in texts if ours.tokenizer.encode(x) != theirs.tokenizer.encode(x)] == []
    assert ours.tokenizer.chat_template == theirs.tokenizer.chat_template
    stops = ours.generation_config.eos_token_id  # the file knows <|endoftext|> by its text as well
    assert stops[:1] == theirs.generation_config.eos_token_id
    for mine, other in zip(ours.params.layers[29], theirs.params.layers[29], strict=True):
        if mine is not None:
            np.testing.assert_array_equal(widen(mine), widen(other))


def test_the_vocabulary_is_that_of_the_tokenizer(folder):
    path, _ = folder()
    found = GGUFFile(quantized(path, "q8_0")).metadata
    assert {key: found[key] for key in vocabulary()} == vocabulary()
