"""Hostile and broken input: only NpllmError comes out, with a message that says what is wrong;
nothing hangs, nothing large is made.
"""

import importlib.util
import json
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import npllm
from npllm.checkpoints import finite, phi3_layout
from npllm.checkpoints.finite import find_nonfinite
from npllm.checkpoints.phi3_layout import load_params
from npllm.checkpoints.safetensors import read_entries
from npllm.config.config import Config
from npllm.config.strict_json import quote, read_json
from npllm.decoding import GenerationConfig, resolve_options
from npllm.text.tokenizer import Tokenizer

_SPEC = importlib.util.spec_from_file_location(
    "fuzz", Path(__file__).parents[1] / "scripts" / "fuzz.py"
)
fuzz = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz)

MESSAGES = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello"}]
CONFIG = fuzz.phi3_config("Phi-3.5-mini")


@pytest.fixture(scope="module")
def valid():
    """Files of a valid folder, single file."""
    return fuzz.make_folder(fuzz.phi3_config("Phi-3-mini-4k"), 0)


@pytest.fixture(scope="module")
def sharded():
    """Files of a valid folder, two files and an index."""
    return fuzz.make_folder(fuzz.phi3_config("Phi-3-mini-4k"), 1)


def write(folder, files, **changes):
    """Write a folder; a change is named like the file's stem."""
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(changes.get(name.split(".")[0], data))
    return folder


def header_of(data):
    n_header = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n_header]), data[8 + n_header :]


def with_header(header, body, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def message(error, call, *args):
    """The text of the error that a call must raise; it must be fit to print."""
    with pytest.raises(error) as caught:
        call(*args)
    assert isinstance(caught.value, npllm.NpllmError)
    assert str(caught.value).isprintable()
    return str(caught.value)


def peak_bytes(call):
    """Run a call; return (its result or error, most bytes that Python held)."""
    tracemalloc.start()
    try:
        call()
    except npllm.NpllmError as error:
        return error, tracemalloc.get_traced_memory()[1]
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return None, peak


def refused(valid, tmp_path, data):
    """Message for a model.safetensors."""
    folder = write(tmp_path / "m", valid, model=data)
    text = message(OSError, read_entries, folder)
    assert text.startswith(f"{folder}/model.safetensors: is not a readable safetensors file (")
    assert text.endswith("; is the download complete?")
    return text.split("file (", 1)[1]


# ------------------------------------------------------------------------------------------- safetensors


def test_a_truncated_file(valid, tmp_path):
    data = valid["model.safetensors"]
    assert "not fully covered" in refused(valid, tmp_path, data[:-1]) or "Metadata" in refused(
        valid, tmp_path, data[:-1]
    )
    for keep in (0, 1, 7, 8, 9, 100):
        refused(valid, tmp_path, data[:keep])


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**31, 2**25 + 1])
def test_a_header_longer_than_the_file(valid, tmp_path, length):
    data = valid["model.safetensors"]
    text = refused(valid, tmp_path, length.to_bytes(8, "little") + data[8:])
    assert text.startswith(
        f"its header should have {length} bytes, but the file has {len(data)}, and a header may have at most 33554432)"
    )


def test_a_header_of_no_bytes_and_an_empty_file(valid, tmp_path):
    assert "its header should have 0 bytes, but the file has 0" in refused(valid, tmp_path, b"")
    refused(valid, tmp_path, bytes(8))
    assert "its header should have" not in refused(valid, tmp_path, with_header({}, b"abc"))


