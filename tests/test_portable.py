"""Models and encoders in another process, and copies of them."""

import copy
import multiprocessing
import pickle

import numpy as np
import pytest
import test_encoder
import tiny
from close import close

import npllm
from npllm import ops
from npllm.models import bert

IDS = tiny.random_ids(2, 7)


def half_add(x, y):
    """An operation that another process can import."""
    return ops.add(x, y) * np.float32(0.5)


def answer(model):
    """What a worker of a pool computes."""
    return model(IDS), model.generate(IDS, max_new_tokens=4), repr(model), str(model)


def same_answer(a, b):
    for one, other in zip(answer(a), answer(b) if isinstance(b, npllm.Model) else b, strict=True):
        if isinstance(one, str):
            assert one == other
        else:
            close(one, other, times=0)


@pytest.fixture
def folder(tmp_path):
    generation = {"eos_token_id": 7, "no_repeat_ngram_size": 2}
    return tiny.write_folder(
        tmp_path / "m",
        tokenizer=tiny.byte_level(),
        settings=tiny.SETTINGS,
        generation=generation,
        vocab_size=272,
    )


@pytest.mark.parametrize("kind", ["fast", "reference", "blockwise"])
@pytest.mark.parametrize("dtype", [None, "float64", "int8"])
def test_a_loaded_model_is_pickled_as_its_folder(folder, kind, dtype):
    model = npllm.load(folder, ops=kind, dtype=dtype)
    data = pickle.dumps(model)
    norm = np.asarray(model.params.norm).tobytes()
    assert norm not in data and norm in pickle.dumps(model.params)
    again = pickle.loads(data)
    same_answer(again, model)
    assert again.ops is model.ops and again.generation_config == model.generation_config
    assert again.params.embed_tokens.dtype == model.params.embed_tokens.dtype
    text = "hello"
    assert again.generate(text, max_new_tokens=3) == model.generate(text, max_new_tokens=3)


def test_a_model_of_arrays_takes_them_along():
    model = tiny.model(tie_word_embeddings=True)
    again = pickle.loads(pickle.dumps(model))
    same_answer(again, model)
    assert again.params.lm_head is again.params.embed_tokens, "what was one array stays one"


def test_replaced_operations_go_along(folder):
    model = npllm.load(folder).with_ops(add=half_add)
    again = pickle.loads(pickle.dumps(model))
    same_answer(again, model)
    assert not np.allclose(model(IDS), npllm.load(folder)(IDS)), "it is the replaced one that runs"


def test_a_folder_that_is_gone_is_named(folder, tmp_path):
    data = pickle.dumps(npllm.load(folder))
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(npllm.NpllmError, match="m"):
        pickle.loads(data)


def test_a_relative_folder_is_found_from_another_one(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder.parent)
    model = npllm.load(folder.name)
    data = pickle.dumps(model)
    monkeypatch.chdir(tmp_path.parent)
    same_answer(pickle.loads(data), model)


@pytest.mark.slow
def test_a_spawned_worker_answers_the_same(folder):
    model = npllm.load(folder, ops="blockwise")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (found,) = pool.map(answer, [model])
    same_answer(model, found)


# ------------------------------------------------------------------------------------------ copies


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_loaded_model_shares_the_weights(folder, copied):
    model = npllm.load(folder)
    other = copied(model)
    assert other is not model and other.params is model.params and other.ops is model.ops
    same_answer(other, model)
    cache = model.new_cache(2)
    model(IDS[:, :4], cache=cache)
    close(other(IDS[:, 4:], cache=cache)[:, -1], model(IDS)[:, -1], times=2)
    other.generation_config = npllm.decoding.GenerationConfig()
    assert model.generation_config.eos_token_id == (7,)


def test_a_deep_copy_of_a_model_of_arrays_has_arrays_of_its_own():
    model = tiny.model(tie_word_embeddings=True)
    shallow, deep = copy.copy(model), copy.deepcopy(model)
    want = answer(model)
    assert shallow.params is model.params and deep.params.norm is not model.params.norm
    assert deep.params.lm_head is deep.params.embed_tokens
    same_answer(deep, want)
    deep.params.norm.flags.writeable = True
    deep.params.norm[:] = 0
    same_answer(model, want)


# ---------------------------------------------------------------------------------------- encoders


def test_an_encoder_of_arrays_is_pickled_and_copied():
    model = test_encoder.make()[0]
    ids = np.array([[2, 5, 3]])
    for other in (pickle.loads(pickle.dumps(model)), copy.copy(model), copy.deepcopy(model)):
        close(other(ids), model(ids), times=0)
        assert repr(other) == repr(model) and other.max_length == model.max_length
    assert isinstance(model.params, bert.BertParams)


def test_an_encoder_of_a_folder_is_pickled_as_its_folder(tmp_path):
    model = npllm.load(test_encoder.write(tmp_path))
    data = pickle.dumps(model)
    assert np.asarray(model.params.word_embeddings).tobytes() not in data
    again = pickle.loads(data)
    close(again.embed(["the cat sat", "cat"]), model.embed(["the cat sat", "cat"]), times=0)
    assert copy.deepcopy(model).params is model.params
