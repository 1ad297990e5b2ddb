"""Checkpoints: safetensors files in Transformers' layout -> `Params`, named tuples of arrays with the shape beside every field.

Only headers are read until a tensor is asked for.  A tensor is a read-only view of the memory-mapped file wherever its dtype is
kept; nothing is copied at load, and the operating system reads a page when a product first touches it.
"""

import contextlib
import json
import os.path
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from npllm.arrays import DTYPES, asarray, dtype_named, native, widest
from npllm.checkpoints.unused import are_rope_frequencies, same_values, warn_of_unused
from npllm.checkpoints.upload import Upload
from npllm.config.strict_json import no_duplicates, printable, quote, read_json
from npllm.errors import NpllmOSError, NpllmValueError
from npllm.quantized.int8 import quantize

__all__ = ["LayerParams", "Params", "TensorEntry", "TensorReader", "check_shapes", "expected_shapes", "find_nonfinite",
           "load_params", "read_entries"]

SAFETENSORS_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
INTEGER_DTYPES = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}  # of old buffers
LARGEST_HEADER = 2**25  # bytes; that of the largest published file has some hundred thousand
EMBEDDING, OUTPUT, ROPE_BUFFER = "model.embed_tokens.weight", "lm_head.weight", "rotary_emb.inv_freq"
BLOCK = 2**22  # numbers to look at together
EXPONENT = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF0000000000000)}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE_DANGER = ("may hold Python pickles, which can run any code when they are opened and are refused; convert them to "
                 "safetensors with a tool you trust")

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

    A checkpoint ties them where config.json says tie_word_embeddings and the file does not hold two different matrices.

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
        "bfloat16", "float16", "float32", "float64", or "int8": matrices rounded to `Int8Weight`, all else as stored.
        Default: each tensor as it is stored.
    xp : module
        The array library to put them into.
    progress : bool
        Show a bar with bytes and shard on stderr where the tqdm package is installed.

    Returns
    -------
    params : Params
        With NumPy and `dtype` as stored: read-only views of the mapped files.  With CuPy: copied straight from those, see
        `npllm.checkpoints.upload`; the host never holds them a second time.

    Raises
    ------
    NpllmOSError
        When a file is missing, truncated, or not safetensors.
    NpllmValueError
        One error that lists every missing, unknown and misshapen tensor and every unusable dtype.

    Warns
    -----
    UserWarning
        Where config.json ties two matrices that differ (both are used), and for tensors that hold something and are not used.

    Notes
    -----
    Where config.json ties embedding and output and the file holds only one of the two, that one is used for both.

    Source: `PreTrainedModel.tie_weights` in Transformers 5.23.
    """
    if dtype is not None and (not isinstance(dtype, str) or dtype not in (*DTYPES, "int8")):
        raise NpllmValueError(f"dtype must be one of {', '.join(DTYPES)}, int8, got {dtype!r}")
    entries = read_entries(folder)
    check_entries(folder, entries, config)
    _warn_of_ignored(folder, entries, config)
    top_sources = _top_sources_in(folder, entries, config)
    layer_sources = [dict(_layer_sources(config, number)) for number in range(config.num_hidden_layers)]
    used = [entries[name] for fields in (top_sources, *layer_sources) for names in fields.values() for name in names]
    total = sum(entry.stop - entry.start for entry in used)
    bar = progress_bar(total, "loading") if progress else contextlib.nullcontext()
    with bar as advance:
        reader = TensorReader(entries, dtype, xp, advance)
        layers = tuple(LayerParams(**{field: reader.read(names) for field, names in fields.items()}) for fields in layer_sources)
        top = {field: reader.read(names) for field, names in top_sources.items()}
        reader.finish()
    if _is_tied(config):
        top.setdefault("lm_head", top.get("embed_tokens"))
        top.setdefault("embed_tokens", top["lm_head"])
    return Params(layers=layers, **top)


def _is_tied(config):
    """Whether config.json says that embedding and output are one matrix."""
    return config.head == "lm" and config.tie_word_embeddings


def _top_sources_in(folder, entries, config):
    """Like `_top_sources`, of what the file holds: of two tied matrices the one that is there, or both where they differ."""
    sources = dict(_top_sources(config))
    if not _is_tied(config) or OUTPUT not in entries:
        return sources
    output = {"lm_head": {OUTPUT: entries[OUTPUT].shape}}
    if EMBEDDING not in entries:
        del sources["embed_tokens"]
        return sources | output
    if same_values(view_of(entries[EMBEDDING]), view_of(entries[OUTPUT])):
        return sources
    warnings.warn(f"{folder}: config.json says tie_word_embeddings: true, but {OUTPUT} and {EMBEDDING} differ, so both are used; "
                  "tie_word_embeddings: false would say so", stacklevel=4)
    return sources | output


def _warn_of_ignored(folder, entries, config):
    """Warn of tensors that hold something and are not used."""
    buffers = [name for name in entries if name.endswith(ROPE_BUFFER)]
    strange = [name for name in buffers if entries[name].dtype not in SAFETENSORS_DTYPES
               or not are_rope_frequencies(view_of(entries[name]), config)]
    warn_of_unused(folder, strange, "they are not the RoPE frequencies of config.json, which are used")
    if config.head != "lm":
        warn_of_unused(folder, [name for name in entries if name == OUTPUT], f"{config.architectures[0]} scores classes")


class TensorReader:
    """Turns entries of the headers into arrays."""

    def __init__(self, entries, dtype, xp, advance):
        self.entries, self.dtype, self.xp, self.advance = entries, dtype, xp, advance
        self.upload = Upload(xp) if xp.__name__ == "cupy" else None

    def read(self, names):
        """One tensor as it stands in the file, or several as one, their rows below each other."""
        views = [view_of(self.entries[name]) for name in names]
        if self.upload and self.dtype != "int8":  # quantised on the host, one tensor at a time
            return self._send(views, names)
        x = views[0] if len(views) == 1 else self._stack(views)
        try:
            x = _convert(x, self.dtype)
        except NpllmValueError as error:  # NaN has no place among 8-bit integers
            name = next(iter(names))
            raise NpllmValueError(f"{self.entries[name].file}: {name}: {error}") from None
        if self.advance:
            for name in names:
                self.advance(self.entries[name].stop - self.entries[name].start, self.entries[name].file.name)
        return asarray(x, self.xp)

    def finish(self):
        """Wait until everything has arrived."""
        if self.upload:
            self.upload.finish()

    def _send(self, views, names):
        """Copy tensors straight from the mapped file to the device."""
        dtype = self._common_dtype(views)
        file = self.entries[next(iter(names))].file.name
        return self.upload.stack(views, dtype, self.advance and (lambda n_bytes: self.advance(n_bytes, file)))

    def _common_dtype(self, views):
        """The dtype that was asked for; else the widest that is stored, so that no tensor is rounded beside a narrower one."""
        return widest(view.dtype for view in views) if self.dtype in (None, "int8") else dtype_named(self.dtype)

    def _stack(self, views):
        """Copy tensors into one, and let go of each mapping once it is copied, so that the file's pages are not held as well."""
        dtype = self._common_dtype(views)
        n_rows = sum(view.shape[0] for view in views)
        x = np.empty((n_rows, *views[0].shape[1:]), dtype)
        start = 0
        while views:
            view = views.pop(0)
            x[start : start + view.shape[0]] = view
            start += view.shape[0]
            del view
        return x


