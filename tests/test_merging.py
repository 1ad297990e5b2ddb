"""`npllm.merge`: a folder with LoRA adapters in its weights is the model that was merged in memory."""

import errno
import json
import shutil
import tracemalloc
from pathlib import Path

import lora
import numpy as np
import optional
import oracles
import pytest
import tiny
from close import close
from safetensors.numpy import load_file
from test_adapters import merged_by_hand

import npllm
from npllm import merge_to_folder
from npllm.checkpoints import tensor_writer
from npllm.checkpoints.safetensors import read_entries
from npllm.errors import NpllmOSError, NpllmValueError
from npllm.quantized import adapted

CONFIG = tiny.CONFIG
IDS = tiny.random_ids(2, 9)
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "sliding_window": ...,
    "original_max_position_embeddings": ...,
}
ALL = (*lora.FUSED, "embed_tokens", "lm_head")


@pytest.fixture
def base(tmp_path):
    return tiny.write_folder(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path):
    return lora.write_adapter(tmp_path / "a", lora.factors(CONFIG))


def load(path, **options):
    return npllm.load(path, ops="reference", **options)


def merged(base, adapters, name="out", **options):
    return npllm.merge(base, adapters, base.parent / name, progress=False, **options)


def in_memory(base, folder):
    return load(base, adapter=folder).merge_adapter()


def same_params(one, other):
    """Whether all weights of two models have the same bits and dtypes."""
    first, second = one.params, other.params
    pairs = [(first.embed_tokens, second.embed_tokens), (first.lm_head, second.lm_head)]
    pairs += [p for a, b in zip(first.layers, second.layers, strict=True) for p in zip(a, b)]  # noqa: B905
    for x, y in pairs:
        if x is not None:
            close(x, y, times=0)


# ------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("leaves", [lora.FUSED, ALL, lora.SPLIT, ("k_proj", "up_proj")])
@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["phi3", "llama"])
def test_the_folder_is_the_model_that_was_merged_in_memory(changes, leaves, dtype, tmp_path):
    base = tiny.write_folder(tmp_path / "base", dtype=tiny.DTYPES[dtype], **changes)
    tensors = lora.factors(CONFIG, leaves)
    folder = lora.write_adapter(tmp_path / "a", tensors, leaves)
    written, want = load(merged(base, folder)), in_memory(base, folder)
    same_params(written, want)
    close(written(IDS), want(IDS), times=0)
    assert not np.array_equal(written(IDS), load(base)(IDS))


def test_each_tensor_is_the_sum(base, tmp_path):
    tensors = lora.factors(CONFIG, ALL)
    folder = lora.write_adapter(tmp_path / "a", tensors, ALL)
    want = merged_by_hand(tensors, 2)
    found = load_file(merged(base, folder) / "model.safetensors")
    assert set(found) == set(want)
    for name, x in want.items():
        close(found[name], x)


def test_several_adapters_are_added_and_rounded_once(tmp_path):
    base = tiny.write_folder(tmp_path / "base", dtype=tiny.DTYPES["BF16"])
    both = [lora.factors(CONFIG), lora.factors(CONFIG, ("qkv_proj", "o_proj"), seed=1)]
    folders = [
        lora.write_adapter(tmp_path / f"a{n}", x, ("qkv_proj", "o_proj") if n else lora.FUSED)
        for n, x in enumerate(both)
    ]
    found = load(merged(base, folders)).params.layers[1].qkv_proj
    name = "model.layers.1.self_attn.qkv_proj"
    want = oracles.f64(tiny.weights(dtype=tiny.DTYPES["BF16"])[f"{name}.weight"])
    for x in both:
        a, b = (oracles.f64(x[f"base_model.model.{name}.lora_{k}.weight"]) for k in "AB")
        want = want + 2 * b @ a
    close(found, want.astype(np.float32).astype(found.dtype), times=0)
    close(found, load(merged(base, folders[::-1], "again")).params.layers[1].qkv_proj)