def test_a_large_header_is_refused_before_it_is_read(valid, tmp_path):
    folder = write(tmp_path / "m", valid)
    with (folder / "model.safetensors").open("r+b") as file:
        file.write((2**26).to_bytes(8, "little"))
        file.truncate(2**27)  # a hole in the file system
    error, peak = peak_bytes(lambda: read_entries(folder))
    assert isinstance(error, npllm.NpllmError)
    assert peak < 2**20


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda e, _: e.update(data_offsets=[e["data_offsets"][0] + 8, e["data_offsets"][1]]),
            "invalid offset|InvalidOffset|Tensor",
        ),
        (lambda e, n: e.update(data_offsets=[0, n + 4]), ""),
        (lambda e, _: e.update(data_offsets=[-4, 4]), "invalid value|integer"),
        (lambda e, _: e.update(data_offsets=e["data_offsets"][::-1]), ""),
        (lambda e, _: e.update(data_offsets=[2**63, 2**63 + 4]), ""),
        (lambda e, _: e.update(data_offsets=[0, 2**64]), ""),
        (lambda e, _: e.update(data_offsets=[0]), ""),
        (lambda e, _: e.update(data_offsets="0"), ""),
        (lambda e, _: e.update(dtype="F33"), "unknown variant|F33"),
        (lambda e, _: e.update(dtype="f32"), ""),
        (lambda e, _: e.update(dtype=5), ""),
        (lambda e, _: e.update(dtype="F64"), ""),
        (lambda e, _: e.update(shape=[1]), ""),
        (lambda e, _: e.update(shape=[2**62, 8]), ""),
        (lambda e, _: e.update(shape=[2**32, 2**32]), ""),
        (lambda e, _: e.update(shape=[2**64]), ""),
        (lambda e, _: e.update(shape=[-32, -1]), ""),
        (lambda e, _: e.update(shape=[32.0]), ""),
        (lambda e, _: e.update(shape=None), ""),
        (lambda e, _: e.pop("dtype"), "dtype"),
        (lambda e, _: e.pop("shape"), "shape"),
        (lambda e, _: e.pop("data_offsets"), "data_offsets"),
    ],
)
def test_a_field_that_cannot_be(valid, tmp_path, change, reason):
    header, body = header_of(valid["model.safetensors"])
    change(header["model.norm.weight"], len(body))
    text = refused(valid, tmp_path, with_header(header, body))
    assert not reason or any(part in text for part in reason.split("|"))


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b"null",
        b"[" * 3000,
        b'{"a":' * 3000,
        b"\xff\xfe{}",
        b'{"a": 1}',
        b'{"a": {}}',
        b'{"a": NaN}',
        b'{"\\ud800": {}}',
        b'{"__metadata__": 5}',
        b"\xef\xbb\xbf{}",
    ],
)
def test_a_header_that_is_none(valid, tmp_path, header):
    refused(valid, tmp_path, with_header(header, b""))


def test_two_tensors_of_one_name(valid, tmp_path):
    header, body = header_of(valid["model.safetensors"])
    text = (
        json.dumps(header)[:-1]
        + ', "model.norm.weight": '
        + json.dumps(header["model.norm.weight"])
        + "}"
    )
    assert "it names 'model.norm.weight' twice" in refused(
        valid, tmp_path, with_header(text.encode(), body)
    )
    text = json.dumps(header).replace('"dtype": "BF16"', '"dtype": "F32", "dtype": "BF16"', 1)
    refused(valid, tmp_path, with_header(text.encode(), body))


def test_two_tensors_over_the_same_bytes(valid, tmp_path):
    header, body = header_of(valid["model.safetensors"])
    header["model.norm.weight"]["data_offsets"] = header["model.layers.0.input_layernorm.weight"][
        "data_offsets"
    ]
    refused(valid, tmp_path, with_header(header, body))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "U8", "I8", "BOOL", "I16", "I64"])
def test_a_dtype_that_is_no_weight(valid, tmp_path, dtype):
    header, body = header_of(valid["model.safetensors"])
    entry = header["model.norm.weight"]
    tensors = {
        name: (e["dtype"], e["shape"], body[slice(*e["data_offsets"])])
        for name, e in header.items()
        if name != "__metadata__"
    }
    size = {"I16": 2, "I64": 8}.get(dtype, 1)
    tensors["model.norm.weight"] = dtype, entry["shape"], bytes(size * 32)
    folder = write(tmp_path / "m", valid, model=fuzz.write_safetensors(tensors))
    assert read_entries(folder)["model.norm.weight"].dtype == dtype
    assert message(ValueError, npllm.load, folder) == (
        f"{folder}: the tensors do not fit config.json; dtype not one of BF16, F16, F32, F64: model.norm.weight is {dtype}"
    )


def test_names_with_terminal_codes_are_not_printed(valid, tmp_path):
    header, body = header_of(valid["model.safetensors"])
    tensors = {"\x1b[31m": ("U8", [1], b"a")}
    tensors |= {
        name: (e["dtype"], e["shape"], body[slice(*e["data_offsets"])])
        for name, e in header.items()
        if name != "__metadata__"
    }
    folder = write(tmp_path / "m", valid, model=fuzz.write_safetensors(tensors))
    assert message(ValueError, npllm.load, folder).endswith(r"unknown: \x1b[31m")


