"""Record every value of a forward pass of a Transformers model, under npllm's names.

    recording = record(model, input_ids, attention_mask=mask)
    recording.save("mine")

This file can be copied: it needs torch, safetensors and the model's own transformers, not npllm.
Queries, keys and values are seen where Transformers looks up its attention function (the
`AttentionInterface` registry), where it rotates them (`apply_rotary_pos_emb`) and where it appends
to the cache (`Cache.update`).  Everything else is seen by hooks.  All of it is taken away again.
"""

from __future__ import annotations  # torch may be a stand-in while the reference is built

import contextlib
import json
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

__all__ = ["VALUES", "Recording", "record"]

# What a layer-wise decoder computes, in the order of execution:
#     name = op(inputs; weights) conventions of npllm that show there
#         axes | formula
# A leading dot stands for "model.layers.N."; P is the output of the layer before.
_TABLE = """
model.rotary_emb.cos = tables() C2 C3 C4 C5 C18 C25
    n_seq d_rope | cos(position * inv_freq) * attention_factor
model.rotary_emb.sin = tables() C2 C3 C4 C5 C18 C25
    n_seq d_rope | sin(position * inv_freq) * attention_factor
model.embed_tokens = embed(; model.embed_tokens) C33
    n_batch n_seq d_model | embed_tokens[ids]
.input_layernorm = rms_norm(P; .input_layernorm) C13 C28 C29 C30
    n_batch n_seq d_model | rms_norm(x)
.self_attn.qkv_proj = linear(.input_layernorm; .self_attn.qkv_proj) C6 C30 C31
    n_batch n_seq d_qkv | W_qkv @ input_layernorm + b
.self_attn.q_proj = view(.self_attn.qkv_proj) C6 C31
    n_batch n_head n_seq d_head | queries before rotation
.self_attn.k_proj = view(.self_attn.qkv_proj) C6 C31
    n_batch n_kv_head n_seq d_head | keys before rotation
.self_attn.v = view(.self_attn.qkv_proj) C6 C22 C31
    n_batch n_kv_head n_seq d_head | values
.self_attn.q = rope(.self_attn.q_proj, model.rotary_emb.cos, model.rotary_emb.sin) ROPE
    n_batch n_head n_seq d_head | apply_rope(q_proj, cos, sin)
.self_attn.k = rope(.self_attn.k_proj, model.rotary_emb.cos, model.rotary_emb.sin) ROPE
    n_batch n_kv_head n_seq d_head | apply_rope(k_proj, cos, sin)
.self_attn.cached_k = cache(.self_attn.k) C32
    n_batch n_kv_head n_ctx d_head | keys that are seen, with a cache only
.self_attn.cached_v = cache(.self_attn.v) C32
    n_batch n_kv_head n_ctx d_head | values that are seen, with a cache only
.self_attn.heads = attention(.self_attn.q, .self_attn.cached_k, .self_attn.cached_v) ATTENTION
    n_batch n_head n_seq d_head | attention(q, k, v, mask)
.self_attn.attention = view(.self_attn.heads) C31
    n_batch n_seq n_head*d_head | heads side by side
.self_attn.o_proj = linear(.self_attn.attention; .self_attn.o_proj) C30 C31
    n_batch n_seq d_model | W_o @ attention + b
.residual = add(P, .self_attn.o_proj)
    n_batch n_seq d_model | x + o_proj
.post_attention_layernorm = rms_norm(.residual; .post_attention_layernorm) C13 C28 C29 C30
    n_batch n_seq d_model | rms_norm(residual)
.mlp.gate_up_proj = linear(.post_attention_layernorm; .mlp.gate_up_proj) C7 C30 C31
    n_batch n_seq 2*d_ff | W_gate_up @ post_attention_layernorm + b
.mlp.gate = view(.mlp.gate_up_proj) C7
    n_batch n_seq d_ff | the first half of gate_up_proj
.mlp.up = view(.mlp.gate_up_proj) C7
    n_batch n_seq d_ff | the second half of gate_up_proj
.mlp.swiglu = swiglu(.mlp.gate, .mlp.up) C7
    n_batch n_seq d_ff | silu(gate) * up
.mlp.down_proj = linear(.mlp.swiglu; .mlp.down_proj) C30 C31
    n_batch n_seq d_model | W_down @ swiglu + b
. = add(.residual, .mlp.down_proj)
    n_batch n_seq d_model | residual + down_proj
model.norm = rms_norm(P; model.norm) C13 C28 C29 C30
    n_batch n_seq d_model | rms_norm of the last layer's output
lm_head.input = view(model.norm)
    n_batch n_kept d_model | the positions of model.norm that are kept
lm_head = linear(lm_head.input; lm_head) C30 C31 C33
    n_batch n_kept n_vocab | W_lm_head @ lm_head.input
"""
_ROPE = "C1 C2 C3 C4 C5 C18 C25 C26 C27 C34"
_ATTENTION = "C8 C9 C10 C11 C12 C14 C19 C21 C22 C23 C32"


