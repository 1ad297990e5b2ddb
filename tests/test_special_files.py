"""Files that are no files: pipes, devices, folders, files without end.  Each is an NpllmError at
once, whichever file of a folder it is.
"""

import os
import shutil
import signal

import pytest
import sentence
import tiny

import npllm
from npllm.checkpoints.finite import find_nonfinite
from npllm.checkpoints.safetensors import read_entries
from npllm.config import regular_file
from npllm.config.regular_file import is_present, read_regular, read_text
from npllm.errors import NpllmError, NpllmOSError, NpllmValueError

DECODER = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
]
ENCODER = [
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "tokenizer.json",
]
MAKERS = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))


class StillReadingError(BaseException):
    """No OSError, which npllm would translate."""


@pytest.fixture(autouse=True)
def seconds():
    """Fail, rather than hang, after some seconds."""

    def stop(*_):
        raise StillReadingError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 5)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def replace(path, make):
    """Put something else in the place of a file."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    make(path)


def decoder(folder):
    tiny.write_folder(folder)
    tiny.byte_level().save(str(folder / "tokenizer.json"))
    return folder


@makers
@pytest.mark.parametrize("name", DECODER)
def test_no_file_of_a_decoder_may_be_anything_else(tmp_path, name, make):
    folder = decoder(tmp_path)
    replace(folder / name, make)
    with pytest.raises(NpllmError, match=f"{name}: must be a regular file or a link to one"):
        npllm.load(folder)


@makers
@pytest.mark.parametrize("name", ENCODER)
def test_no_file_of_an_encoder_may_be_anything_else(tmp_path, name, make):
    folder = sentence.write(tmp_path, sentence.Case())
    replace(folder / name, make)
    with pytest.raises(NpllmError, match=f"{name}: must be a regular file or a link to one"):
        npllm.load(folder)


@makers
@pytest.mark.parametrize("read", [read_entries, find_nonfinite])
def test_neither_an_index_nor_a_shard(tmp_path, make, read):
    from test_checkpoint import INDEX, write_shards

    for name in (INDEX, "model-00002-of-00003.safetensors"):
        folder = tmp_path / name
        write_shards(folder, tiny.weights())
        replace(folder / name, make)
        with pytest.raises(NpllmOSError, match=f"{name}: must be a regular file"):
            read(folder)


@makers
def test_no_gguf_file(tmp_path, make):
    pytest.importorskip("gguf")
    from npllm.checkpoints.gguf.convert import gguf_to_phi3

    make(tmp_path / "x.gguf")
    with pytest.raises(NpllmOSError, match=r"x\.gguf: (must be a regular file|cannot be read)"):
        gguf_to_phi3(tmp_path / "x.gguf", tmp_path / "out")


@makers
def test_what_is_there_and_no_file_is_not_taken_for_absent(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(NpllmOSError, match="x: must be a regular file or a link to one, but it is"):
        is_present(tmp_path / "x")


def test_a_pipe_that_replaces_a_file_after_it_was_seen(tmp_path, monkeypatch):
    folder = decoder(tmp_path)
    replace(folder / "config.json", os.mkfifo)
    monkeypatch.setattr(regular_file, "is_present", lambda _: True)
    with pytest.raises(NpllmOSError, match="must be a regular file"):
        npllm.Config.from_json(folder / "config.json")


def test_a_file_that_grows_while_it_is_read(tmp_path, monkeypatch):
    """As those of /proc do, which say that they have no bytes."""
    (tmp_path / "x").write_bytes(b"x" * 1000)
    empty = os.stat_result((0o100644, *[0] * 9))
    monkeypatch.setattr(regular_file.os, "fstat", lambda _: empty)
    with pytest.raises(NpllmValueError, match="has 101 bytes; more than 100 are refused"):
        read_regular(tmp_path / "x", 100)
    assert read_regular(tmp_path / "x", 1000) == b"x" * 1000


def test_a_small_file_takes_little_memory_whatever_the_limit(tmp_path, traced_peak):
    (tmp_path / "x").write_bytes(b"x" * 1000)
    assert traced_peak(lambda: read_regular(tmp_path / "x", 2**27)) < 2**17


def test_links_to_files_and_to_nothing(tmp_path):
    (tmp_path / "file").write_text("\ufeffa\r\nb", encoding="utf-8")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "broken").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    assert is_present(tmp_path / "link") and read_text(tmp_path / "link", 100) == "a\nb"
    for name in ("broken", "loop", "none", "file/below", "x\0y"):
        assert not is_present(tmp_path / name)
        with pytest.raises(NpllmOSError, match="cannot be read"):
            read_regular(tmp_path / name, 10)


def test_a_folder_of_links_loads(tmp_path):
    """As huggingface_hub's cache holds them."""
    decoder(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert npllm.load(tmp_path / "snapshot").tokenizer is not None
    shutil.rmtree(tmp_path / "blobs")
    with pytest.raises(NpllmOSError):
        npllm.load(tmp_path / "snapshot")
