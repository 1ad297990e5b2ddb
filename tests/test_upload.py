"""Loading to a GPU, on a stand-in whose copies happen as late as they may (tests/guard.py)."""

import guard
import ml_dtypes
import numpy as np
import pytest
import tiny
from close import close
from guard import PinnedMemory, moved
from hypothesis import given
from hypothesis import strategies as st

import npllm
from npllm.checkpoints import phi3_layout, upload
from npllm.config.config import Config

try:
    import cupy
except ImportError:
    cupy = None


@pytest.fixture(autouse=True, scope="module")
def _in_the_place_of_cupy():
    with pytest.MonkeyPatch.context() as monkeypatch:
        guard.installed(monkeypatch)
        monkeypatch.setattr(upload, "BUFFER_BYTES", 64)
        yield


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.lists(st.integers(1, 5), max_size=1),
    st.integers(1, 9),
    st.sampled_from([np.float32, ml_dtypes.bfloat16, np.float64]),
    st.sampled_from([np.float32, ml_dtypes.bfloat16, np.float64]),
)
def test_every_entry_arrives_whatever_the_size_of_the_buffers(rows, rest, n_entries, stored, dtype):
    """A buffer that is filled before its copy is done would send the wrong piece."""
    rng, dtype = np.random.default_rng(0), np.dtype(dtype)
    views = [rng.standard_normal((n, *rest)).astype(stored) for n in rows]
    want, moved_bytes = np.concatenate(views).astype(dtype), []
    to = upload.Upload(guard.xp, n_entries * dtype.itemsize)
    x = to.stack(list(views), dtype, moved_bytes.append)
    to.finish()
    close(x, moved(want), times=0)
    assert sum(moved_bytes) == sum(view.nbytes for view in views)
    assert guard.STREAM.queue == []


def test_a_buffer_that_is_not_waited_for_is_noticed(monkeypatch):
    """The stand-in's copies are late enough for the test above to fail."""
    monkeypatch.setattr(guard.Event, "synchronize", lambda _: None)
    to = upload.Upload(guard.xp, 8)
    x = to.stack([np.arange(10, dtype=np.float32)], np.dtype(np.float32))
    guard.STREAM.synchronize()
    assert x.get().tolist() != list(range(10))


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float64"])
@pytest.mark.parametrize(
    "family",
    [
        {},
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "sliding_window": ...,
            "original_max_position_embeddings": ...,
        },
    ],
    ids=["phi3", "llama"],
)
def test_a_checkpoint_arrives_as_numpy_would_have_loaded_it(tmp_path, family, dtype):
    """Fused tensors and those that are put together from several; the pinned buffers are all that
    is ever held beside the files.
    """
    folder = tiny.write_folder(tmp_path, dtype=ml_dtypes.bfloat16, **family)
    config = Config.from_json(folder)
    alive, PinnedMemory.most = PinnedMemory.alive, 0
    there, here = (
        phi3_layout.load_params(folder, config, dtype=dtype, xp=guard.xp),
        phi3_layout.load_params(folder, config, dtype=dtype),
    )
    assert PinnedMemory.most - alive <= 2 * upload.BUFFER_BYTES
    assert guard.STREAM.queue == []
    for one, other in zip(
        (
            there.embed_tokens,
            there.norm,
            there.lm_head,
            *[x for layer in there.layers for x in layer],
        ),
        (here.embed_tokens, here.norm, here.lm_head, *[x for layer in here.layers for x in layer]),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            close(one, moved(np.array(other)), times=0)


def test_8_bit_weights_are_made_on_the_host_and_sent(tmp_path):
    folder = tiny.write_folder(tmp_path)
    there, here = (
        npllm.load(folder, backend=backend, dtype="int8", ops=npllm.ops.blockwise)
        for backend in ("cupy", "numpy")
    )
    assert type(there.params.norm) is guard.Array
    close(there(tiny.random_ids(1, 5)), moved(here(tiny.random_ids(1, 5))), times=8)


def test_a_tied_matrix_is_sent_once(tmp_path):
    params = npllm.load(
        tiny.write_folder(tmp_path, tie_word_embeddings=True),
        backend="cupy",
        ops=npllm.ops.blockwise,
    ).params
    assert params.lm_head is params.embed_tokens


def test_the_bar_moves_by_every_byte(tmp_path, monkeypatch):
    import contextlib

    seen = []
    monkeypatch.setattr(
        phi3_layout,
        "progress_bar",
        lambda total, _, **__: contextlib.nullcontext(
            lambda n, file: seen.append((n, file, total))
        ),
    )
    folder = tiny.write_folder(tmp_path, dtype=ml_dtypes.bfloat16)
    phi3_layout.load_params(
        folder, Config.from_json(folder), dtype="float32", xp=guard.xp, progress=True
    )
    assert sum(n for n, _, _ in seen) == seen[0][2]
    assert {file for _, file, _ in seen} == {"model.safetensors"}
    assert len(seen) > 100  # piece by piece


@pytest.mark.skipif(cupy is None, reason="looks at CuPy, which is not installed")
def test_cupy_has_what_is_used():
    assert callable(cupy.cuda.alloc_pinned_memory) and callable(cupy.cuda.get_current_stream)
    assert callable(cupy.get_default_pinned_memory_pool().free_all_blocks)
    assert "mem, size_t size, stream=None" in cupy.cuda.MemoryPointer.copy_from_host_async.__doc__
    assert {"record", "synchronize"} <= set(
        dir(cupy.cuda.Event)
    ) and "disable_timing" in cupy.cuda.Event.__doc__
    assert "ptr" in dir(cupy.cuda.PinnedMemoryPointer) and "data" in dir(cupy.ndarray)
