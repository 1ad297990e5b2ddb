"""The rotary position embedding of a GGUF file, as `rope_scaling` of a config.json has it."""

from typing import Any

import numpy as np

from npllm import ops
from npllm.arrays import widen
from npllm.checkpoints.gguf.reader import GGUFFile
from npllm.errors import NpllmValueError

__all__ = ["ROPE_TENSORS", "rope_parameters", "shortest"]

LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
LLAMA3 = "rope_freqs.weight"
ROPE_TENSORS = (LONG, SHORT, LLAMA3)
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_ORIGINAL = 1.0, 4.0, 8192  # of every published Llama 3.1 and 3.2
TOLERANCE = 1e-5  # relative, between float32 formulas


def rope_parameters(gguf: GGUFFile, theta: float, d_rope: int) -> dict[str, Any] | None:
    """Return `rope_scaling`: longrope, llama3, linear, or None for unscaled frequencies.

    Parameters
    ----------
    gguf : GGUFFile
    theta : float
        The base of the frequencies.
    d_rope : int
        Channels of a head that are rotated.

    Returns
    -------
    rope_scaling : dict or None

    Raises
    ------
    NpllmValueError
        When the scaling is of another type, or its tensors do not fit.

    Notes
    -----
    GGUF stores longrope's factors as two tensors and the factor of the cosines and sines in
    `rope.scaling.attn_factor`.  Of llama3 it stores the quotients of the frequencies alone; the
    numbers that give them are found again, and checked.

    Source: `Phi3MiniModel` and `LlamaModel` in llama.cpp's convert_hf_to_gguf.py.
    """
    if LONG in gguf.tensors or SHORT in gguf.tensors:
        return _longrope(gguf, d_rope)
    if LLAMA3 in gguf.tensors:
        return _llama3(gguf, theta, d_rope)
    kind = gguf.value_or(gguf.own("rope.scaling.type"), str, "none")
    if kind == "none":
        return None
    if kind != "linear" or gguf.architecture != "llama":
        raise NpllmValueError(
            f"{gguf.path}: rope.scaling.type = {kind!r} is not implemented for "
            f"{gguf.architecture} without the tensors {', '.join(ROPE_TENSORS)}"
        )
    return {"type": "linear", "factor": gguf.value(gguf.own("rope.scaling.factor"), float)}


def _longrope(gguf: GGUFFile, d_rope: int) -> dict[str, Any]:
    """Read the factors of longrope, and by how much cosines and sines are scaled."""
    factors = {
        f"{name}_factor": [shortest(x) for x in _vector(gguf, tensor, d_rope)]
        for name, tensor in (("short", SHORT), ("long", LONG))
    }
    key = gguf.own("rope.scaling.attn_factor")
    scale = gguf.value_or(key, float, None)
    return {"type": "longrope", **factors} | ({} if scale is None else {"attention_factor": scale})


def _llama3(gguf: GGUFFile, theta: float, d_rope: int) -> dict[str, Any] | None:
    """Find the parameters of llama3 that give the stored quotients of the frequencies."""
    stored = _vector(gguf, LLAMA3, d_rope)
    factor = float(stored.max())
    numbers = factor, LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_ORIGINAL
    plain = ops.rope_frequencies(d_rope, theta)
    if np.allclose(stored, 1, rtol=TOLERANCE, atol=0):
        return None
    if not np.allclose(
        plain / ops.llama3_frequencies(d_rope, theta, *numbers), stored, rtol=TOLERANCE, atol=0
    ):
        raise NpllmValueError(
            f"{gguf.path}: {LLAMA3} are not the frequencies of llama3 with factor {factor:g}, "
            f"low_freq_factor 1, high_freq_factor 4 and 8192 original positions; others are not "
            "implemented"
        )
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return {"type": "llama3", **dict(zip(names, numbers, strict=True))}


def _vector(gguf: GGUFFile, name: str, d_rope: int) -> np.ndarray:
    """Read a tensor [d_rope/2] in float32."""
    if name not in gguf.tensors:
        raise NpllmValueError(f"{gguf.path}: {name} is missing")
    tensor = gguf.tensors[name]
    if tensor.shape != (d_rope // 2,):
        raise NpllmValueError(
            f"{gguf.path}: {name} must be [d_rope/2] = [{d_rope // 2}], got {list(tensor.shape)}"
        )
    x = widen(tensor.stored, np.float32)
    if not (np.isfinite(x).all() and (x > 0).all()):
        raise NpllmValueError(f"{gguf.path}: {name} must hold positive numbers")
    return x


def shortest(x: float) -> float:
    """Return the shortest decimal with the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(x)))
