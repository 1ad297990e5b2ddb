"""Caches that are kept: the longest common prefix is not computed again, files are bound to the
model, and what is hostile is refused.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from close import close
from safetensors.numpy import load_file, save_file

import npllm
from npllm import ops
from npllm.cache.files import read_note
from npllm.errors import NpllmError, NpllmOSError, NpllmValueError


def folder(path, **changes):
    return tiny.write_text_folder(path, **changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return npllm.load(folder(tmp_path_factory.mktemp("kept"), max_position_embeddings=256))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    return npllm.load(
        folder(tmp_path_factory.mktemp("window"), max_position_embeddings=256, sliding_window=8)
    )


class Counted:
    """Counts the tokens that go through a model."""

    def __init__(self, model):
        self.tokens = 0

        def counted(x, *args, **options):
            self.tokens += x.shape[-2]
            return ops.swiglu(x, *args, **options)

        self.model = model.with_ops(swiglu=counted)

    def of(self, call):
        before, result = self.tokens, call()
        return (self.tokens - before) // self.model.config.num_hidden_layers, result


TALKS = {
    "goes on": ([5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 10, 11]),
    "the same again": ([5, 6, 7, 8, 9], [5, 6, 7, 8, 9]),
    "an edited message": ([5, 6, 7, 8, 9], [5, 6, 20, 8, 9]),
    "a shorter one": ([5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7]),
    "nothing in common": ([5, 6, 7], [9, 6, 7]),
}


@pytest.mark.parametrize("which", ["model", "windowed"])
@pytest.mark.parametrize("talk", TALKS.values(), ids=TALKS)
@pytest.mark.parametrize("n_new", [1, 12])
def test_ids_equal_those_of_a_run_without_reuse(which, talk, n_new, request):
    plain = request.getfixturevalue(which)
    cache = plain.new_cache()
    for ids in (*talk, *talk):
        prompt = np.array([ids])
        kept = plain.generate(prompt, max_new_tokens=n_new, cache=cache)
        assert np.array_equal(kept, plain.generate(prompt, max_new_tokens=n_new))
        assert cache.ids[0].tolist() == kept[0, : cache.n_ctx].tolist()


@pytest.mark.parametrize("which", ["model", "windowed"])
def test_logits_after_a_reused_prefix_are_those_of_the_whole(which, request):
    plain = npllm.load(request.getfixturevalue(which).folder, dtype="float64")
    cache, seen = plain.new_cache(), []

    def note(_, logits):
        seen.append(logits.copy())
        return logits

    for ids in TALKS["an edited message"]:
        plain.generate(np.array([ids]), max_new_tokens=1, cache=cache, logits_processors=[note])
        close(seen[-1], np.asarray(plain(np.array([ids])))[:, -1])


def test_only_what_is_new_is_computed(model):
    counted = Counted(model)
    cache = counted.model.new_cache()
    prompt = np.array([[5, 6, 7, 8, 9, 10]])
    n, first = counted.of(lambda: counted.model.generate(prompt, max_new_tokens=3, cache=cache))
    assert n == 6 + 2
    n, _ = counted.of(
        lambda: counted.model.generate(
            np.append(first, [[30, 31]], axis=1), max_new_tokens=1, cache=cache
        )
    )
    assert n == 1 + 2, "the last token of the answer, which no step has read, and the new ones"
    n, _ = counted.of(lambda: counted.model.generate(prompt, max_new_tokens=1, cache=cache))
    assert n == 1


def test_a_padded_batch_reuses_what_all_rows_have_in_common(model):
    cache, mask = model.new_cache(2), np.array([[0, 1, 1, 1], [1, 1, 1, 1]])
    for ids in ([[0, 5, 6, 7], [8, 9, 10, 11]], [[0, 5, 6, 8], [8, 9, 10, 12]]):
        kept = model.generate(np.array(ids), attention_mask=mask, max_new_tokens=4, cache=cache)
        plain = model.generate(np.array(ids), attention_mask=mask, max_new_tokens=4)
        assert np.array_equal(kept, plain)


def test_keys_at_other_positions_are_not_reused(model):
    cache, ids = model.new_cache(), np.array([[5, 6, 7, 8]])
    model(ids, cache=cache, position_ids=np.array([10, 11, 12, 13]))
    kept = model.generate(ids, max_new_tokens=4, cache=cache)
    assert np.array_equal(kept, model.generate(ids, max_new_tokens=4))


def test_a_cache_that_does_not_fit_is_refused(model, windowed):
    ids = np.array([[5, 6]])
    with pytest.raises(NpllmValueError, match="n_batch"):
        model.generate(ids, cache=model.new_cache(2))
    with pytest.raises(NpllmValueError, match="the cache belongs to a model with"):
        model.generate(ids, cache=windowed.new_cache())
    with pytest.raises(NpllmError, match="cache must be a KVCache"):
        model.generate(ids, cache="cache")
    for other in ({"use_cache": False}, {"num_beams": 2}):
        with pytest.raises(NpllmValueError, match="cache is given, and"):
            model.generate(ids, cache=model.new_cache(), **other)


# ---------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("which", ["model", "windowed"])
@pytest.mark.parametrize("n_ctx", [0, 3, 20])
def test_a_saved_cache_goes_on_as_the_one_that_was_saved(which, n_ctx, tmp_path, request):
    model = request.getfixturevalue(which)
    cache, ids = model.new_cache(), np.arange(5, 25)[None]
    if n_ctx:
        model(ids[:, :n_ctx], cache=cache)
    cache.save(tmp_path / "cache", note="some words")
    other = npllm.load(model.folder)
    loaded = other.load_cache(tmp_path / "cache")
    assert (loaded.n_ctx, read_note(tmp_path / "cache")) == (n_ctx, "some words")
    for kept in ("ids", "positions", "valid", "rope_variant"):
        assert np.array_equal(getattr(loaded, kept), getattr(cache, kept))
    for new in (ids[:, :7], ids[:, :1]):
        assert np.array_equal(other(new, cache=loaded), model(new, cache=cache))
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


def test_a_saved_cache_is_of_its_model_alone(model, windowed, tmp_path):
    cache, file = model.new_cache(), tmp_path / "cache"
    model(np.array([[5, 6, 7]]), cache=cache)
    cache.save(file)
    tensors = tiny.weights(
        tiny.config_dict(vocab_size=tiny.byte_level().get_vocab_size(), max_position_embeddings=256)
    )
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    other = npllm.load(folder(tmp_path / "other", max_position_embeddings=256, tensors=tensors))
    with pytest.raises(NpllmValueError, match="was filled under other weights"):
        other.load_cache(file)
    with pytest.raises(NpllmValueError, match="was filled under another config"):
        windowed.load_cache(file)
    masked = model.with_mask(ops.mask.causal() & ops.mask.sliding_window(4))
    with pytest.raises(NpllmValueError, match="was filled under another mask"):
        masked.load_cache(file)
    held = masked.new_cache()
    masked(np.array([[5, 6, 7]]), cache=held)
    held.save(file)
    same = model.with_mask(ops.mask.causal() & ops.mask.sliding_window(4))
    assert same.load_cache(file).n_ctx == 3
    with pytest.raises(NpllmValueError, match="another mask"):
        model.with_mask(ops.mask.causal() & ops.mask.sliding_window(5)).load_cache(file)


def test_a_mask_of_a_function_and_a_cache_of_no_model_are_not_saved(model, tmp_path):
    mine = model.with_mask(ops.mask.Rule(lambda i, j: j <= i))
    with pytest.raises(NpllmValueError, match="a rule of a function has no name that lasts"):
        mine.new_cache().save(tmp_path / "cache")
    with pytest.raises(NpllmValueError, match=r"make it with model.new_cache\(\)"):
        npllm.cache.KVCache(1, 2, 64).save(tmp_path / "cache")
    with pytest.raises(NpllmOSError, match="cannot be written"):
        model.new_cache().save(tmp_path / "missing" / "cache")


def altered(file, change):
    """Write a saved cache again with other tensors or metadata, its hash computed anew."""
    from safetensors import safe_open

    from npllm.cache.files import _digest

    with safe_open(file, framework="np") as opened:
        facts = dict(opened.metadata())
    tensors = load_file(file)
    change(tensors, facts)
    facts["content"] = _digest(tensors) if facts.get("content") != "kept" else facts["content"]
    save_file(tensors, file, metadata=facts)


def replace(name, function):
    return lambda tensors, _: tensors.update({name: function(tensors[name])})


HOSTILE = {
    "an id beyond the vocabulary": replace("ids", lambda x: x + 10**6),
    "a negative id": replace("ids", lambda x: x - 100),
    "a position beyond the context": replace("positions", lambda x: x + 10**9),
    "a flag of 2": replace("valid", lambda x: x * 2),
    "a negative variant": replace("rope_variant", lambda x: x - 1),
    "NaN": replace("layers.0.keys", lambda x: x * np.nan),
    "another shape": replace("layers.1.values", lambda x: np.ascontiguousarray(x[:, :, :1])),
    "another type": replace("layers.1.values", lambda x: x.astype(np.float64)),
    "int8 keys": replace("layers.0.keys", lambda x: x.astype(np.int8)),
    "ids of one axis": replace("ids", lambda x: x[0]),
    "a missing layer": lambda tensors, _: tensors.pop("layers.1.keys"),
    "one more tensor": lambda tensors, _: tensors.update(more=np.zeros(3)),
    "no ids": lambda tensors, _: tensors.pop("ids"),
    "damaged": lambda tensors, facts: (
        tensors.update({"layers.0.keys": tensors["layers.0.keys"] + 1}),
        facts.update(content="kept"),
    ),
    "another format": lambda _, facts: facts.update(format="npllm KV cache 2"),
    "no weights": lambda _, facts: facts.pop("weights"),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused(model, tmp_path, change):
    cache, file = model.new_cache(), tmp_path / "cache"
    model(np.array([[5, 6, 7]]), cache=cache)
    cache.save(file)
    altered(file, change)
    with pytest.raises(NpllmError, match=str(file)):
        model.load_cache(file)


def test_what_is_no_safetensors_file_is_refused(model, tmp_path):
    file = tmp_path / "cache"
    for content in (b"", b"\xff" * 100, json.dumps({"a": 1}).encode()):
        file.write_bytes(content)
        with pytest.raises(NpllmOSError):
            model.load_cache(file)
    with pytest.raises(NpllmOSError):
        model.load_cache(tmp_path / "missing")
    with pytest.raises(NpllmValueError, match="is no KV cache"):
        model.load_cache(Path(model.folder) / "model.safetensors")