@pytest.mark.parametrize("n_odd", range(1, 8))
@pytest.mark.parametrize("name", ["Phi-3-mini-4k", "Phi-4-reasoning", "Phi-3.5-mini"])
def test_misaligned_tensors_are_copied_not_misread(tmp_path, name, n_odd):
    files = fuzz.make_folder(fuzz.phi3_config(name), 0)
    even, odd = write(tmp_path / "even", files), write(tmp_path / "odd", files)
    header, body = header_of(files["model.safetensors"])
    text = json.dumps(header).encode()
    (odd / "model.safetensors").write_bytes(
        with_header(text + b" " * (-len(text) % 8 + n_odd), body)
    )
    a, b = (load_params(folder, Config.from_json(folder)) for folder in (even, odd))
    for x, y in (
        (a.embed_tokens, b.embed_tokens),
        (a.layers[0].qkv_proj, b.layers[0].qkv_proj),
        (a.norm, b.norm),
    ):
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()
        assert y.flags.aligned


def test_a_file_that_shrinks_meanwhile(valid, tmp_path, monkeypatch):
    folder = write(tmp_path / "m", valid)
    entries = read_entries(folder)
    for module in (finite, phi3_layout):
        monkeypatch.setattr(module, "read_entries", lambda _: entries)
    (folder / "model.safetensors").write_bytes(valid["model.safetensors"][:3000])
    assert "cannot be mapped into memory" in message(
        OSError, load_params, folder, Config.from_json(folder)
    )
    assert "ends within a tensor; did it change meanwhile?" in message(
        OSError, find_nonfinite, folder
    )


# ------------------------------------------------------------------------------------------- index and folder


def index_with(sharded, tmp_path, weight_map):
    folder = write(tmp_path / "m", sharded)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "../m/model-00001-of-00002.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "C:\\x",
        "x\0y",
        "\x1b[2J",
        None,
        5,
        True,
        ["model-00001-of-00002.safetensors"],
        {"a": "b"},
        "./model-00001-of-00002.safetensors",
    ],
)
def test_an_index_that_leads_out_of_the_folder_or_nowhere(sharded, tmp_path, name):
    weight_map = json.loads(sharded["model.safetensors.index.json"])["weight_map"] | {
        "model.norm.weight": name
    }
    folder = index_with(sharded, tmp_path, weight_map)
    (tmp_path / "m" / "sub").mkdir()
    assert message(ValueError, read_entries, folder) == (
        f"{folder}/model.safetensors.index.json: may only name files of its own folder, got {quote(name)}"
    )


def test_an_index_that_names_what_is_missing(sharded, tmp_path):
    weight_map = json.loads(sharded["model.safetensors.index.json"])["weight_map"]
    folder = index_with(sharded, tmp_path, weight_map | {"x": "model-00009-of-00002.safetensors"})
    assert (
        message(OSError, read_entries, folder)
        == f"{folder}/model-00009-of-00002.safetensors: no such file; is the download complete?"
    )
    folder = index_with(sharded, tmp_path, weight_map | {"x": "y" * 300})
    assert message(OSError, read_entries, folder).endswith(
        "no such file; is the download complete?"
    )
    folder = index_with(sharded, tmp_path, weight_map | {"x": "model-00001-of-00002.safetensors"})
    assert message(ValueError, read_entries, folder).endswith(
        "names tensors that the files do not hold: x in model-00001-of-00002.safetensors"
    )
    folder = index_with(sharded, tmp_path, weight_map | {"x": "pytorch_model.bin"})
    assert (
        "index.json: 'pytorch_model.bin' may hold Python pickles, which can run any code when they are opened and are refused"
        in (message(ValueError, read_entries, folder))
    )


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 5, [["a", "b"]]])
def test_an_index_without_a_map(sharded, tmp_path, weight_map):
    folder = index_with(sharded, tmp_path, weight_map)
    assert message(ValueError, read_entries, folder).endswith(
        f"must have a weight_map from tensor names to files, got {weight_map!r}"
    )


def test_a_tensor_in_two_files(sharded, tmp_path):
    folder = write(tmp_path / "m", sharded)
    first = sharded["model-00001-of-00002.safetensors"]
    header, body = header_of(first)
    other, _ = header_of(sharded["model-00002-of-00002.safetensors"])
    name = next(name for name in other if name.endswith("norm.weight"))
    tensors = {
        n: (e["dtype"], e["shape"], body[slice(*e["data_offsets"])])
        for n, e in header.items()
        if n != "__metadata__"
    }
    tensors[name] = other[name]["dtype"], other[name]["shape"], bytes(64)
    (folder / "model-00001-of-00002.safetensors").write_bytes(fuzz.write_safetensors(tensors))
    assert message(ValueError, read_entries, folder).endswith(
        f"tensors that are in more than one file: {name}"
    )