def test_whole_modules_are_stored_in_the_dtype_of_the_checkpoint(tmp_path):
    base = tiny.write_folder(tmp_path / "base", dtype=tiny.DTYPES["BF16"])
    whole = tiny.weights(seed=1)["model.norm.weight"]
    tensors = lora.factors(CONFIG, ("o_proj",)) | {"base_model.model.model.norm.weight": whole}
    folder = lora.write_adapter(tmp_path / "a", tensors, ("o_proj",), modules_to_save=["norm"])
    written, want = load(merged(base, folder)), in_memory(base, folder)
    assert written.params.norm.dtype == want.params.norm.dtype == tiny.DTYPES["BF16"]
    close(written.params.norm, whole.astype(tiny.DTYPES["BF16"]), times=0)
    close(written(IDS), want(IDS), times=0)


@pytest.mark.parametrize("leaf", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("stored", ["embed_tokens", "lm_head", "both"])
def test_of_two_tied_tables_one_is_changed(leaf, stored, tmp_path):
    held = tiny.weights(tiny.config_dict(tie_word_embeddings=True))
    if stored != "embed_tokens":
        held["lm_head.weight"] = held["model.embed_tokens.weight"]
    if stored == "lm_head":
        del held["model.embed_tokens.weight"]
    base = tiny.write_folder(tmp_path / "base", tensors=held, tie_word_embeddings=True)
    tensors = lora.factors(CONFIG, ("qkv_proj", leaf))
    folder = lora.write_adapter(tmp_path / "a", tensors, ("qkv_proj", leaf))
    written, want = load(merged(base, folder)), in_memory(base, folder)
    assert not written.config.tie_word_embeddings
    same_params(written, want)
    close(written(IDS), load(base, adapter=folder)(IDS), times=4)


def test_tables_that_no_adapter_changes_stay_tied(adapter, tmp_path):
    base = tiny.write_folder(tmp_path / "base", tie_word_embeddings=True)
    written = load(merged(base, adapter))
    assert written.config.tie_word_embeddings
    assert written.params.lm_head is written.params.embed_tokens
    close(written(IDS), in_memory(base, adapter)(IDS), times=0)


def test_a_sum_that_the_dtype_cannot_hold_is_an_error(tmp_path):
    base = tiny.write_folder(tmp_path / "base", dtype=np.float16)
    tensors = {k: 400 * x for k, x in lora.factors(CONFIG, ("o_proj",)).items()}
    folder = lora.write_adapter(tmp_path / "a", tensors, ("o_proj",))
    words = r"is larger than float16 can hold"
    with pytest.raises(
        NpllmValueError, match=rf"layers.0.self_attn.o_proj.weight: [0-9e+.]+ {words}"
    ):
        merged(base, folder)
    with pytest.raises(NpllmValueError, match=words):
        load(base, adapter=folder).merge_adapter()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a", "base"]


def test_infinity_of_the_checkpoint_stays():
    x = np.array([np.inf, np.nan, 1.0], np.float32)
    np.testing.assert_array_equal(adapted.rounded(x, np.dtype(np.float16)), x.astype(np.float16))


# ------------------------------------------------------------------------------------------- files


def sharded(folder):
    """Cut the weights of a folder into two files with an index."""
    held = load_file(folder / "model.safetensors")
    names = sorted(held)
    files = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, some in files.items():
        tiny.write_safetensors(folder / file, {name: held[name] for name in some})
    weight_map = {name: file for file, some in files.items() for name in some}
    tiny.write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    (folder / "model.safetensors").unlink()
    return weight_map


def test_several_files_stay_several(base, adapter):
    want, weight_map = in_memory(base, adapter)(IDS), sharded(base)
    out = merged(base, adapter)
    found = json.loads((out / "model.safetensors.index.json").read_text())
    assert found["weight_map"] == weight_map
    entries = read_entries(out)
    assert found["metadata"]["total_size"] == sum(x.stop - x.start for x in entries.values())
    close(load(out)(IDS), want, times=0)


def test_what_a_loader_reads_is_there_and_nothing_else(tmp_path):
    base = tiny.write_text_folder(tmp_path / "base")
    for name in ("chat_template.jinja", "tokenizer.model", "LICENSE", "merges.txt"):
        (base / name).write_text(name)
    for name in ("pytorch_model.bin", "optimizer.pt", "adapter_config.json", "README.md"):
        (base / name).write_text("{}")
    theirs = load(base)
    folder = lora.write_adapter(
        tmp_path / "b", lora.factors(json.loads((base / "config.json").read_text()))
    )
    out = merged(base, folder)
    kept = "LICENSE chat_template.jinja config.json generation_config.json merges.txt".split()
    kept += "model.safetensors tokenizer.json tokenizer.model tokenizer_config.json".split()
    assert sorted(x.name for x in out.iterdir()) == kept
    ours = load(out)
    assert ours.tokenizer.encode("hello <|user|>") == theirs.tokenizer.encode("hello <|user|>")
    assert ours.generation_config == theirs.generation_config or (
        ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id
    )
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (base / "config.json").read_text()
    )