def _read_table() -> dict[str, dict[str, Any]]:
    """Read the table above: name -> op, inputs, weights, conventions, axes and formula."""
    lines = _TABLE.replace("ROPE", _ROPE).replace(") ATTENTION", f") {_ATTENTION}").splitlines()[1:]
    values = {}
    for head, tail in zip(lines[::2], lines[1::2], strict=True):
        name, _, made = head.partition(" = ")
        op, _, made = made.partition("(")
        inputs, _, conventions = made.partition(")")
        inputs, _, weights = inputs.partition(";")
        axes, formula = tail.split(" | ")
        values[_long(name)] = {
            "op": op,
            "inputs": [_long(x) for x in inputs.replace(",", " ").split()],
            "weights": [_long(x) for x in weights.split()],
            "conventions": conventions.split(),
            "axes": axes.split(),
            "formula": formula,
        }
    return values


def _long(name: str) -> str:
    """Write a name of the table out."""
    name = "model.layers.P" if name == "P" else name
    return ("model.layers.N" + name).rstrip(".") if name.startswith(".") else name


VALUES = _read_table()


class Recording(Mapping):
    """The values of a recorded run: name -> tensor on the CPU.  A decode step's names end in @t.

    Attributes
    ----------
    index : dict
        How each value is made, the tokens and positions of each step, the model and versions.
    """

    def __init__(self, values: dict[str, torch.Tensor], index: dict[str, Any]) -> None:
        self._values, self.index = values, index

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def save(self, folder: str | Path) -> None:
        """Write a folder: index.json, and one safetensors file a step.  16-bit types stay so."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {entry["file"] for entry in self.index["values"].values()}
        for file in sorted(files):
            inside = [name for name, e in self.index["values"].items() if e["file"] == file]
            own = {n: self[n].clone(memory_format=torch.contiguous_format) for n in inside}
            save_file(own, folder / file)  # which refuses views of one array, such as up
        text = json.dumps(self.index, indent=1, ensure_ascii=False)
        (folder / "index.json").write_text(text, encoding="utf-8")


def record(
    model: Any,
    input_ids: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = None,
    max_new_tokens: int = 0,
    new_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> Recording:
    """Run a causal language model of Transformers and record every value on the way.

    Parameters
    ----------
    model : PreTrainedModel
        Built as Phi-3 or Llama are, in evaluation mode.  Its outputs do not change.
    input_ids : integer tensor [n_batch, n_seq]
    attention_mask, position_ids, past_key_values
        Go to the model as they are.  Without `position_ids` the model counts columns, also under
        left padding; `generate` counts along the mask: `(mask.cumsum(1) - 1).clamp(min=0)`.
    use_cache : bool, optional
        Default: where there are decode steps or `past_key_values`.
    max_new_tokens : int
        So many decode steps follow, each with the most probable token of the one before.
    new_ids : integer tensor [n_batch, n_new], optional
        The tokens of the decode steps instead, as many as there are columns: those of the gold,
        where the model under test would choose others.
    **kwargs
        Go to the model.

    Returns
    -------
    recording : Recording
        Values have the dtype in which the model computed them.  What this model does not show
        is listed under "not recorded" in the index.

    Raises
    ------
    ValueError
        For a model that is in training mode, or that is built otherwise.

    Notes
    -----
    Not for two threads at a time: the functions that are watched belong to the whole process.
    """
    session = _Session(model)
    n_new = max_new_tokens if new_ids is None else new_ids.shape[1]
    past, use_cache = past_key_values, _uses_cache(use_cache, past_key_values, n_new)
    ids, mask, positions = input_ids, attention_mask, position_ids
    with contextlib.ExitStack() as stack, torch.no_grad():
        session.watch(stack)
        for step in range(n_new + 1):
            session.start(ids, mask, past, use_cache)
            options = {"attention_mask": mask, "position_ids": positions, "use_cache": use_cache}
            out = model(input_ids=ids, past_key_values=past, **options, **kwargs)
            session.finish()
            if step < n_new:
                past = getattr(out, "past_key_values", None) if use_cache else None
                new = out.logits[:, -1:].argmax(-1) if new_ids is None else new_ids[:, step, None]
                ids, mask, positions = _next(new, ids, mask, positions, use_cache)
    return Recording(session.values, session.index(kwargs))


def _uses_cache(use_cache: bool | None, past: Any, n_new: int) -> bool:
    """Whether the run has a cache, where the caller does not say so."""
    return (past is not None or n_new > 0) if use_cache is None else use_cache


def _next(new: Any, ids: Any, mask: Any, positions: Any, use_cache: bool) -> tuple[Any, ...]:
    """Tokens, mask and positions of the next step."""
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    new_positions = None if positions is None else positions[..., -1:] + 1
    if use_cache:
        return new, mask, new_positions
    if positions is not None:
        positions = torch.cat([positions, positions[..., -1:] + 1], dim=-1)
    return torch.cat([ids, new], dim=1), mask, positions


class _Session:
    """What is watched during a run, and what was seen."""

    def __init__(self, model: Any) -> None:
        self.model, self.base = model, _checked(model)
        self.layers = list(self.base.layers)
        self.of_layer = {id(layer.self_attn): n for n, layer in enumerate(self.layers)}
        self.values: dict[str, torch.Tensor] = {}
        self.steps: list[dict[str, Any]] = []
        self.seen: dict[str, torch.Tensor] = {}
        self.layer: int | None = None  # whose attention runs
        self.positions: Any = None
        self.caches: list[Any] = []
        self.stack: contextlib.ExitStack

    # ----------------------------------------------------------------- what is watched

    def watch(self, stack: contextlib.ExitStack) -> None:
        """Put hooks on the modules and the three functions; the stack takes them away."""
        self.stack = stack
        self._before(self.layers[0], "model.embed_tokens")
        self._after(self.base.norm, "model.norm")
        self._before(self.model.lm_head, "lm_head.input")
        self._after(self.model.lm_head, "lm_head")
        hook = self.base.rotary_emb.register_forward_hook(self._tables, with_kwargs=True)
        stack.callback(hook.remove)
        for number, layer in enumerate(self.layers):
            self._watch_layer(f"model.layers.{number}", layer)
            self._watch_attention(layer.self_attn)

    def _watch_layer(self, name: str, layer: Any) -> None:
        self._after(layer, name)
        self._before(layer.post_attention_layernorm, f"{name}.residual")
        self._before(layer.self_attn.o_proj, f"{name}.self_attn.attention")
        self._before(layer.mlp.down_proj, f"{name}.mlp.swiglu")
        for part in ("input_layernorm", "self_attn.o_proj", "post_attention_layernorm"):
            self._after(layer.get_submodule(part), f"{name}.{part}")
        self._after(layer.mlp.down_proj, f"{name}.mlp.down_proj")
        for part in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
            for piece in _PIECES[part]:
                owner = layer.get_submodule(part.partition(".")[0])
                if hasattr(owner, piece):
                    self._after(getattr(owner, piece), f"{name} {piece}")
        for activation in ("activation_fn", "act_fn"):
            if isinstance(getattr(layer.mlp, activation, None), torch.nn.Module):
                self._before(getattr(layer.mlp, activation), f"{name} activation")

    def _watch_attention(self, module: Any) -> None:
        """Watch the attention function and the rotation of the file that defines the module."""
        for hook in (
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave, always_call=True),
        ):
            self.stack.callback(hook.remove)
        files = [sys.modules.get(cls.__module__) for cls in type(module).__mro__]
        file = next((x for x in files if hasattr(x, "ALL_ATTENTION_FUNCTIONS")), None)
        if file is None:
            return
        _replace(self.stack, file, "apply_rotary_pos_emb", self._rotation)
        kind, registry = module.config._attn_implementation, file.ALL_ATTENTION_FUNCTIONS
        if kind in registry or hasattr(registry, "get_interface"):
            default = getattr(file, "eager_attention_forward", None)
            _register(self.stack, registry, kind, default, self._attention)
        else:  # releases that look "eager" up in the file
            _replace(self.stack, file, "eager_attention_forward", self._attention)

    def _before(self, module: Any, name: str) -> None:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            self._keep(name, args[0] if args else next(iter(kwargs.values())))

        self.stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _after(self, module: Any, name: str) -> None:
        def hook(_: Any, __: Any, out: Any) -> None:
            self._keep(name, out)

        self.stack.callback(module.register_forward_hook(hook).remove)

    # ------------------------------------------------------------------ what was seen

    def _keep(self, name: str, x: Any) -> None:
        x = x[0] if isinstance(x, tuple) else x
        self.seen[name] = x.detach().to("cpu", copy=True)

    def _keep_of_layer(self, **values: Any) -> None:
        if self.layer is not None:
            for name, x in values.items():
                self._keep(f"model.layers.{self.layer}.self_attn.{name}", x)

    def _has_of_layer(self, name: str) -> bool:
        return f"model.layers.{self.layer}.self_attn.{name}" in self.seen

    def _tables(self, _: Any, args: Any, kwargs: Any, out: Any) -> None:
        """A table that all rows share has no batch axis."""
        self.positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        for name, x in zip(("cos", "sin"), out, strict=True):
            self._keep(f"model.rotary_emb.{name}", x[0] if len(x) == 1 else x)

    def _enter(self, module: Any, _: Any, kwargs: Any) -> None:
        self.layer = self.of_layer[id(module)]
        cache = kwargs.get("past_key_values", kwargs.get("past_key_value"))
        if hasattr(cache, "update") and not any(cache is known for known in self.caches):
            self.caches.append(cache)
            _replace(self.stack, cache, "update", self._update)

    def _leave(self, *_: Any) -> None:
        self.layer = None

    def _rotation(self, original: Callable) -> Callable:
        def apply_rotary_pos_emb(q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
            self._keep_of_layer(q_proj=q, k_proj=k)
            rotated = original(q, k, *args, **kwargs)
            self._keep_of_layer(q=rotated[0], k=rotated[1])
            return rotated

        return apply_rotary_pos_emb

    def _update(self, original: Callable) -> Callable:
        def update(key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            self._keep_of_layer(k=key_states, v=value_states)
            return original(key_states, value_states, *args, **kwargs)

        return update

    def _attention(self, original: Callable) -> Callable:
        def attention(module: Any, query: Any, key: Any, value: Any, *args: Any, **kw: Any) -> Any:
            out = original(module, query, key, value, *args, **kw)
            if id(module) not in self.of_layer:
                return out
            read = {"cached_k": key, "cached_v": value, "heads": out[0].transpose(1, 2)}
            if not self.steps[-1]["cached"]:
                read = {"k": key, "v": value, "heads": read["heads"]}
            for name, x in (read | {"q": query}).items():
                if name not in ("q", "k") or not self._has_of_layer(name):  # seen when rotated
                    self._keep_of_layer(**{name: x})
            return out

        return attention

    # ---------------------------------------------------------------------- the steps

    def start(self, ids: Any, mask: Any, past: Any, use_cache: bool) -> None:
        """Begin a step."""
        n_past = 0 if past is None else int(past.get_seq_length())
        step = {"input_ids": ids.tolist(), "n_past": n_past, "cached": use_cache}
        step["attention_mask"] = mask.tolist() if mask is not None and mask.ndim == 2 else None
        self.steps.append(step)
        self.seen, self.positions = {}, None

    def finish(self) -> None:
        """End a step: its values, under their names and in the order of execution."""
        step, number = self.steps[-1], len(self.steps) - 1
        n_batch = len(step["input_ids"])
        positions = self.positions
        step["position_ids"] = None if positions is None else positions.expand(n_batch, -1).tolist()
        if step["attention_mask"] is None and not step["cached"]:
            step |= _documents(step["position_ids"])
        for n in range(len(self.layers)):
            _join(self.seen, f"model.layers.{n}")
        for name in self.names(step["cached"]):
            if name in self.seen:
                self.values[name + (f"@{number}" if number else "")] = self.seen[name]

    def names(self, cached: bool) -> Iterator[str]:
        """Every name of a step, in the order of execution."""
        order = [name for name in VALUES if cached or ".cached_" not in name]
        inside = [name for name in order if name.startswith("model.layers.N")]
        first, last = order.index(inside[0]), order.index(inside[-1]) + 1
        yield from order[:first]
        for n in range(len(self.layers)):
            yield from (name.replace(".N", f".{n}") for name in inside)
        yield from order[last:]

    def index(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The index of the recorded values."""
        config, parameter = self.model.config, next(self.model.parameters())
        transformers = sys.modules.get("transformers")
        entries = {name: self._entry(name, x) for name, x in self.values.items()}
        expected = [
            (n + (f"@{t}" if t else ""))
            for t in range(len(self.steps))
            for n in self.names(self.steps[t]["cached"])
        ]
        return {
            "format": "npllm trace 1",
            "made by": "torch_recorder",
            "made with": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": getattr(transformers, "__version__", "?"),
            },
            "model": config.name_or_path or type(self.model).__name__,
            "config": json.loads(config.to_json_string(use_diff=False)),
            "ops": f"transformers {config._attn_implementation}",
            "dtype": _dtype(parameter),
            "arguments": sorted(kwargs),
            "steps": self.steps,
            "values": entries,
            "not recorded": [name for name in expected if name not in entries],
        }

    def _entry(self, name: str, x: torch.Tensor) -> dict[str, Any]:
        """The entry of a value in the index."""
        node, _, step = name.partition("@")
        found = re.fullmatch(r"(model\.layers\.)(\d+)(.*)", node)
        layer = int(found[2]) if found else len(self.layers)
        value = VALUES[f"{found[1]}N{found[3]}" if found else node]
        before = f"model.layers.{layer - 1}" if layer else "model.embed_tokens"

        def long(other: str) -> str:
            other = before if other == "model.layers.P" else other.replace(".N", f".{layer}")
            return other if self.steps[int(step or 0)]["cached"] else other.replace(".cached_", ".")

        axes = value["axes"]
        return {
            "file": f"step-{step or 0}.safetensors",
            "step": int(step or 0),
            "node": node,
            "axes": ["n_batch", *axes] if x.ndim > len(axes) else axes,
            "shape": list(x.shape),
            "dtype": _dtype(x),
            "op": value["op"],
            "inputs": [long(other) + (f"@{step}" if step else "") for other in value["inputs"]],
            "weights": [long(other) for other in value["weights"]],
            "formula": value["formula"],
            "conventions": value["conventions"],
            "status": "whole",
        }


