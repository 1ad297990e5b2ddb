"""llama.cpp through llama-cpp-python's C interface: logits of a GGUF file, and its quantiser."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from npllm.checkpoints.gguf.ggml_types import TYPES
from npllm.errors import NpllmValueError
from npllm.quantized.block_weight import BlockWeight

__all__ = [
    "LlamaCpp",
    "log_likelihoods",
    "quantize_matrix_with_llama_cpp",
    "quantize_with_llama_cpp",
]


class LlamaCpp:
    """A GGUF file loaded by llama.cpp.

    Parameters
    ----------
    path : Path
    n_ctx : int
        Most tokens of a sequence.
    n_threads : int

    Notes
    -----
    Without the kernels that repack weights at load, and without flash attention, which rounds to
    float16; keys and values are kept in float32.
    """

    def __init__(self, path: Path, n_ctx: int = 512, n_threads: int = 2) -> None:
        import llama_cpp

        self.api = llama_cpp
        with quiet_stderr():
            llama_cpp.llama_backend_init()
            settings: Any = llama_cpp.llama_model_default_params()
            settings.n_gpu_layers, settings.use_extra_bufts = 0, False
            self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), settings)
            if not self.model:
                raise SystemExit(f"llama.cpp does not load {path}")
            settings = llama_cpp.llama_context_default_params()
            settings.n_ctx = settings.n_batch = settings.n_ubatch = n_ctx
            settings.n_threads = settings.n_threads_batch = n_threads
            settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
            settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def logits(self, ids: Any) -> np.ndarray:
        """Return the logits of every position: float32 [n_seq, n_vocab]."""
        api, n = self.api, len(ids)
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        batch = api.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at] = int(token), at
            batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = 1, 0, True
        try:
            if api.llama_decode(self.context, batch):
                raise SystemExit("llama_decode failed")
            rows = api.llama_get_logits(self.context)
            return np.ctypeslib.as_array(rows, (n, self.n_vocab)).copy()
        finally:
            api.llama_batch_free(batch)

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text; special tokens in it become their ids."""
        raw = text.encode()
        ids = (self.api.llama_token * (len(raw) + 8))()
        n = self.api.llama_tokenize(self.vocab, raw, len(raw), ids, len(ids), True, True)
        return list(ids[:n])

    def close(self) -> None:
        """Free model and context."""
        with quiet_stderr():
            self.api.llama_free(self.context)
            self.api.llama_model_free(self.model)


def quantize_with_llama_cpp(path: Path, output: Path, file_type: int, n_threads: int = 2) -> Path:
    """Let llama.cpp quantise a GGUF file."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.allow_requantize = file_type, n_threads, True
    with quiet_stderr():
        failed = llama_cpp.llama_model_quantize(os.fsencode(path), os.fsencode(output), settings)
    if failed:
        raise SystemExit(f"llama.cpp does not quantise {path}")
    return output


def quantize_matrix_with_llama_cpp(x: np.ndarray, name: str) -> BlockWeight:
    """Let llama.cpp round a matrix [d_out, d_in] to blocks of a format, without an imatrix."""
    from llama_cpp._ggml import libggml

    (number,) = (i for i, kind in TYPES.items() if kind.name == name)
    x = np.ascontiguousarray(x, np.float32)
    (d_out, d_in), kind = x.shape, TYPES[number]
    if d_in % kind.n_entries:
        raise NpllmValueError(f"d_in must be a multiple of {kind.n_entries}, got {d_in}")
    blocks = np.empty((d_out, d_in // kind.n_entries * kind.n_bytes), np.uint8)
    run: Any = libggml.ggml_quantize_chunk
    run.restype = ctypes.c_size_t
    run.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    if run(number, x.ctypes.data, blocks.ctypes.data, 0, d_out, d_in, None) != blocks.nbytes:
        raise SystemExit(f"llama.cpp does not quantise to {name}")
    return BlockWeight(blocks, name)


def log_likelihoods(logits: np.ndarray, ids: Any) -> np.ndarray:
    """Return log p(ids[i + 1] | ids[0 ... i]) in float64: [n_seq - 1]."""
    x = logits[:-1].astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(x, np.asarray(ids)[1:, None], axis=-1)[:, 0]
    return chosen - np.log(np.exp(x).sum(axis=-1))


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Keep what C code writes to standard error to itself."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