def test_one_tensor_at_a_time_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(adapted, "BAND", 2**14)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    base = tiny.write_folder(tmp_path / "base", **sizes)
    folder = lora.write_adapter(tmp_path / "a", lora.factors(CONFIG | sizes))
    largest = 2 * 512 * 256 * 4
    tracemalloc.start()
    merged(base, folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * largest < (base / "model.safetensors").stat().st_size / 3


# ----------------------------------------------------------------------------------- interruptions


def listing(folder):
    return sorted(str(x.relative_to(folder)) for x in folder.rglob("*"))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [False, True])
def test_an_error_leaves_what_was_there(error, exists, base, adapter, monkeypatch):
    if exists:
        merged(base, adapter)
    before = {x: (base.parent / x).stat().st_ino for x in listing(base.parent)}

    def fail(*_):
        raise error

    monkeypatch.setattr(merge_to_folder.MergedCheckpoint, "release", fail)
    with pytest.raises((NpllmOSError, KeyboardInterrupt)) as caught:
        merged(base, adapter, overwrite=True)
    assert {x: (base.parent / x).stat().st_ino for x in listing(base.parent)} == before
    if isinstance(error, OSError):
        assert "out: cannot be written (No space left): make room" in str(caught.value)


def test_a_disk_without_room_is_named_before_the_work(base, adapter, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1000))
    with pytest.raises(NpllmOSError, match=r"out needs .* MB, but its disk has 0 MB free"):
        merged(base, adapter)
    assert not (base.parent / "out").exists()