_PIECES = {
    "self_attn.qkv_proj": ("qkv_proj", "q_proj", "k_proj", "v_proj"),
    "mlp.gate_up_proj": ("gate_up_proj", "gate_proj", "up_proj"),
}


def _join(seen: dict[str, Any], layer: str) -> None:
    """Put what was seen of the projections in parts under the names of the whole."""
    parts = {}
    for whole, pieces in _PIECES.items():
        found = [seen.pop(f"{layer} {piece}", None) for piece in pieces]
        one, rest = found[0], found[1:]
        if one is None and all(x is not None for x in rest):
            one = torch.cat(rest, dim=-1)
            parts[whole] = rest
        if one is not None:
            seen[f"{layer}.{whole}"] = one
    given = seen.pop(f"{layer} activation", None)
    gate_up = parts.get("mlp.gate_up_proj") or _halves(seen.get(f"{layer}.mlp.gate_up_proj"), given)
    if gate_up is not None:
        seen[f"{layer}.mlp.gate"], seen[f"{layer}.mlp.up"] = gate_up


def _documents(positions: list[list[int]] | None) -> dict[str, Any]:
    """Number the documents of packed rows as Transformers does: positions that do not go on by one
    begin another.
    """
    if positions is None:
        return {}
    rows = torch.tensor(positions)
    labels = (rows.diff(dim=1, prepend=rows[:, :1] - 1) != 1).cumsum(1) + 1
    return {"documents": labels.tolist()} if labels.max() > 1 else {}