def test_links_inside_a_folder_may_lead_elsewhere(sharded, tmp_path):
    blobs, folder = write(tmp_path / "blobs", sharded), tmp_path / "snapshot"
    folder.mkdir()
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(file)
    assert npllm.load(folder)(np.array([[1, 2]])).shape == (1, 2, 320)
    (blobs / "model-00002-of-00002.safetensors").unlink()
    assert "no such file" in message(OSError, npllm.load, folder)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "a.ckpt", "a.pkl"]
)
def test_a_folder_of_pickles(valid, tmp_path, name):
    files = {file: data for file, data in valid.items() if file != "model.safetensors"} | {
        name: b"\x80\x04cos\nsystem\n."
    }
    folder = write(tmp_path / "m", files)
    assert message(OSError, npllm.load, folder) == (
        f"{folder}: holds neither model.safetensors nor model.safetensors.index.json; {name} may hold Python pickles, which can run any "
        "code when they are opened and are refused; convert them to safetensors with a tool you trust"
    )


def test_a_pickle_under_the_name_of_safetensors(valid, tmp_path):
    refused(valid, tmp_path, b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.")


def test_remote_code_is_never_run(valid, tmp_path):
    config = json.loads(valid["config.json"]) | {
        "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    }
    folder = write(tmp_path / "m", valid, config=json.dumps(config).encode())
    (folder / "modeling_phi3.py").write_text(
        "import sys; sys.this_ran = True; raise SystemExit('this ran')"
    )
    assert npllm.load(folder).config.architectures == ("Phi3ForCausalLM",)
    assert not hasattr(sys, "this_ran") and "modeling_phi3" not in sys.modules


# ------------------------------------------------------------------------------------------- config and other json


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "sliding_window",
    ],
)
@pytest.mark.parametrize(
    "value",
    [0, -1, 2**24 + 1, 2**63, 10**400, 1.0, True, "32", [32], float("nan"), float("inf"), {}],
)
def test_sizes_that_cannot_be_are_refused_before_anything_is_made(key, value):
    def parse():
        Config.from_json(CONFIG | {key: value})

    largest = 2**12 if key == "num_hidden_layers" else 2**24
    assert (
        message(ValueError, parse)
        == f"config: {key} must be an integer in 1 ... {largest}, got {quote(value)}"
    )
    assert peak_bytes(parse)[1] < 2**18