def test_an_existing_checkpoint_is_kept_unless_asked(base, adapter):
    out = merged(base, adapter)
    before = (out / "model.safetensors").read_bytes()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(NpllmOSError, match=r"out: exists; .*--force"):
        merged(base, adapter)
    other = lora.write_adapter(base.parent / "b", lora.factors(CONFIG, seed=1))
    merged(base, other, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before
    assert (out / "notes.txt").read_text() == "mine"
    close(load(out)(IDS), in_memory(base, other)(IDS), times=0)
    assert listing(base.parent)[-3:] == [
        "out/config.json",
        "out/model.safetensors",
        "out/notes.txt",
    ]


def test_a_checkpoint_may_be_merged_into_itself(base, adapter):
    want = in_memory(base, adapter)(IDS)
    merged(base, adapter, "base", overwrite=True)
    close(load(base)(IDS), want, times=0)


@pytest.mark.parametrize("name", ["a", "notes", "file", "missing/out"])
def test_a_bad_output_is_named(name, base, adapter):
    (base.parent / "notes").mkdir()
    (base.parent / "notes" / "todo.txt").write_text("mine")
    (base.parent / "file").write_text("mine")
    before = listing(base.parent)
    words = {"a": "holds adapter_config.json and is no checkpoint", "notes": "holds todo.txt"}
    words |= {"file": "file: is a file", "missing/out": "missing: no such folder"}
    with pytest.raises(NpllmOSError, match=words[name]):
        merged(base, adapter, name, overwrite=True)
    assert listing(base.parent) == before


def test_an_empty_folder_is_filled(base, adapter):
    (base.parent / "out").mkdir()
    close(load(merged(base, adapter))(IDS), in_memory(base, adapter)(IDS), times=0)


def test_files_are_read_by_whoever_may_read_new_files(base, adapter):
    (base.parent / "probe").mkdir()
    assert merged(base, adapter).stat().st_mode == (base.parent / "probe").stat().st_mode


# ------------------------------------------------------------------------------- what is no merge


def test_two_adapters_of_which_one_replaces_what_the_other_changes(base, tmp_path):
    head = {"base_model.model.lm_head.weight": tiny.weights(seed=1)["lm_head.weight"]}
    tensors = lora.factors(CONFIG, ("o_proj",)) | head
    one = lora.write_adapter(tmp_path / "a", tensors, ("o_proj",), modules_to_save=["lm_head"])
    tensors = lora.factors(CONFIG, ("lm_head",), layers=[0])
    other = lora.write_adapter(tmp_path / "b", tensors, ("lm_head",))
    for folders in ([one, other], [other, one], [one, one]):
        with pytest.raises(NpllmValueError, match=r"replaces lm_head, which .* changes as well"):
            merged(base, folders)


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    table = {"base_model.model.model.embed_tokens.weight": tiny.weights(seed=1)["lm_head.weight"]}
    folder = lora.write_adapter(tmp_path / "a", lora.factors(CONFIG) | table)
    with pytest.raises(NpllmValueError, match="trained on a model with another embed_tokens"):
        merged(base, folder)


def test_there_must_be_an_adapter_and_safetensors(base, adapter, tmp_path):
    with pytest.raises(NpllmValueError, match="got no adapter"):
        merged(base, [])
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(NpllmValueError, match=r"got the GGUF file .*x.gguf"):
        npllm.merge(tmp_path / "x.gguf", adapter, tmp_path / "y")
    with pytest.raises(NpllmOSError, match="none: holds no adapter_config"):
        merged(base, tmp_path / "none")


# ------------------------------------------------------------------------------- GGUF, and commands


@pytest.mark.parametrize("arch", ["phi3", "llama"])
@pytest.mark.parametrize("leaves", [lora.FUSED, ("qkv_proj", "embed_tokens")])
def test_a_gguf_file_is_that_of_the_merged_folder(arch, leaves, tmp_path):
    gguf_files = pytest.importorskip("gguf_files")
    from test_quantize import SETTINGS, tokenizer

    found = gguf_files.tensors(arch, "F32", tied=True)
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    base = gguf_files.write_twin(tmp_path / "base", found, arch, **ends)
    (base / "tokenizer.json").write_text(tokenizer(arch))
    (base / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    config = json.loads((base / "config.json").read_text())
    folder = lora.write_adapter(tmp_path / "a", lora.factors(config, leaves), leaves)
    ours = npllm.quantize(base, tmp_path / "x.gguf", "q8_0", adapters=folder, progress=False)
    (tmp_path / "again").mkdir()
    out = npllm.merge(base, [folder], tmp_path / "again" / "base", progress=False)
    theirs = npllm.quantize(out, tmp_path / "y.gguf", "q8_0", progress=False)
    assert ours.read_bytes() == theirs.read_bytes()
    with pytest.raises(NpllmValueError, match="merged into the weights of a folder"):
        npllm.quantize(ours, tmp_path / "y.gguf", adapters=folder, overwrite=True)
    f32 = npllm.quantize(base, tmp_path / "z.gguf", "f32", adapters=[folder], progress=False)
    close(load(f32)(IDS), load(out)(IDS), times=4)


def test_the_command_writes_a_folder_and_says_what_it_is(base, adapter):
    out, second = base.parent / "out", lora.write_adapter(base.parent / "b", lora.factors(CONFIG))
    args = ["merge", "-m", str(base), "-o", str(out), "--adapter", str(adapter)]
    result = optional.invoke([*args, "--adapter", str(second), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["folder"] == str(out) and facts["adapters"] == [str(adapter), str(second)]
    assert facts["bytes"] == 4 * facts["parameters"]
    again = optional.invoke(args)
    assert again.exit_code == 1 and "--force" in again.output
    assert optional.invoke([*args, "--force"]).stdout.strip() == str(out)
    close(load(out)(IDS), in_memory(base, adapter)(IDS), times=0)
    assert optional.invoke(args[:-2]).exit_code == 2  # without an adapter


def test_a_header_says_where_each_tensor_lies(tmp_path):
    tensors = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.ones(5), "c": np.int64(3)}
    tensors = {name: np.asarray(x) for name, x in tensors.items()}
    kinds = {"a": "F16", "b": "F64", "c": "I64"}
    layout = {name: (kinds[name], x.shape) for name, x in tensors.items()}
    path = Path(tmp_path / "x.safetensors")
    tensor_writer.write_tensors(path, layout, lambda name: tensors[name], lambda _: None)
    found = load_file(path)
    for name, x in tensors.items():
        np.testing.assert_array_equal(found[name], x)
    assert min(x.start for x in read_entries_of(path).values()) % 64 == 0


def read_entries_of(path):
    from npllm.checkpoints.safetensors import read_header

    return read_header(path)
