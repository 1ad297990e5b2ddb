"""Checkpoints: safetensors files in Transformers' layout -> `Params`, named tuples of arrays with the shape beside every field.

Only headers are read until a tensor is asked for.  A tensor is a read-only view of the memory-mapped file wherever its dtype is
kept; nothing is copied at load, and the operating system reads a page when a product first touches it.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from npllm.arrays import DTYPES, asarray, dtype_named
from npllm.config import read_json
from npllm.errors import NpllmOSError, NpllmValueError

__all__ = ["LayerParams", "Params", "TensorEntry", "expected_shapes", "load_params", "read_entries"]

SAFETENSORS_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

Array = Any


class LayerParams(NamedTuple):
    """Weights of one decoder layer, under Transformers' leaf names."""

    input_layernorm: Array  # [d_model]
    qkv_proj: Array  # [(n_head + 2*n_kv_head)*d_head, d_model]: rows of all q heads, then k, then v
    o_proj: Array  # [d_model, n_head*d_head]
    post_attention_layernorm: Array  # [d_model]
    gate_up_proj: Array  # [2*d_ff, d_model]: rows of gate, then up
    down_proj: Array  # [d_model, d_ff]
    qkv_bias: Array | None = None  # [(n_head + 2*n_kv_head)*d_head]; biases exist in some Llama checkpoints only
    o_bias: Array | None = None  # [d_model]
    gate_up_bias: Array | None = None  # [2*d_ff]
    down_bias: Array | None = None  # [d_model]


class Params(NamedTuple):
    """Weights of a model.  Immutable; `lm_head` is `embed_tokens` itself where the checkpoint ties them.

    A classifier has `score` in place of `lm_head`.
    """

    embed_tokens: Array  # [n_vocab, d_model]
    layers: tuple[LayerParams, ...]  # n_layer of them
    norm: Array  # [d_model]
    lm_head: Array | None = None  # [n_vocab, d_model]
    score: Array | None = None  # [n_label, d_model]
    score_bias: Array | None = None  # [n_label]


class TensorEntry(NamedTuple):
    """Where a tensor stands: what a safetensors header says of it."""

    file: Path
    dtype: str  # as safetensors spells it: BF16, F16, F32, F64, I64, ...
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    stop: int


def expected_shapes(config):
    """List every tensor that a checkpoint of this configuration holds.

    Parameters
    ----------
    config : Config

    Returns
    -------
    shapes : dict of str to tuple of int
        Tensor name as in the file -> shape.
    """
    shapes = {name: shape for _, sources in _top_sources(config) for name, shape in sources.items()}
    for number in range(config.num_hidden_layers):
        shapes |= {name: shape for _, sources in _layer_sources(config, number) for name, shape in sources.items()}
    return shapes


def _top_sources(config):
    """Fields of Params and the tensors they are made of: (field, {name in the file: shape})."""
    n_vocab, d_model = config.vocab_size, config.hidden_size
    sources = [("embed_tokens", {"model.embed_tokens.weight": (n_vocab, d_model)}), ("norm", {"model.norm.weight": (d_model,)})]
    if config.head != "lm":
        sources.append(("score", {"score.weight": (config.num_labels, d_model)}))
    elif not config.tie_word_embeddings:
        sources.append(("lm_head", {"lm_head.weight": (n_vocab, d_model)}))
    if config.head == "token":
        sources.append(("score_bias", {"score.bias": (config.num_labels,)}))
    return sources