def _halves(gate_up: Any, given: Any) -> Any:
    """Gate and up of a fused projection: gate is what the activation was given, up the rest."""
    if gate_up is None or given is None:
        return None
    halves = gate_up.chunk(2, dim=-1)
    for gate, up in (halves, halves[::-1]):
        if gate.shape == given.shape and torch.equal(gate, given):
            return given, up.contiguous()
    return None


def _checked(model: Any) -> Any:
    """The model below the head; an error that says what is otherwise."""
    if model.training:
        raise ValueError(
            "the model is in training mode, where dropout is random; call model.eval()"
        )
    base: Any = getattr(model, "model", None)
    wanted = ["lm_head", "model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers"]
    parts = ["input_layernorm", "post_attention_layernorm", "self_attn.o_proj", "mlp.down_proj"]
    missing = [name for name in wanted if not _has(model, name)]
    if not missing and len(base.layers):
        missing = [f"model.layers.0.{name}" for name in parts if not _has(base.layers[0], name)]
    if missing:
        raise ValueError(
            f"{type(model).__name__} is not built as Phi-3 or Llama are: it lacks {missing}"
        )
    return base


def _has(module: Any, name: str) -> bool:
    for part in name.split("."):
        module = getattr(module, part, None)
    return module is not None


def _dtype(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _replace(stack: Any, owner: Any, name: str, wrap: Callable) -> None:
    """Wrap a function of a file or an object, once; the stack puts the old one back."""
    original = getattr(owner, name, None)
    if original is None or getattr(original, "is_recorder", False):
        return
    own = name in vars(owner)
    wrapper = wrap(original)
    wrapper.is_recorder = True
    setattr(owner, name, wrapper)
    stack.callback(*((setattr, owner, name, original) if own else (delattr, owner, name)))


def _register(stack: Any, registry: Any, name: str, default: Any, wrap: Callable) -> None:
    """Wrap an entry of the registry of attention functions, once; the stack takes it away."""
    known = registry.get(name)
    if getattr(known, "is_recorder", False):
        return
    wrapper = wrap(default if known is None else known)
    wrapper.is_recorder = True
    registry[name] = wrapper

    def restore() -> None:
        del registry[name]
        if registry.get(name) is not known:
            registry[name] = known

    stack.callback(restore)