def view_of(entry):
    """View a tensor of numbers in the mapped file; copy it where it is not aligned to its item size."""
    name = SAFETENSORS_DTYPES.get(entry.dtype) or INTEGER_DTYPES[entry.dtype]
    dtype = (DTYPES[name] if name in DTYPES else np.dtype(name)).newbyteorder("<")
    if entry.stop == entry.start:
        return np.zeros(entry.shape, dtype)
    try:
        raw = np.memmap(entry.file, dtype=np.uint8, mode="r", offset=entry.start, shape=(entry.stop - entry.start,))
    except (OSError, ValueError) as error:
        raise NpllmOSError(f"{entry.file}: cannot be mapped into memory ({error}); did it change meanwhile?") from None
    if raw.ctypes.data % dtype.itemsize:
        raw = raw.copy()
    return np.asarray(raw).view(dtype).reshape(entry.shape)


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
    if os.path.isfile(single):
        return _read_header(single)
    if not os.path.isfile(index):
        raise NpllmOSError(f"{folder}: holds neither model.safetensors nor model.safetensors.index.json{_found_instead(folder)}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise NpllmValueError(f"{index}: must have a weight_map from tensor names to files, got {quote(weight_map)}")
    files = sorted({_file_name_inside(index, file) for file in weight_map.values()})
    headers = {file: _read_header(folder / file) for file in files}
    lost = [f"{name} in {file}" for name, file in weight_map.items() if name not in headers[file]]
    if lost:
        raise NpllmValueError(f"{index}: names tensors that the files do not hold: {_some(lost)}")
    twice = sorted(name for name, count in Counter(name for header in headers.values() for name in header).items() if count > 1)
    if twice:
        raise NpllmValueError(f"{index}: tensors that stand in more than one file: {_some(twice)}")
    return {name: headers[file][name] for name, file in weight_map.items()}


def _read_header(path):
    """Read one file's header: 8 bytes little-endian length, then JSON.  The safetensors library validates it first."""
    if not os.path.isfile(path):
        raise NpllmOSError(f"{path}: no such file; is the download complete?")
    try:
        with path.open("rb") as file:
            n_header, n_bytes = int.from_bytes(file.read(8), "little"), os.path.getsize(path)
            if n_header > min(n_bytes - 8, LARGEST_HEADER):
                raise ValueError(f"its header should have {n_header} bytes, but the file has {n_bytes}, and a header may have at "
                                 f"most {LARGEST_HEADER}")
            with safe_open(path, framework="np"):
                pass
            header = json.loads(file.read(n_header), object_pairs_hook=no_duplicates)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        reason = printable(str(error)[:300])
        raise NpllmOSError(f"{path}: is not a readable safetensors file ({reason}); is the download complete?") from None
    header.pop("__metadata__", None)
    begin = 8 + n_header
    return {name: TensorEntry(path, entry["dtype"], tuple(entry["shape"]), *(begin + offset for offset in entry["data_offsets"]))
            for name, entry in header.items()}


def _file_name_inside(index, name):
    """Check the name of a file in an index: it must stand in the folder itself (as a file or as a link)."""
    if not isinstance(name, str) or name != Path(name).name or name in ("", ".", "..") or "\\" in name or not name.isprintable():
        raise NpllmValueError(f"{index}: may only name files of its own folder, got {quote(name)}")
    if name.endswith(PICKLES):
        raise NpllmValueError(f"{index}: {quote(name)} {PICKLE_DANGER}")
    return name


def _found_instead(folder):
    """Say what lies in a folder that has no safetensors."""
    if not folder.is_dir():
        return " (there is no such folder)"
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    return f"; {_some(pickles)} {PICKLE_DANGER}" if pickles else ""


def check_entries(folder, entries, config):
    """Raise one error that lists everything wrong with the tensors of a checkpoint."""
    expected = expected_shapes(config)
    if _is_tied(config) and OUTPUT in entries:
        expected[OUTPUT] = expected[EMBEDDING] if EMBEDDING in entries else expected.pop(EMBEDDING)
    ignored = {name for name in entries if name.endswith(ROPE_BUFFER)} | ({OUTPUT} if config.head != "lm" else set())
    untied = OUTPUT in expected.keys() - entries.keys()
    check_shapes(folder, entries, expected, ignored,
                 ["lm_head.weight may be absent only where config.json says tie_word_embeddings: true"] if untied else [])


def check_shapes(folder, entries, expected, ignored=frozenset(), advice=()):
    """Raise one error that lists every missing, unknown and misshapen tensor and every unusable dtype.

    Parameters
    ----------
    folder : str or Path
        For the message.
    entries : dict of str to TensorEntry
    expected : dict of str to tuple of int
        Tensor name -> shape.
    ignored : set of str
        Names that may be present without being expected.
    advice : list of str
        What else to say.

    Raises
    ------
    NpllmValueError
    """
    missing, unknown = expected.keys() - entries.keys(), entries.keys() - expected.keys() - ignored
    misshapen = [f"{name} must be {list(expected[name])}, got {list(entry.shape)}"
                 for name, entry in entries.items() if name in expected and entry.shape != expected[name]]
    unusable = [f"{name} is {entry.dtype}" for name, entry in entries.items()
                if name in expected and entry.dtype not in SAFETENSORS_DTYPES]
    problems = [f"{what}: {_some(sorted(names))}" for what, names in (
        ("missing", missing), ("unknown", unknown), ("wrong shape", misshapen),
        (f"dtype not one of {', '.join(SAFETENSORS_DTYPES)}", unusable)) if names]
    problems += advice
    if problems:
        raise NpllmValueError(f"{folder}: the tensors do not fit config.json; " + "; ".join(problems))


def find_nonfinite(folder):
    """Find the tensors that hold NaN or infinity, without loading the checkpoint.

    Parameters
    ----------
    folder : str or Path

    Returns
    -------
    counts : dict of str to tuple of int
        Tensor name -> (number of NaN, number of infinities), in the order of names; empty where every number is finite.

    Raises
    ------
    NpllmOSError, NpllmValueError
        As `read_entries`.

    Notes
    -----
    Looks at the bits, block by block, at the speed of the disk: a number is not finite where all bits of its exponent are set,
    and NaN where its fraction is not zero either.  Tensors of dtypes that `load_params` refuses are left out.

    Source: IEEE 754-2019, section 3.4.
    """
    counts = {}
    for name, entry in sorted(read_entries(folder).items()):
        if entry.dtype in EXPONENT:
            n_nan, n_infinite = _count_nonfinite(entry)
            if n_nan or n_infinite:
                counts[name] = n_nan, n_infinite
    return counts


def _count_nonfinite(entry):
    """Count (NaN, infinities) of one tensor in its file."""
    dtype, exponent = EXPONENT[entry.dtype]
    sign = 1 << (8 * np.dtype(dtype).itemsize - 1)
    left, n_nan, n_infinite = (entry.stop - entry.start) // np.dtype(dtype).itemsize, 0, 0
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        while left:
            bits = np.fromfile(file, dtype, min(left, BLOCK))
            if not len(bits):
                raise NpllmOSError(f"{entry.file}: ends within a tensor; did it change meanwhile?")
            bits &= np.array(~sign & (2 * sign - 1), dtype)
            n_nan += int(np.count_nonzero(bits > exponent))
            n_infinite += int(np.count_nonzero(bits == exponent))
            left -= len(bits)
    return n_nan, n_infinite


def _convert(x, dtype):
    if dtype == "int8":
        return quantize(x) if x.ndim == 2 else x
    return native(x) if dtype is None else x.astype(dtype_named(dtype), copy=False)


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
    shown = [printable(name[:200]) for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
