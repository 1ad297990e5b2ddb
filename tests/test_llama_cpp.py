"""GGUF files of npllm in llama.cpp, and files of llama.cpp in npllm.

Runs where llama-cpp-python is installed, which CI does not have: `pip install llama-cpp-python`.
"""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import gguf_files
import numpy as np
import pytest
from gguf_files import write_twin
from test_quantize import SETTINGS, tokenizer
from texts import sweep

import npllm
from npllm import ops
from npllm.arrays import is_packed, widen
from npllm.checkpoints.fetch import DEFAULT_GGUF, fetch
from npllm.checkpoints.gguf.reader import GGUFFile
from npllm.checkpoints.gguf.tensor_types import FILE_TYPES, ModelSizes, tensor_type
from npllm.checkpoints.gguf.tokenizer import gguf_tokenizer
from npllm.quantized.stacked import StackedWeight

SCRIPTS = Path(__file__).parents[1] / "scripts"
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(
        importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
    ),
]
ARCHS = ("phi3", "llama")
IDS = np.random.default_rng(3).integers(6, 260, 24)
TEXT = "hello <|user|>w 12 é\n\n b"
# Relative error of logits, activations of products being rounded: to 8 bits with a scale for 32 or
# 256 entries; to 16 bits.
LARGEST = {"f32": 1e-5, "f16": 2e-3, "bf16": 1.5e-2}
LARGEST_BLOCKS = 3e-2