def test_the_largest_sizes_are_refused_before_anything_is_made(valid, tmp_path):
    config = json.loads(valid["config.json"]) | {
        "vocab_size": 2**24,
        "hidden_size": 2**24,
        "intermediate_size": 2**24,
        "num_hidden_layers": 2**12,
    }
    folder = write(tmp_path / "m", valid, config=json.dumps(config).encode())
    error, peak = peak_bytes(lambda: npllm.load(folder))
    assert "the tensors do not fit config.json; missing: " in str(error)
    assert peak < 2**26


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("rope_theta", True, "a finite number"),
        ("rope_theta", float("nan"), "a finite number"),
        ("rope_theta", 10**400, "a finite number"),
        ("rms_norm_eps", float("inf"), "a finite number"),
        ("rms_norm_eps", "1e-5", "a finite number"),
        ("rms_norm_eps", [1], "a finite number"),
        ("tie_word_embeddings", 1, "true or false"),
        ("tie_word_embeddings", "true", "true or false"),
        ("hidden_act", 5, "a string"),
        ("bos_token_id", -1, "a token id or null"),
        ("bos_token_id", True, "a token id or null"),
        ("pad_token_id", 2**31, "a token id or null"),
        ("pad_token_id", 1.0, "a token id or null"),
        ("eos_token_id", [1, "2"], "a token id, a list of them or null"),
        ("eos_token_id", 10**30, "a token id, a list of them or null"),
        ("eos_token_id", [[1]], "a token id, a list of them or null"),
        ("quantization_config", [4], "an object or null"),
        ("torch_dtype", ["bfloat16"], "a string"),
        ("num_labels", -3, "an integer in 1 ... 16777216"),
    ],
)
def test_values_of_the_wrong_kind(key, value, wanted):
    shown = [value] if key == "eos_token_id" and not isinstance(value, list) else value
    assert (
        message(ValueError, Config.from_json, CONFIG | {key: value})
        == f"config: {key} must be {wanted}, got {quote(shown)}"
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": ["phi3"]}, "model_type must be one of phi3, llama, got ['phi3']"),
        ({"model_type": {"a": {}}}, "model_type must be one of phi3, llama, got {'a': {}}"),
        (
            {"torch_dtype": "int8"},
            "dtype must be one of bfloat16, float16, float32, float64, got 'int8'",
        ),
        ({"architectures": ["Phi3ForCausalLM", ["x"]]}, "architectures must be one of"),
        ({"architectures": {}}, "architectures must be one of"),
        ({"architectures": [["Phi3ForCausalLM"]]}, "architectures must be one of"),
        ({"rope_scaling": [1]}, "rope_scaling must be null or an object, got [1]"),
        ({"rope_scaling": "longrope"}, "rope_scaling must be null or an object, got 'longrope'"),
        ({"rope_theta": 1e30}, "rope_theta must be above 1 and below 1e30, got 1e+30"),
        ({"rope_theta": -5}, "rope_theta must be above 1"),
        (
            {"partial_rotary_factor": 1e299},
            "head_dim * partial_rotary_factor must be even and in 2 ... head_dim",
        ),
        (
            {"partial_rotary_factor": -1},
            "head_dim * partial_rotary_factor must be even and in 2 ... head_dim",
        ),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads must be a multiple of num_key_value_heads, got 4 and 3",
        ),
        ({"pad_token_id": 320}, "pad_token_id must be below vocab_size = 320, got 320"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be at least 0"),
    ],
)
def test_values_that_contradict(changes, text):
    assert message(ValueError, Config.from_json, CONFIG | changes).startswith("config: " + text)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"short_factor": [1.0] * 3},
            "short_factor must hold d_rope/2 = 4 positive numbers, got 3",
        ),
        (
            {"long_factor": [1.0, 1.0, 1.0, 0.0]},
            "long_factor must hold d_rope/2 = 4 positive numbers, got 4",
        ),
        (
            {"long_factor": [1.0, 1.0, 1.0, float("nan")]},
            "rope_parameters: long_factor must be a finite number, got nan",
        ),
        ({"long_factor": [1.0, 1.0, 1.0, None]}, "rope_parameters: long_factor must be"),
        (
            {"long_factor": "1111"},
            "rope_parameters: long_factor must be a list of numbers, got '1111'",
        ),
        ({"short_factor": None}, "rope_type longrope needs short_factor, which is missing"),
        ({"type": 5}, "rope_parameters: type must be a string, got 5"),
        ({"type": "ntk"}, "rope_type must be one of default, longrope"),
        ({"factor": -2.0}, "factor must be above 1e-9 and below 1e9, got -2.0"),
        ({"factor": 1e-300}, "factor must be above 1e-9"),
        ({"attention_factor": 1e10}, "attention_factor must be above 1e-9 and below 1e9"),
        ({"mscale": -1}, "mscale must be at least 0 and below 1e9, got -1.0"),
        (
            {"original_max_position_embeddings": -1},
            "rope_parameters: original_max_position_embeddings must be an integer",
        ),
    ],
)
def test_rope_parameters_that_cannot_be(changes, text):
    config = CONFIG | {"rope_scaling": CONFIG["rope_scaling"] | changes}
    assert text in message(ValueError, Config.from_json, config)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"[1]", "must hold a JSON object {...}, got list"),
        (b"null", "got NoneType"),
        (b"\xff{}", "is not UTF-8 text (invalid start byte at byte 0)"),
        ("{}".encode("utf-16"), "is not UTF-8 text"),
        (b'{"a": "\xc3"}', "is not UTF-8 text"),
        (b"[" * 100000, "is nested too deeply to be a configuration"),
        (b'{"a":' * 100000, "is nested too deeply to be a configuration"),
        (b'{"a": 1, "a": 1}', "it names 'a' twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON (Exceeds the limit"),
        (b"{}\0", "is not valid JSON"),
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "model.safetensors.index.json",
    ],
)
def test_json_that_is_none(sharded, tmp_path, name, data, text):
    folder = write(tmp_path / "m", sharded)
    (folder / name).write_bytes(data)
    full = message(npllm.NpllmError, npllm.load, folder)
    assert full.startswith(f"{folder}/{name}: ")
    assert text in full


def test_a_byte_order_mark_is_skipped(valid, tmp_path):
    folder = write(tmp_path / "m", valid, config=b"\xef\xbb\xbf" + valid["config.json"])
    assert Config.from_json(folder).vocab_size == 320


