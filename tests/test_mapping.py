"""Mapped files: one descriptor a file, freed with the model; `mmap=False` gives copies."""

import gc
import os
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import sentence
import tiny
from test_checkpoint import by_name, load, mapped, write_shards

import npllm
from npllm.checkpoints.safetensors import read_entries
from npllm.checkpoints.tensor_files import TensorFiles

DESCRIPTORS = Path("/proc/self/fd")
needs_proc = pytest.mark.skipif(not DESCRIPTORS.is_dir(), reason="counts in /proc")
IDS = np.array([[3, 4, 5]])


def n_descriptors():
    return len(os.listdir(DESCRIPTORS))


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.fixture
def no_collector():
    """The cycle collector does not run: what is freed, is freed by reference counts."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def decoder_folder(folder, n_files=3):
    config = tiny.config_dict(vocab_size=20_000)
    tensors = tiny.weights(config, dtype=ml_dtypes.bfloat16)
    write_shards(folder, tensors, n_files, vocab_size=20_000)
    return folder


def use(model):
    """Run what keeps something: the frequencies, a cache, an encoder's batch."""
    if isinstance(model, npllm.Encoder):
        model.embed(["the cat"])
    else:
        model(IDS, cache=model.new_cache())
        model.generate(IDS, max_new_tokens=2)


@needs_proc
def test_a_model_holds_one_descriptor_for_each_file(tmp_path):
    folder = decoder_folder(tmp_path)
    before = n_descriptors()
    model = npllm.load(folder)
    assert n_descriptors() - before == 3
    del model


@needs_proc
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.usefixtures("no_collector")
def test_loading_fifty_times_keeps_memory_and_descriptors_flat(tmp_path, kind):
    if kind == "decoder":
        folder = decoder_folder(tmp_path)
    else:
        folder = sentence.write(tmp_path, sentence.Case())
    for _ in range(3):
        use(npllm.load(folder))
    descriptors, resident = n_descriptors(), resident_bytes()
    for _ in range(50):
        model = npllm.load(folder)
        use(model)
        alive = weakref.ref(model)
        del model
        assert alive() is None, "the model waits for the cycle collector"
    # other threads of the process may open one meanwhile; a leak is one for each model
    assert n_descriptors() < descriptors + 25
    assert resident_bytes() - resident < 8 * 2**20


def test_copied_tensors_hold_no_mapping(tmp_path):
    tensors = tiny.weights(dtype=ml_dtypes.bfloat16)
    tiny.write_folder(tmp_path, tensors=tensors)
    for name, x in by_name(load(tmp_path, mmap=False)).items():
        assert not mapped(x) and not x.flags.writeable
        assert x.dtype == tensors[name].dtype
        assert x.tobytes() == tensors[name].tobytes()


def test_a_copy_survives_what_happens_to_the_file(tmp_path):
    tiny.write_folder(tmp_path)
    model = npllm.load(tmp_path, mmap=False)
    before = model(IDS)
    with open(tmp_path / "model.safetensors", "rb+") as file:
        file.write(bytes(100_000))
        file.truncate(100)
    np.testing.assert_array_equal(model(IDS), before)


def test_a_mapping_survives_deletion_and_replacement(tmp_path):
    tiny.write_folder(tmp_path)
    model = npllm.load(tmp_path)
    before = model(IDS)
    (tmp_path / "other").write_bytes(bytes(1000))
    os.replace(tmp_path / "other", tmp_path / "model.safetensors")
    np.testing.assert_array_equal(model(IDS), before)


def test_an_encoder_is_copied_as_well(tmp_path):
    folder = sentence.write(tmp_path, sentence.Case(modules=("Pooling", "Dense:torch.nn.Tanh:7")))
    model = npllm.load(folder, mmap=False)
    arrays = [model.params.word_embeddings, model.params.layers[0][0].q_proj]
    assert not any(mapped(x) for x in arrays)
    assert not mapped(model.settings.head.modules[0].weight)
    np.testing.assert_array_equal(model.embed(["the cat"]), npllm.load(folder).embed(["the cat"]))


@needs_proc
def test_pages_of_copied_tensors_are_given_back(tmp_path):
    tiny.write_safetensors(tmp_path / "model.safetensors", {"a": np.ones(2**22, np.float32)})
    entry = read_entries(tmp_path)["a"]
    files = TensorFiles()
    x = files.read(entry)
    assert x.sum() == 2**22
    before = resident_bytes()
    files.release_pages(entry)
    assert before - resident_bytes() > 0.9 * x.nbytes
    assert x.sum() == 2**22
