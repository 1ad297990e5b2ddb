"""Keys and values in bfloat16 or float16: rounded once, when they are appended, and read so."""

import copy
import pickle
import warnings

import ml_dtypes
import numpy as np
import pytest
import tiny
from close import close

import npllm
from npllm import ops
from npllm.cache import KVCache
from npllm.cache.state import CACHE_DTYPES
from npllm.errors import NpllmValueError

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"bfloat16": BF16, "float16": np.dtype(np.float16)}
dtypes = pytest.mark.parametrize("name", DTYPES)


def filled(dtype, n=70, window=None):
    """A cache of n tokens, appended in two calls, and the keys that were appended."""
    cache, keys = KVCache(1, 1, 200, window, dtype=dtype), []
    for start, stop in ((0, 5), (5, n)):
        rng = np.random.default_rng(start)
        keys.append(rng.standard_normal((1, 2, stop - start, 4), dtype=np.float32))
        held = cache.append(0, keys[-1], -keys[-1])
        ids, valid = np.zeros((1, stop - start), np.int64), np.ones((1, stop), bool)
        cache.advance(ids, np.arange(start, stop), valid, np.zeros(1, np.int64))
    return cache, np.concatenate(keys, axis=2), held


@pytest.mark.parametrize("dtype", [*DTYPES.values(), None])
def test_keys_are_rounded_to_nearest_and_read_so(dtype):
    cache, keys, (k, v, _) = filled(dtype)
    want = keys if dtype is None else keys.astype(dtype)
    assert k.tobytes() == want.tobytes() and v.tobytes() == (-want).tobytes()
    assert cache.n_bytes == 2 * 128 * 8 * want.dtype.itemsize


def test_a_key_beyond_float16_is_infinite_without_a_warning():
    cache, k = KVCache(1, 1, 8, dtype=np.dtype(np.float16)), np.full((1, 1, 1, 2), 7e4, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isinf(cache.append(0, k, k)[0]).all()


@pytest.mark.parametrize(
    "change",
    [
        copy.copy,
        lambda cache: pickle.loads(pickle.dumps(cache)),
        lambda cache: cache.reorder([0, 0]) or cache,
        lambda cache: cache.crop(3) or cache,
        lambda cache: cache.crop(0) or cache,
    ],
    ids=["copy", "pickle", "reorder", "crop", "empty"],
)
def test_a_changed_cache_keeps_its_dtype(change):
    cache = change(filled(BF16, 64)[0])
    k = np.zeros((cache.n_batch, 2, 9, 4), np.float32)
    assert cache.append(0, k, k)[0].dtype == BF16


LONG = {
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    "original_max_position_embeddings": 12,
}


@dtypes
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 5}, LONG], ids=["", "window", "long"])
@pytest.mark.parametrize("set_", [None, ops.reference], ids=["fast", "reference"])
def test_logits_are_those_of_rounded_keys_and_values(name, changes, set_):
    """Beside a pass without a cache, in which a tap rounds them; also over longrope's crossing."""
    model = tiny.model(ops=set_, **changes)
    ids, dtype = tiny.random_ids(2, 20), DTYPES[name]
    cache, got = model.new_cache(2, dtype=name), []
    for start, stop in ((0, 7), (7, 8), (8, 20)):
        got.append(model(ids[:, start:stop], cache=cache))

    def rounding(name, x):
        kept = name.endswith(("self_attn.k", "self_attn.v"))
        return x.astype(dtype).astype(np.float32) if kept else x

    whole = model(ids, tap=rounding)
    if changes is not LONG:  # the first tokens are scored with other frequencies there
        for start, stop, y in zip((0, 7, 8), (7, 8, 20), got, strict=True):
            close(y, whole[:, start:stop], times=40)
    close(got[-1][:, -1], whole[:, -1], times=40)
    assert abs(model(ids) - whole).max() > 1e-5, "rounding makes a difference"


@dtypes
def test_load_tells_every_cache(name, tmp_path):
    folder = tiny.write_folder(tmp_path)
    model = npllm.load(folder, cache_dtype=name)
    ids = tiny.random_ids(1, 5)
    for one in (model, model.with_ops(silu=ops.silu), pickle.loads(pickle.dumps(model))):
        assert one.new_cache().dtype == DTYPES[name]
    assert model.new_cache(dtype="float32").dtype == np.float32
    other = npllm.load(folder)
    assert other.new_cache().dtype is None
    want = other.generate(ids, max_new_tokens=6, cache=other.new_cache(dtype=name))
    assert (model.generate(ids, max_new_tokens=6) == want).all()


@pytest.mark.parametrize("name", CACHE_DTYPES)
def test_a_saved_cache_keeps_its_dtype(name, tmp_path):
    model = npllm.load(tiny.write_folder(tmp_path))
    cache, ids = model.new_cache(dtype=name), tiny.random_ids(1, 9)
    model(ids[:, :6], cache=cache)
    cache.save(tmp_path / "cache")
    again = model.load_cache(tmp_path / "cache")
    assert again.dtype == cache.dtype and again.n_ctx == 6
    close(model(ids[:, 6:], cache=again), model(ids[:, 6:], cache=cache), times=0)


def test_what_cannot_be_is_refused(tmp_path):
    folder = tiny.write_folder(tmp_path)
    with pytest.raises(
        NpllmValueError, match=r"cache_dtype must be one of bfloat16, .* got 'int8'"
    ):
        npllm.load(folder, cache_dtype="int8")
    with pytest.raises(NpllmValueError, match="computes in float64, and cache_dtype 'bfloat16'"):
        npllm.load(folder, dtype="float64", cache_dtype="bfloat16")
    cache, k = KVCache(1, 1, 8, dtype=BF16), np.zeros((1, 2, 3, 8))
    with pytest.raises(NpllmValueError, match="in bfloat16, which would round the float64"):
        cache.append(0, k, k)