def test_a_large_json_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**30)
    error, peak = peak_bytes(lambda: read_json(tmp_path / "config.json"))
    assert str(error).endswith(f"config.json: has {2**30} bytes; more than {2**25} are refused")
    assert peak < 2**20


def test_values_are_quoted_however_deep_long_or_strange():
    deep = 1
    for _ in range(100000):
        deep = [deep]
    assert quote(deep) == "[[[[...]]]]" or len(quote(deep)) < 50
    assert len(quote("x" * 10**6)) < 200
    assert quote(10**5000) == "a int too large to show"
    assert quote("\ud800\x1b") == r"'\ud800\x1b'"
    while isinstance(deep, list):
        deep = deep[0]


def test_surrogates_and_terminal_codes_in_keys_and_values():
    with pytest.warns(
        UserWarning, match=r"unknown keys are ignored: \\x1b\[31m, \\ud800$"
    ) as caught:
        Config.from_json(CONFIG | {"\ud800": 1, "\x1b[31m": 2})
    assert str(caught[0].message).isprintable()
    assert message(ValueError, Config.from_json, CONFIG | {"hidden_act": "\ud800"}).endswith(
        r"got '\ud800', which is not implemented"
    )


@pytest.mark.parametrize("path", [5, None, b"x\xff", 1.5])
def test_a_path_that_is_none(path):
    if not isinstance(path, bytes):
        assert "path_or_dict must be a path or a dict, got" in message(
            TypeError, Config.from_json, path
        )
    else:
        message(npllm.NpllmError, Config.from_json, path)


@pytest.mark.parametrize("path", ["", "\0", "x" * 5000, "no/such/config.json"])
def test_a_path_that_leads_nowhere(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(npllm.NpllmError, match=r"cannot be read"):
        Config.from_json(path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"eos_token_id": "2"}, "eos_token_id must be token ids"),
        ({"eos_token_id": [-1]}, "eos_token_id must be token ids"),
        ({"eos_token_id": 10**30}, "eos_token_id must be token ids"),
        ({"eos_token_id": [[2]]}, "eos_token_id must be token ids"),
        (
            {"pad_token_id": 320},
            "pad_token_id must be a token id below vocab_size = 320, or -1 for none, got 320",
        ),
        ({"pad_token_id": True}, "got True"),
        ({"do_sample": "false"}, "do_sample must be True or False, got 'false'"),
        ({"do_sample": 1}, "do_sample must be True or False, got 1"),
        ({"temperature": float("nan")}, "temperature must be a number of at least 0, got nan"),
        ({"temperature": 10**400}, "temperature must be"),
        ({"temperature": "0.7"}, "temperature must be"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"top_k": 2**63}, "top_k must be"),
        ({"top_p": float("inf")}, "top_p must be a number in 0 ... 1, got inf"),
        ({"min_p": []}, "min_p must be"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0"),
        ({"repetition_penalty": -1e400}, "repetition_penalty must"),
    ],
)
def test_generation_settings_that_cannot_be(valid, tmp_path, changes, text):
    data = json.loads(valid["generation_config.json"]) | changes
    folder = write(tmp_path / "m", valid, generation_config=json.dumps(data).encode())
    config = Config.from_json(folder)

    def used():
        settings = GenerationConfig.from_folder(folder, config)
        resolve_options(settings, do_sample=None if "do_sample" in changes else True)

    full = message(ValueError, used)
    assert full.startswith(f"{folder}/generation_config.json: ")
    assert text in full


# ------------------------------------------------------------------------------------------- weights that are no numbers


def test_find_nonfinite_counts_nan_and_infinity_in_every_dtype(tmp_path):
    tensors = {
        "fine": ("F32", [4], np.array([0, -0.0, 3e38, 1e-45], "<f4").tobytes()),
        "b": ("BF16", [4], np.array([0x7F80, 0xFF80, 0x7FC0, 0x7F7F], "<u2").tobytes()),
        "h": ("F16", [3], np.array([np.nan, 1, -np.inf], "<f2").tobytes()),
        "f": ("F32", [2], np.array([np.nan, -np.nan], "<f4").tobytes()),
        "d": ("F64", [1], np.array([np.inf], "<f8").tobytes()),
        "i": ("I64", [1], b"\xff" * 8),
        "empty": ("F32", [0], b""),
    }
    (tmp_path / "model.safetensors").write_bytes(fuzz.write_safetensors(tensors))
    assert find_nonfinite(tmp_path) == {"b": (1, 2), "h": (1, 1), "f": (2, 0), "d": (0, 1)}
    assert list(find_nonfinite(tmp_path)) == ["b", "d", "f", "h"]