def _layer_sources(config, number):
    """Fields of LayerParams and the tensors they are made of, one below the other: (field, {name in the file: shape})."""
    d_model, d_ff = config.hidden_size, config.intermediate_size
    d_q, d_kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    if config.model_type == "phi3":
        qkv, gate_up = {"qkv_proj": d_q + 2 * d_kv}, {"gate_up_proj": 2 * d_ff}
    else:
        qkv, gate_up = {"q_proj": d_q, "k_proj": d_kv, "v_proj": d_kv}, {"gate_proj": d_ff, "up_proj": d_ff}
    prefix = f"model.layers.{number}."
    sources = [(norm, {f"{prefix}{norm}.weight": (d_model,)}) for norm in ("input_layernorm", "post_attention_layernorm")]
    for field, half, rows, d_in, has_bias in (
        ("qkv", "self_attn", qkv, d_model, config.attention_bias),
        ("o", "self_attn", {"o_proj": d_model}, d_q, config.attention_bias),
        ("gate_up", "mlp", gate_up, d_model, config.mlp_bias),
        ("down", "mlp", {"down_proj": d_model}, d_ff, config.mlp_bias),
    ):
        sources.append((field + "_proj", {f"{prefix}{half}.{leaf}.weight": (d_out, d_in) for leaf, d_out in rows.items()}))
        if has_bias:
            sources.append((field + "_bias", {f"{prefix}{half}.{leaf}.bias": (d_out,) for leaf, d_out in rows.items()}))
    return sources


def load_params(folder, config, *, dtype=None, xp=np, progress=False):
    """Load the weights of a checkpoint folder.

    Parameters
    ----------
    folder : str or Path
        Holds model.safetensors, or model.safetensors.index.json and the files it names.
    config : Config
    dtype : str, optional
        "bfloat16", "float16", "float32" or "float64"; default: each tensor as it is stored.
    xp : module
        The array library to put them into.
    progress : bool
        Show a bar with bytes and shard on stderr where the tqdm package is installed.

    Returns
    -------
    params : Params
        With NumPy and `dtype` as stored: read-only views of the mapped files.

    Raises
    ------
    NpllmOSError
        When a file is missing, truncated, or not safetensors.
    NpllmValueError
        One error that lists every missing, unknown and misshapen tensor and every unusable dtype.
    """
    if dtype is not None:
        dtype_named(dtype)
    entries = read_entries(folder)
    check_entries(folder, entries, config)
    total = sum(entry.stop - entry.start for entry in entries.values())
    bar = progress_bar(total, "loading") if progress else contextlib.nullcontext()
    with bar as advance:
        reader = _TensorReader(entries, dtype, xp, advance)
        layers = tuple(LayerParams(**{field: reader.read(sources) for field, sources in _layer_sources(config, number)})
                       for number in range(config.num_hidden_layers))
        top = {field: reader.read(sources) for field, sources in _top_sources(config)}
    if config.head == "lm" and config.tie_word_embeddings:
        top["lm_head"] = top["embed_tokens"]
    return Params(layers=layers, **top)


class _TensorReader:
    """Turns entries of the headers into arrays."""

    def __init__(self, entries, dtype, xp, advance):
        self.entries, self.dtype, self.xp, self.advance = entries, dtype, xp, advance

    def read(self, names):
        """One tensor as it stands in the file, or several as one, their rows below each other."""
        views = [self._view(name) for name in names]
        x = _convert(views[0], self.dtype) if len(views) == 1 else self._stack(views)
        if self.advance:
            for name in names:
                self.advance(self.entries[name].stop - self.entries[name].start, self.entries[name].file.name)
        return asarray(x, self.xp)

    def _view(self, name):
        """View a tensor in the mapped file; copy it where it is not aligned to its item size."""
        entry = self.entries[name]
        dtype = DTYPES[SAFETENSORS_DTYPES[entry.dtype]].newbyteorder("<")
        if entry.stop == entry.start:
            return np.zeros(entry.shape, dtype)
        raw = np.memmap(entry.file, dtype=np.uint8, mode="r", offset=entry.start, shape=(entry.stop - entry.start,))
        if raw.ctypes.data % dtype.itemsize:
            raw = raw.copy()
        return np.asarray(raw).view(dtype).reshape(entry.shape)

    def _stack(self, views):
        """Copy tensors into one, and let go of each mapping once it is copied, so that the file's pages are not held as well."""
        dtype = views[0].dtype if self.dtype is None else dtype_named(self.dtype)
        n_rows = sum(view.shape[0] for view in views)
        x = np.empty((n_rows, *views[0].shape[1:]), dtype)
        start = 0
        while views:
            view = views.pop(0)
            x[start : start + view.shape[0]] = view
            start += view.shape[0]
            del view
        return x


