"""GGUF files that lie, and conversions that die: an NpllmError, and the folder as it was."""

import json
import os
import struct
import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from test_convert import METADATA, TOKENS, random_tensors, write_gguf  # noqa: E402

import npllm  # noqa: E402
from npllm.checkpoints import convert_gguf, disk  # noqa: E402
from npllm.checkpoints.gguf.convert import gguf_to_phi3  # noqa: E402
from npllm.errors import NpllmOSError, NpllmValueError  # noqa: E402


def text(content):
    raw = content if isinstance(content, bytes) else content.encode()
    return struct.pack("<Q", len(raw)) + raw


def header(n_tensors=0, n_keys=0, version=3, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + rest


def key(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def place(name="a", shape=(4,), kind=0, offset=0):
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + axes + struct.pack("<IQ", kind, offset)


NUL = bytes(200)
LIES = {
    "2**40 tensors": (header(2**40), "should have 1099511627776 tensors"),
    "2**40 values": (header(0, 2**40), "should have 1099511627776 metadata values"),
    "2**64 - 1 values": (header(0, 2**64 - 1), "metadata values"),
    "a text of 2**40 bytes": (header(0, 1, rest=struct.pack("<Q", 2**40) + NUL), "bytes of text"),
    "2**40 texts": (
        header(0, 1, rest=key("a", 9, struct.pack("<IQ", 8, 2**40))),
        "should have 1099511627776 texts",
    ),
    "2**40 numbers": (
        header(0, 1, rest=key("a", 9, struct.pack("<IQ", 4, 2**40))),
        "should have 1099511627776 numbers",
    ),
    "2**40 bytes": (header(0, 1, rest=key("a", 9, struct.pack("<IQ", 0, 2**40))), "numbers"),
    "an array of arrays": (
        header(0, 1, rest=key("a", 9, struct.pack("<IQIQ", 9, 1, 4, 0))),
        "array of arrays",
    ),
    "an unknown type": (header(0, 1, rest=key("a", 13, NUL)), "unknown type 13"),
    "an array of an unknown type": (
        header(0, 1, rest=key("a", 9, struct.pack("<IQ", 77, 0))),
        "unknown type 77",
    ),
    "a key that is not UTF-8": (header(0, 1, rest=key(b"\xff", 8, text("x"))), "is not UTF-8"),
    "a value that is not UTF-8": (header(0, 1, rest=key("a", 8, text(b"\xc3"))), "is not UTF-8"),
    "a tensor that is not UTF-8": (header(1, rest=place(b"\xf0\x9f") + NUL), "is not UTF-8"),
    "a key twice": (
        header(0, 2, rest=2 * key("a", 0, b"\0") + NUL),
        "two metadata values of the name 'a'",
    ),
    "a tensor twice": (header(2, rest=2 * place() + NUL), "two tensors of the name 'a'"),
    "many axes": (header(1, rest=place(shape=[1] * 5) + NUL), "at most 4 axes, got 5"),
    "2**31 axes": (
        header(1, rest=text("a") + struct.pack("<I", 2**31) + NUL),
        "at most 4 axes, got 2147483648",
    ),
    "an axis of 0": (header(1, rest=place(shape=(0, 4)) + NUL), r"of shape \[4, 0\]"),
    "a huge axis": (header(1, rest=place(shape=(2**63, 2**63)) + NUL), "but the file has"),
    "part of a block": (header(1, rest=place(shape=(33,), kind=2) + NUL), "whole blocks of 32"),
    "an unknown tensor type": (header(1, rest=place(kind=1000) + NUL), "unknown type 1000"),
    "an offset outside": (header(1, rest=place(offset=2**63) + NUL), "but the file has"),
    "overlapping tensors": (
        header(2, rest=place("a", (32,)) + place("b", (32,), offset=64) + bytes(500)),
        "'a' and 'b' overlap",
    ),
    "an alignment of 0": (
        header(0, 1, rest=key("general.alignment", 4, struct.pack("<I", 0))),
        "must be a power of two, got 0",
    ),
    "an alignment of text": (
        header(0, 1, rest=key("general.alignment", 8, text("32"))),
        "must be a power of two, got 32",
    ),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian, got 50331648"),
    "version 1": (header(version=1), "must be 2 or 3, little-endian, got 1"),
}


@pytest.mark.parametrize(("data", "words"), LIES.values(), ids=list(LIES))
def test_a_header_that_lies(tmp_path, data, words):
    (tmp_path / "x.gguf").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(NpllmValueError, match=words) as caught:
        gguf_to_phi3(tmp_path / "x.gguf", tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value).startswith(f"{tmp_path}/x.gguf: not a complete GGUF file: ")
    assert str(caught.value).isprintable()
    assert peak < 2**20
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"llama.block_count": 10**6}, "num_hidden_layers must be an integer in 1 ... 4096"),
        ({"llama.block_count": 0}, "num_hidden_layers must be an integer in 1 ... 4096, got 0"),
        ({"llama.attention.head_count_kv": 0}, "num_key_value_heads must be an integer in 1"),
        ({"llama.attention.head_count_kv": 3}, "must be a multiple of num_key_value_heads"),
        ({"llama.context_length": 2**31}, "max_position_embeddings must be an integer in 1"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps must be a finite"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "rms_norm_eps must be at least 0"),
        ({"llama.rope.freq_base": float("inf")}, "rope_theta must be a finite"),
        ({"llama.rope.freq_base": 0.0}, "rope_theta"),
        ({"llama.vocab_size": 5}, "at most llama.vocab_size = 5 tokens, got 13"),
        ({"tokenizer.ggml.unknown_token_id": 13}, "unknown_token_id = 13"),
        ({"tokenizer.ggml.eot_token_id": 99}, "below n_vocab = 13, got .*eot_token_id = 99"),
        ({"tokenizer.ggml.tokens": list(range(13))}, "tokens must be a list of str"),
        ({"tokenizer.ggml.token_type": ["x"] * 13}, "token_type must be a list of int"),
        ({"tokenizer.ggml.merges": [1, 2]}, "merges must be a list of str"),
        (
            {"tokenizer.ggml.tokens": [*TOKENS[:2], "x" * 2000, *TOKENS[3:]]},
            "bytes of an added token must be at most 1024, got 2000",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_metadata_that_make_no_checkpoint(tmp_path, change, words):
    path = write_gguf(tmp_path / "x.gguf", random_tensors(), METADATA | change)
    with pytest.raises(NpllmValueError, match=words) as caught:
        gguf_to_phi3(path, tmp_path / "out")
    assert str(caught.value).startswith(f"{path}: ")
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]


# --- ids that end an answer


@pytest.mark.parametrize(
    ("names", "ends"),
    [
        ({}, (2,)),
        ({"eot": 3}, (2, 3)),
        ({"eot": 2}, (2,)),
        ({"eom": 5, "eot": 4}, (2, 4, 5)),
        ({"fim_pad": 6, "fim_rep": 7, "fim_sep": 8}, (2, 6, 7, 8)),
        ({"fim_pre": 6, "mask": 7, "seperator": 8}, (2,)),
    ],
    ids=str,
)
def test_every_id_that_ends_an_answer_counts(tmp_path, names, ends):
    ids = {f"tokenizer.ggml.{name}_token_id": i for name, i in names.items()}
    path = write_gguf(tmp_path / "x.gguf", random_tensors(), METADATA | ids)
    gguf_to_phi3(path, tmp_path / "out")
    model = npllm.load(tmp_path / "out")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == ends
    assert model.tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"]
    assert stored == (2 if ends == (2,) else list(ends))


# --- conversion into a checkpoint that is there

OLD = {
    "config.json": b'{"old": 1}',
    "model.safetensors": b"old weights",
    "chat_template.jinja": b"old template",
    "README.md": b"mine",
}


def old_checkpoint(folder):
    folder.mkdir()
    for name, content in OLD.items():
        (folder / name).write_bytes(content)
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("mine as well")
    return folder


def contents(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


WHOLE_OLD = OLD | {"notes/a.txt": b"mine as well"}
exchanges = pytest.mark.parametrize("how", ["renameat2", "renames"])


@exchanges
def test_conversion_replaces_a_checkpoint_and_keeps_other_files(tmp_path, monkeypatch, how):
    if how == "renames":
        monkeypatch.setattr(disk, "exchange_by_renameat2", lambda *_: False)
    folder = old_checkpoint(tmp_path / "out")
    gguf_to_phi3(write_gguf(tmp_path / "x.gguf", random_tensors()), folder)
    found = contents(folder)
    assert found["README.md"] == b"mine" and found["notes/a.txt"] == b"mine as well"
    assert "chat_template.jinja" not in found, "the template of the other model would be used"
    assert npllm.load(folder).config.hidden_size == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.gguf"]


def test_conversion_into_a_folder_of_other_files_keeps_them(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "package.json").write_text("{}")
    gguf_to_phi3(write_gguf(tmp_path / "x.gguf", random_tensors()), tmp_path / "out")
    assert contents(tmp_path / "out")["package.json"] == b"{}"
    npllm.load(tmp_path / "out")


class DiedError(BaseException):
    """As Ctrl-C or a kill at this point."""


@exchanges
@pytest.mark.parametrize("step", range(12))
def test_a_conversion_that_dies_leaves_the_old_checkpoint_or_the_new(
    tmp_path, monkeypatch, step, how
):
    """The process dies at the step-th call that writes."""
    if how == "renames":
        monkeypatch.setattr(disk, "exchange_by_renameat2", lambda *_: False)
    folder = old_checkpoint(tmp_path / "out")
    path = write_gguf(tmp_path / "x.gguf", random_tensors())
    n_calls = 0

    def dying(call):
        def wrapped(*args, **options):
            nonlocal n_calls
            n_calls += 1
            if n_calls == step + 1:
                raise DiedError
            return call(*args, **options)

        return wrapped

    for module, name in (
        (convert_gguf, "write_weights"),
        (convert_gguf, "write_json"),
        (convert_gguf, "check_loads"),
        (disk.os, "fsync"),
        (disk, "exchange_folders"),
    ):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    try:
        gguf_to_phi3(path, folder)
        died = False
    except DiedError:
        died = True
    monkeypatch.undo()
    assert died == (n_calls > step)
    if died:
        assert contents(folder) == WHOLE_OLD
    else:
        npllm.load(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.gguf"]


def test_a_second_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "exchange_by_renameat2", lambda *_: False)
    folder, calls, rename = old_checkpoint(tmp_path / "out"), [], os.rename

    def refuse_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(16, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(disk.os, "rename", refuse_second)
    with pytest.raises(NpllmOSError, match="cannot be written: Device or resource busy"):
        gguf_to_phi3(write_gguf(tmp_path / "x.gguf", random_tensors()), folder)
    assert contents(folder) == WHOLE_OLD


def test_other_files_that_cannot_be_moved_back_are_not_deleted(tmp_path, monkeypatch):
    folder, rename = old_checkpoint(tmp_path / "out"), os.rename

    def refuse(source, target):
        if source.name == "notes":
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(disk.os, "rename", refuse)
    with pytest.raises(NpllmOSError, match="Permission denied"):
        gguf_to_phi3(write_gguf(tmp_path / "x.gguf", random_tensors()), folder)
    (kept,) = tmp_path.glob("out.partial-*/checkpoint/notes/a.txt")
    assert kept.read_text() == "mine as well"
    npllm.load(folder)


KILLED = """
import os, signal, sys
from npllm.checkpoints import disk
from npllm.checkpoints.gguf import convert as convert_gguf
exchange = disk.exchange_by_renameat2
def kill(*names):
    if sys.argv[3] == "after":
        exchange(*names)
    os.kill(os.getpid(), signal.SIGKILL)
disk.exchange_by_renameat2 = kill
convert_gguf.gguf_to_phi3(sys.argv[1], sys.argv[2])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is of Linux")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_conversion_leaves_the_old_checkpoint_or_the_new(tmp_path, when):
    folder = old_checkpoint(tmp_path / "out")
    path = write_gguf(tmp_path / "x.gguf", random_tensors())
    command = [sys.executable, "-c", KILLED, str(path), str(folder), when]
    done = subprocess.run(command, timeout=120, check=False)
    assert done.returncode == -9
    if when == "before":
        assert contents(folder) == WHOLE_OLD
    else:
        assert npllm.load(folder).config.hidden_size == 64


def test_the_rows_of_a_mapped_file_are_those_of_the_library(tmp_path):
    from gguf import GGMLQuantizationType as Kind

    from npllm.checkpoints.gguf.reader import GGUFFile, dequantized_rows

    tensors = random_tensors()
    kinds = {"blk.0.ffn_up.weight": Kind.Q4_1, "blk.0.ffn_gate.weight": Kind.Q8_0}
    path = write_gguf(tmp_path / "x.gguf", tensors, quantised=kinds)
    ours = GGUFFile(path)
    for theirs in gguf.GGUFReader(path).tensors:
        tensor = ours.tensors[theirs.name]
        assert tensor.shape == tuple(int(n) for n in reversed(theirs.shape))
        rows = np.concatenate(list(dequantized_rows(tensor)))
        wanted = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
        np.testing.assert_array_equal(
            rows.reshape(tensor.shape), wanted.astype(ml_dtypes.bfloat16).reshape(tensor.shape)
        )