def test_find_nonfinite_looks_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr(finite, "BLOCK", 1000)
    x = np.zeros(10**6, "<f4")
    x[[0, 999, 1000, -1]] = np.nan
    (tmp_path / "model.safetensors").write_bytes(
        fuzz.write_safetensors({"x": ("F32", [10**6], x.tobytes())})
    )
    found = []
    _, peak = peak_bytes(lambda: found.append(find_nonfinite(tmp_path)))
    assert found == [{"x": (4, 0)}]
    assert peak < 2**20


def test_weights_without_end_load_and_are_found(valid, tmp_path):
    header, body = header_of(valid["model.safetensors"])
    folder = write(tmp_path / "m", valid, model=with_header(header, b"\xff" * len(body)))
    npllm.load(folder)
    assert len(find_nonfinite(folder)) == len(header) - 1


# ------------------------------------------------------------------------------------------- tokenizer


def test_ids_beyond_the_embedding(valid, tmp_path):
    data = json.loads(valid["tokenizer.json"])
    data["added_tokens"].append(
        {
            "id": 320,
            "content": "<|late|>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    )
    data["model"]["vocab"]["<|late|>"] = 320
    model = npllm.load(write(tmp_path / "m", valid, tokenizer=json.dumps(data).encode()))
    assert isinstance(model.generate("hi", max_new_tokens=1, do_sample=False), str)
    assert message(ValueError, model.generate, "hi <|late|>") == (
        "input_ids must lie in 0 ... vocab_size - 1 = 319, got 74 ... 320; is this the tokenizer of another model?".replace(
            "74", str(min(model.tokenizer.encode("hi <|late|>")))
        )
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b"[" * 100000,
        b'{"version": "1.0", "model": {"type": "BPE"}}',
        b"\xef\xbb\xbf{}",
    ],
)
def test_a_tokenizer_that_is_none(valid, tmp_path, data):
    folder = write(tmp_path / "m", valid, tokenizer=data)
    assert message(ValueError, Tokenizer.from_folder, folder).startswith(
        f"{folder}/tokenizer.json: is not a tokenizer that the tokenizers library can read ("
    )


@pytest.mark.parametrize("merge", [["\u00e9", "i"], "h", ["h", "i", "x"], ["", ""], 5])
def test_merges_that_cannot_be(valid, tmp_path, merge):
    data = json.loads(valid["tokenizer.json"])
    data["model"]["merges"].append(merge)
    data["model"]["continuing_subword_prefix"] = "##"
    folder = write(tmp_path / "m", valid, tokenizer=json.dumps(data).encode())
    message(ValueError, Tokenizer.from_folder, folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"chat_template": 5},
        {"chat_template": {"a": 1}},
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"x": {}}},
        {"added_tokens_decoder": {"1": {"content": 5}}},
        {"added_tokens_decoder": {"1": None}},
        {"eos_token": "\ud800"},
    ],
)
def test_settings_of_the_wrong_kind(valid, tmp_path, changes):
    data = json.loads(valid["tokenizer_config.json"]) | changes
    folder = write(tmp_path / "m", valid, tokenizer_config=json.dumps(data).encode())
    assert message(ValueError, Tokenizer.from_folder, folder).startswith(
        f"{folder}/tokenizer_config.json: "
    )


@pytest.mark.parametrize(
    "named",
    [[], [5], [{"name": ["default"], "template": "x"}], [{"template": "x"}], [{"name": "default"}]],
)
def test_named_templates_of_which_none_is_the_default(valid, tmp_path, named):
    data = json.loads(valid["tokenizer_config.json"]) | {"chat_template": named}
    tokenizer = Tokenizer.from_folder(
        write(tmp_path / "m", valid, tokenizer_config=json.dumps(data).encode())
    )
    assert "has no chat template" in message(ValueError, tokenizer.apply_chat_template, MESSAGES)


def test_unknown_token_flags_print_nothing(valid, tmp_path, capfd):
    data = json.loads(valid["tokenizer_config.json"])
    data["added_tokens_decoder"]["2"]["colour"] = 5
    Tokenizer.from_folder(write(tmp_path / "m", valid, tokenizer_config=json.dumps(data).encode()))
    assert capfd.readouterr() == ("", "")


