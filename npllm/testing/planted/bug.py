"""What a planted bug is, and how it is run on the inputs of `diagnose`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from npllm import ops
from npllm.errors import NpllmValueError
from npllm.ops import mask as rules

__all__ = ["BUGS", "TESTED_AS", "Array", "Bug", "plant", "run"]

Array = Any


@dataclass(frozen=True)
class Bug:
    """A wrong implementation, with the signature of the operation that it is put in the place of.

    Parameters
    ----------
    op : str
        An operation of `npllm.ops`; or "rope", "sampler", "detokenize", whose arguments are the
        inputs of `diagnose`.
    fn : function
        Works on NumPy arrays.
    convention : str, optional
        Id of the convention that it gets wrong; None for a classic fault.
    option : str, optional
        The option of the convention.
    """

    op: str
    fn: Callable[..., Any]
    convention: str | None = None
    option: str | None = None

    @property
    def says(self) -> str:
        """A sentence for the reader: what is wrong."""
        return (self.fn.__doc__ or "").strip().splitlines()[0]


BUGS: dict[str, Bug] = {}
"""Name -> Bug: "attention: C9 top-left" for an option, "attention: zeros" for a fault."""

TESTED_AS = {"apply_rope": "rope", "rope_tables": "rope", "rope_frequencies": "rope"}
"""Operations of `npllm.ops` that `diagnose` knows as part of another."""


def plant(op: str, name: str, convention: str | None = None) -> Callable[[Callable], Callable]:
    """Put a function on the list of bugs; with a convention, `name` is its option."""

    def listed(fn: Callable) -> Callable:
        key = f"{op}: {convention} {name}" if convention else f"{op}: {name}"
        BUGS[key] = Bug(op, fn, convention, name if convention else None)
        return fn

    return listed


def run(op: str, inputs: dict[str, Any], **replaced: Callable) -> Any:
    """Run an operation of `diagnose` through npllm's definitions, some of them replaced.

    Parameters
    ----------
    op : str
        As in `diagnose`: "attention", "attention_lse", "rope", "rms_norm", ...
    inputs : dict
        As in `diagnose`, NumPy arrays.
    **replaced : function
        By name: `attention=mine`, `apply_rope=mine`; or the operation itself, `rope=mine`.

    Returns
    -------
    output : array
        As `diagnose` takes it.

    Raises
    ------
    NpllmValueError
        For an operation that the replaced names are no part of.
    """
    if op not in RUNNERS:
        raise NpllmValueError(f"op must be one of {', '.join(RUNNERS)}, got {op!r}")
    parts = dict.fromkeys((op, *PARTS.get(op, ())))
    unknown = sorted(set(replaced) - set(parts))
    if unknown:
        raise NpllmValueError(f"{op} is made of {', '.join(parts)}, got {', '.join(unknown)}")
    whole = replaced.get(op)
    if whole is not None and op in ("rope", "sampler", "detokenize"):
        return whole(**inputs)
    return RUNNERS[op](inputs, replaced)


PARTS = {"rope": ("rope_frequencies", "rope_tables", "apply_rope"), "attention_lse": ("attention",)}


def mask_rule(inputs: dict[str, Any]) -> Any:
    """Return the mask of attention's inputs as one rule of slots; None: all visible."""
    parts = [rules.causal()] if inputs.get("causal", True) else []
    if inputs.get("window") is not None:
        window = inputs["window"]
        parts.append(rules.Rule(lambda i, j: j > i - window))
    if inputs.get("valid") is not None:
        parts.append(rules.padding(inputs["valid"]))
    if inputs.get("documents") is not None:
        parts.append(rules.documents(inputs["documents"]))
    rule = None
    for part in parts:
        rule = part if rule is None else rule & part
    return rule


def _attention(
    inputs: dict[str, Any], replaced: dict[str, Callable], return_lse: bool = False
) -> Array:
    options = {name: inputs.get(name) for name in ("scale", "bias", "softcap")}
    fn = replaced.get("attention", ops.attention)
    extra = {"return_lse": True} if return_lse else {}
    y = fn(inputs["q"], inputs["k"], inputs["v"], mask=mask_rule(inputs), **options, **extra)
    return y[1] if return_lse else y


def _rope(inputs: dict[str, Any], replaced: dict[str, Callable]) -> Array:
    parts = [replaced.get(name, getattr(ops, name)) for name in PARTS["rope"]]
    factors = inputs.get("factors")
    if factors is not None and factors.ndim == 2:
        factors = factors[int(inputs["positions"].max() + 1 > inputs["n_original"])]
    inv_freq = parts[0](inputs["d_rope"], inputs["base"], factors)
    cos, sin = parts[1](inputs["positions"], inv_freq, np.float32(inputs.get("magnitude", 1.0)))
    return parts[2](inputs["x"], cos, sin)


def _swiglu(inputs: dict[str, Any], replaced: dict[str, Callable]) -> Array:
    half = inputs["gate_up"].shape[-1] // 2
    return replaced.get("swiglu", ops.swiglu)(
        inputs["gate_up"][..., :half], inputs["gate_up"][..., half:]
    )


def _qkv(inputs: dict[str, Any], replaced: dict[str, Callable]) -> Array:
    return np.concatenate(replaced.get("qkv_projection", right_qkv)(**inputs), axis=-3)


def right_qkv(
    x: Array, weight: Array, n_head: int, n_kv_head: int, bias: Array = None
) -> tuple[Array, Array, Array]:
    """Project to query, key and value heads."""
    y = ops.split_heads(ops.linear(x, weight, bias), n_head + 2 * n_kv_head)
    return (
        y[..., :n_head, :, :],
        y[..., n_head : n_head + n_kv_head, :, :],
        y[..., n_head + n_kv_head :, :, :],
    )


def _sampler(inputs: dict[str, Any], _: dict[str, Callable]) -> Array:
    z = inputs["logits"]
    if inputs.get("repetition_penalty") is not None:
        z = ops.repetition_penalty(z, inputs["seen"], inputs["repetition_penalty"])
    for name in ("temperature", "top_k", "top_p", "min_p"):
        z = z if inputs.get(name) is None else getattr(ops, name)(z, inputs[name])
    return ops.softmax(z)


def _head(inputs: dict[str, Any], replaced: dict[str, Callable]) -> Array:
    if "lm_head" in replaced:
        return replaced["lm_head"](**inputs)
    return ops.linear(inputs["hidden"], inputs["weight"])


def _plain(name: str, right: Callable) -> Callable:
    return lambda inputs, replaced: replaced.get(name, right)(**inputs)


RUNNERS: dict[str, Callable] = {
    "attention": _attention,
    "attention_lse": lambda inputs, replaced: _attention(inputs, replaced, return_lse=True),
    "rope": _rope,
    "swiglu": _swiglu,
    "qkv_projection": _qkv,
    "sampler": _sampler,
    "rms_norm": _plain("rms_norm", ops.rms_norm),
    "linear": _plain("linear", ops.linear),
    "embed": _plain("embed", ops.embed),
    "detokenize": lambda inputs, _: [str(inputs["prefixes"][-1])],
    "lm_head": _head,
}
"""Operation -> function (inputs, replaced) -> output."""