@pytest.fixture(scope="module")
def runs():
    """The module scripts/llama_cpp_runs.py."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("llama_cpp_runs")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def folder(tmp_path):
    """Function architecture -> folder of a tiny model in float32."""

    def make(arch):
        found = gguf_files.tensors(arch, "F32")
        path = write_twin(tmp_path / "model", found, arch, bos_token_id=0, eos_token_id=1)
        (path / "tokenizer.json").write_text(tokenizer(arch))
        (path / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
        return path

    return make


def llama_logits(runs, path, ids):
    """(logits of a file in llama.cpp, its ids of TEXT)."""
    model = runs.LlamaCpp(path, 64, 1)
    try:
        return model.logits(ids), model.tokenize(TEXT)
    finally:
        model.close()


def relative(x, y):
    """Error of logits by their spread."""
    return np.sqrt(np.mean((x - y) ** 2)) / np.std(y)


def check_clear_choices(ours, theirs):
    """The best token is the same wherever the margin exceeds the difference; some are clear."""
    best = np.sort(theirs, axis=-1)[..., -2:]
    is_clear = best[..., 1] - best[..., 0] > 2 * np.abs(ours - theirs).max(axis=-1)
    assert is_clear.any()
    np.testing.assert_array_equal(ours.argmax(-1)[is_clear], theirs.argmax(-1)[is_clear])


# --- npllm's files in llama.cpp


@pytest.mark.parametrize("file_type", FILE_TYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_llama_cpp_loads_every_type_and_computes_the_same(runs, folder, tmp_path, arch, file_type):
    path = npllm.quantize(folder(arch), tmp_path / "x.gguf", file_type, progress=False)
    theirs, ids = llama_logits(runs, path, IDS)
    model = npllm.load(path, ops="reference")
    ours = model(IDS[None])[0]
    assert ids == model.tokenizer.encode(TEXT)
    assert relative(ours, theirs) < LARGEST.get(file_type, LARGEST_BLOCKS)
    check_clear_choices(ours, theirs)


@pytest.mark.weights
def test_the_default_model_with_fallbacks(runs, default_folder, tmp_path):
    """Its width of 576 is no multiple of 256."""
    path = npllm.quantize(default_folder, tmp_path / "x.gguf", "q4_k_m", progress=False)
    kinds = {x.kind for x in GGUFFile(path).tensors.values()}
    assert kinds == {"F32", "Q4_K", "Q6_K", "Q5_0", "Q8_0"}
    model, other = npllm.load(path), runs.LlamaCpp(path, 64, 1)
    assert [x for x in sweep() if model.tokenizer.encode(x) != other.tokenize(x)] == []
    ids = model.tokenizer.encode("The capital of France is Paris, and the capital of Italy is")
    check_clear_choices(model(np.array([ids]))[0], other.logits(ids))
    other.close()


@pytest.mark.weights
def test_the_tokenizer_of_the_default_file_is_that_of_llama_cpp(runs):
    (path,) = fetch(DEFAULT_GGUF, progress=False).glob("*.gguf")
    ours, theirs = gguf_tokenizer(GGUFFile(path)), runs.LlamaCpp(path, 64, 1)
    assert [x for x in sweep() if ours.encode(x) != theirs.tokenize(x)] == []
    theirs.close()


# --- llama.cpp's files in npllm


@pytest.mark.parametrize("file_type", [x for x in FILE_TYPES if "_" in x])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_file_that_llama_cpp_quantised_has_the_same_types_and_loads(
    runs, folder, tmp_path, monkeypatch, arch, file_type
):
    monkeypatch.setattr(gguf_files, "N_LAYER", 16)
    wide = npllm.quantize(folder(arch), tmp_path / "f32.gguf", "f32", progress=False)
    wanted = FILE_TYPES[file_type]
    path = runs.quantize_with_llama_cpp(wide, tmp_path / "x.gguf", wanted.number, 1)
    stored, sizes = GGUFFile(path), ModelSizes(16, False, True)
    assert stored.metadata["general.file_type"] == wanted.number
    for name, x in stored.tensors.items():
        assert x.kind == tensor_type(name, x.shape, wanted, sizes), name
    theirs, _ = llama_logits(runs, path, IDS)
    ours = npllm.load(path, ops="reference")(IDS[None])[0]
    check_clear_choices(ours, theirs)


# --- the definition with llama.cpp's activations


def q8_0(x):
    """Round to 8 bits with a float16 scale for 32 entries: `quantize_row_q8_0`."""
    blocks = x.reshape(*x.shape[:-1], -1, 32).astype(np.float32)
    d = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    q = np.divide(blocks, d, out=np.zeros_like(blocks), where=d > 0)
    q = np.sign(q) * np.floor(np.abs(q) + 0.5)
    return (q * d.astype(np.float16).astype(np.float32)).reshape(x.shape)


def q8_k(x):
    """Round to 8 bits with a float32 scale for 256 entries: `quantize_row_q8_K`."""
    blocks = x.reshape(*x.shape[:-1], -1, 256).astype(np.float32)
    at = np.abs(blocks).argmax(axis=-1)[..., None]
    d = np.take_along_axis(blocks, at, axis=-1) / np.float32(-127)
    q = np.divide(blocks, d, out=np.zeros_like(blocks), where=d != 0)
    return (np.minimum(np.rint(q), 127) * d).reshape(x.shape)


def llama_linear(x, weight, bias=None):
    """The product of a rounded vector with a weight in blocks; bias is for the signature."""
    assert bias is None
    if isinstance(weight, StackedWeight):
        return np.concatenate([llama_linear(x, part) for part in weight.parts], axis=-1)
    if not is_packed(weight):
        return ops.linear(x, weight)
    rounded = (q8_k if weight.format.endswith("K") else q8_0)(x)
    wide = widen(weight).astype(np.float64)
    return (rounded.astype(np.float64) @ wide.T).astype(np.float32)


@pytest.mark.parametrize("file_type", ["q4_0", "q8_0", "q5_0", "q4_k_m", "q5_k_s", "q6_k"])
@pytest.mark.parametrize("arch", ARCHS)
def test_with_its_activation_blocks_the_logits_are_those_of_llama_cpp(
    runs, folder, tmp_path, arch, file_type
):
    """They agree to float32, but where a last bit of an earlier sum turns a rounding to 8 bits."""
    path = npllm.quantize(folder(arch), tmp_path / "x.gguf", file_type, progress=False)
    prompts = np.random.default_rng(4).integers(6, 260, (32, 3))
    model = runs.LlamaCpp(path, 64, 1)
    theirs = np.stack([model.logits(ids) for ids in prompts])
    model.close()
    ours = npllm.load(path, ops=ops.reference.replace(linear=llama_linear))(prompts)
    errors = np.array([relative(x, y) for x, y in zip(ours, theirs, strict=True)])
    assert (errors < 1e-6).mean() >= 0.75 and errors.max() < LARGEST_BLOCKS
    exact = npllm.load(path, ops="reference")(prompts)
    assert relative(exact, theirs) > 1e-2  # rounding the activations is what differs
    check_clear_choices(ours, theirs)