def test_a_template_file_that_is_no_text(valid, tmp_path):
    folder = write(tmp_path / "m", valid)
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{")
    assert "chat_template.jinja: cannot be read as UTF-8 text" in message(
        OSError, Tokenizer.from_folder, folder
    )


@pytest.mark.parametrize("ids", [5.5, ["x"], [-1], [2**32], [10**30], [None], "ab"])
def test_ids_that_are_none(valid, tmp_path, ids):
    tokenizer = Tokenizer.from_folder(write(tmp_path / "m", valid))
    assert message(TypeError, tokenizer.decode, ids).startswith(
        "ids must be a sequence of token ids, integers from 0 ("
    )
    assert tokenizer.decode([2**32 - 1]) == ""


def test_text_that_is_none(valid, tmp_path):
    tokenizer = Tokenizer.from_folder(write(tmp_path / "m", valid))
    assert "must be valid Unicode" in message(TypeError, tokenizer.encode, "\ud800")
    assert message(TypeError, tokenizer.encode, b"x") == "text must be a str, got bytes"


def test_a_panic_of_the_library_is_an_error():
    class PanicException(BaseException):  # as pyo3 names it
        pass

    class Panicking:
        def __init__(self, error):
            self.error = error

        def encode(self, *_, **__):
            raise self.error

        def token_to_id(self, _):
            return None

    assert (
        message(ValueError, Tokenizer(Panicking(PanicException("at x.rs"))).encode, "hi")
        == "tokenizer.json cannot encode this text (at x.rs)"
    )
    with pytest.raises(KeyboardInterrupt):
        Tokenizer(Panicking(KeyboardInterrupt())).encode("hi")


@pytest.mark.parametrize(
    "messages",
    [
        5,
        None,
        "hi",
        [5],
        [{}],
        [{"role": 5, "content": "x"}],
        [{"role": "user"}],
        {"role": "user", "content": "x"},
    ],
)
def test_messages_that_are_none(valid, tmp_path, messages):
    tokenizer = Tokenizer.from_folder(write(tmp_path / "m", valid))
    message(npllm.NpllmError, tokenizer.apply_chat_template, messages)


# ------------------------------------------------------------------------------------------- fuzz


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        worker = fuzz.Worker("hypothesis", tmp_path_factory.mktemp("fuzz"))
        worker.check_valid(npllm.kernels.tiled_ops())
    return worker


def check_case(worker, number, ops=None):
    """A mutated folder gives an NpllmError or works: `run_case` lets nothing else pass."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        name, kind, files = worker.files(number)
        folder, valid = worker.scratch / name, worker.folders[name]
        worker.write(folder, files, valid)
        start = time.monotonic()
        try:
            fuzz.run_case(folder, kind, ops)
        finally:
            worker.write(folder, valid, files)
        assert time.monotonic() - start < 60


FUZZ = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@settings(max_examples=40, **FUZZ)
@given(number=st.integers(0, 2**40))
def test_mutated_folders(worker, number):
    """Without the compiled set: Numba would compile for every mixture of dtypes that a mutation
    makes.
    """
    check_case(worker, number, npllm.kernels.tiled_ops())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_is_mutated_is_valid_in_the_set_that_this_machine_gets(worker):
    worker.check_valid()


@pytest.mark.slow
@settings(max_examples=300, **FUZZ)
@given(number=st.integers(0, 2**40))
def test_many_mutated_folders(worker, number):
    """In the set that this machine gets; scripts/fuzz.py goes on for as long as it is asked to."""
    check_case(worker, number)


def test_the_fuzzer_sees_what_it_looks_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(npllm.Config, "from_json", classmethod(lambda *_: {}["x"]))
    with pytest.raises(KeyError):
        fuzz.run_case(tmp_path)
    counts = {("config", "loads and runs"): 2, ("weights", "NpllmOSError: x"): 1}
    failures = fuzz.report(
        [(3, 2, counts, [(7, "KeyError: x")], (0.1, 1), (5, 2))], [(9, "died")], 1.0
    )
    assert sorted(failures) == [(7, "KeyError: x"), (9, "died")]
    assert "3 mutated folders" in capsys.readouterr().out


def test_a_case_is_a_function_of_seed_and_number(worker):
    again = fuzz.Worker("hypothesis", worker.scratch.parent / "again")
    assert all(worker.files(number) == again.files(number) for number in range(50))
    assert fuzz.category(None) == "loads and runs"