def read_entries(folder):
    """Read the headers of a checkpoint, and nothing else.

    Parameters
    ----------
    folder : str or Path

    Returns
    -------
    entries : dict of str to TensorEntry

    Raises
    ------
    NpllmOSError
        When a file is missing, truncated, or not safetensors.
    NpllmValueError
        When the index is no index, or names a file outside the folder.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return _read_header(single)
    if not index.is_file():
        raise NpllmOSError(f"{folder}: holds neither model.safetensors nor model.safetensors.index.json{_found_instead(folder)}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise NpllmValueError(f"{index}: must have a weight_map from tensor names to files, got {str(weight_map)[:100]}")
    headers = {name: _read_header(_file_inside(index, name)) for name in sorted(set(map(str, weight_map.values())))}
    lost = [f"{name} in {file}" for name, file in weight_map.items() if name not in headers[str(file)]]
    if lost:
        raise NpllmValueError(f"{index}: names tensors that the files do not hold: {_some(lost)}")
    return {name: headers[file][name] for name, file in weight_map.items()}


def _read_header(path):
    """Read one file's header: 8 bytes little-endian length, then JSON.  The safetensors library validates it first."""
    if not path.is_file():
        raise NpllmOSError(f"{path}: no such file; is the download complete?")
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(n_header), object_pairs_hook=_no_duplicates)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise NpllmOSError(f"{path}: is not a readable safetensors file ({error}); is the download complete?") from None
    header.pop("__metadata__", None)
    begin = 8 + n_header
    return {name: TensorEntry(path, entry["dtype"], tuple(entry["shape"]), *(begin + offset for offset in entry["data_offsets"]))
            for name, entry in header.items()}


def _no_duplicates(pairs):
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"the header names {next(name for name in names if names.count(name) > 1)!r} twice")
    return dict(pairs)


def _file_inside(index, name):
    """Path of a file that an index names; it must stand in the folder itself (as a file or as a link)."""
    if name != Path(name).name or name in ("", ".", ".."):
        raise NpllmValueError(f"{index}: may only name files of its own folder, got {name!r}")
    return index.parent / name


def _found_instead(folder):
    """Say what lies in a folder that has no safetensors."""
    if not folder.is_dir():
        return " (there is no such folder)"
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return (f"; {_some(pickles)} may hold Python pickles, which can run any code when they are opened and are refused; "
                "convert them to safetensors with a tool you trust")
    return ""


def check_entries(folder, entries, config):
    """Raise one error that lists everything wrong with the tensors of a checkpoint."""
    expected = expected_shapes(config)
    ignored = {name for name in entries if name.endswith("rotary_emb.inv_freq")}
    ignored |= {"lm_head.weight"} if config.tie_word_embeddings or config.head != "lm" else set()
    missing, unknown = expected.keys() - entries.keys(), entries.keys() - expected.keys() - ignored
    misshapen = [f"{name} must be {list(expected[name])}, got {list(entry.shape)}"
                 for name, entry in entries.items() if name in expected and entry.shape != expected[name]]
    unusable = [f"{name} is {entry.dtype}" for name, entry in entries.items()
                if name in expected and entry.dtype not in SAFETENSORS_DTYPES]
    problems = [f"{what}: {_some(sorted(names))}" for what, names in (
        ("missing", missing), ("unknown", unknown), ("wrong shape", misshapen),
        (f"dtype not one of {', '.join(SAFETENSORS_DTYPES)}", unusable)) if names]
    if "lm_head.weight" in missing:
        problems.append("lm_head.weight may be absent only where config.json says tie_word_embeddings: true")
    if problems:
        raise NpllmValueError(f"{folder}: the tensors do not fit config.json; " + "; ".join(problems))


def _convert(x, dtype):
    return x if dtype is None else x.astype(dtype_named(dtype), copy=False)


@contextlib.contextmanager
def progress_bar(total, what):
    """Yield a function (bytes, label) that moves a bar on stderr; None where tqdm is missing or nobody looks."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield None
        return
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty()) as bar:

        def advance(n_bytes, label):
            bar.set_postfix_str(label, refresh=False)
            bar.update(n_bytes)

        yield advance


def _some(names, most=8):
    """Write a list out, cut after `most`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
