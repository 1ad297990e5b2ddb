"""`trace`: run a model and keep its values."""

import contextlib
import json
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from npllm.arguments import check_integer
from npllm.arrays import is_array, to_numpy
from npllm.config import Config
from npllm.config.strict_json import read_json
from npllm.decoding.prompt import read_prompt
from npllm.errors import NpllmError, NpllmTypeError, NpllmValueError
from npllm.model import Model
from npllm.tracing.definitions import definitions
from npllm.tracing.folder import FolderValues, new_folder, write_index
from npllm.tracing.index import FORMAT, versions
from npllm.tracing.recorder import Recorder
from npllm.tracing.selection import Selection
from npllm.tracing.trace import Trace

__all__ = ["trace"]

Array = Any


def trace(
    model: Any,
    prompt: Any,
    *,
    layers: Any = None,
    tokens: Any = None,
    names: Any = None,
    dtype: str | None = None,
    max_new_tokens: int = 0,
    attention_mask: Any = None,
    position_ids: Any = None,
    folder: Any = None,
) -> Trace:
    """Run a prompt, and keep every value that `npllm.models.taps` names.

    Parameters
    ----------
    model : Model
    prompt : str, list of str, list of messages, or integers [n_batch, n_seq]
    layers : int or sequence of int, optional
        Only these layers; values outside of the layers are kept in any case.
    tokens : int or sequence of int, optional
        Only these positions of the axes n_seq, and n_kept of lm_head; axes n_ctx stay whole.
        Position 0 is the first slot of the prompt, padding included; new tokens follow the prompt;
        negative ones count from the end of the prompt.  Values that are cut are "partial" in the
        index; a step that holds none of the positions has no values with these axes.
    names : str or sequence of str, optional
        Only these: names, or patterns with * and ?.  `model.norm` is a value of every step,
        `model.norm@0` of one.  Masks and attention weights are kept where a name or pattern ends
        with their word: `*.self_attn.weights`.
    dtype : str, optional
        None: the model's own operations and dtype.  "float64" or "float32": the definitions
        (`npllm.ops.reference`), on the weights as they are stored, widened block by block.
    max_new_tokens : int
        So many tokens are decoded greedily with a cache, and each goes through the model: steps 1,
        2, ...; ids that would end an answer do not.
    attention_mask : array [n_batch, n_seq], optional
        Only with integers: 0 for padding.
    position_ids : integer array [n_seq], optional
        Or [n_batch, n_seq]: of the prompt.
    folder : str or Path, optional
        New or empty: the values are written there, as `Trace.save` does, and stay.  None: into a
        temporary folder, which is removed with the trace.

    Returns
    -------
    trace : Trace
        Values of step 0 by name, those of step t under `name@t`.

    Raises
    ------
    NpllmTypeError, NpllmValueError
        For a name, layer or position that the run does not have, and as the model does.
    NpllmOSError
        When the folder cannot be written.

    Notes
    -----
    Each layer is written as soon as it is computed, so that memory holds the values of one layer,
    and the logits.
    """
    if not isinstance(model, Model):
        raise NpllmTypeError(
            f"trace takes a Model, as npllm.load gives one, got {type(model).__name__}"
        )
    n_new = check_integer("max_new_tokens", max_new_tokens, 0, model.config.context_length)
    ids, valid = _tokens_of(model, prompt, attention_mask, n_new)
    n_most = model.config.context_length - ids.shape[1]
    if n_new > n_most:
        raise NpllmValueError(
            f"max_new_tokens must be at most {n_most}, what the context length "
            f"{model.config.context_length} leaves behind {ids.shape[1]} tokens, got {n_new}"
        )
    chosen = Selection(
        model.config.num_hidden_layers,
        ids.shape[1],
        n_new + 1,
        names=names,
        layers=layers,
        tokens=tokens,
    )
    runner = model if dtype is None else model.on(definitions(dtype))
    with _place(folder) as place:
        recorder = Recorder(place, chosen, model.config.num_hidden_layers)
        _run(runner, ids, valid, position_ids, recorder, n_new)
        index = _about(model, runner, dtype) | recorder.index
        write_index(place, index)
        made = Trace(index, FolderValues(place, index))
    if folder is None:
        weakref.finalize(made, shutil.rmtree, place, ignore_errors=True)
    return made


def _tokens_of(model: Any, prompt: Any, mask: Any, n_new: int) -> tuple[Array, Array]:
    """Ids and mask of a prompt; a mask of any form where no token follows."""
    is_ids = isinstance(prompt, list) and prompt and isinstance(prompt[0], list)
    if is_ids or is_array(prompt):
        tokens = model.check_tokens(prompt, mask, None, None)
        prompt = tokens.ids
        if n_new == 0:
            return tokens.ids, tokens.valid
    found = read_prompt(model, prompt, mask)
    return found.ids, found.valid


def _run(
    model: Any, ids: Array, valid: Array, positions: Any, recorder: Recorder, n_new: int
) -> None:
    """Send the prompt through the model, then each token that it decodes greedily."""
    cache = model.new_cache(len(ids)) if n_new else None
    for step in range(n_new + 1):
        tokens = model.check_tokens(ids, valid, positions, cache)
        before = None if cache is None else cache.rope_variant
        recorder.begin(step, tokens, cached=cache is not None)
        logits = model(
            ids,
            attention_mask=valid,
            position_ids=positions,
            cache=cache,
            logits_to_keep=recorder.n_logits,
            tap=recorder,
        )
        recorder.end(is_anew=cache is not None and (cache.rope_variant != before).any())
        ids = to_numpy(logits[:, -1:, :]).argmax(axis=-1)
        valid = np.concatenate([valid, np.ones_like(valid[:, :1])], axis=1)
        positions = None if positions is None else recorder.last_positions + 1


def _about(model: Any, runner: Any, dtype: str | None) -> dict[str, Any]:
    """What the index says of the run as a whole."""
    return {
        "format": FORMAT,
        "made by": "npllm.trace",
        "made with": versions(),
        "model": model.folder.name if model.folder else model.config.model_type,
        "config": config_content(model),
        "ops": runner.ops.name,
        "adapter": model.adapter,
        "dtype": dtype,
        "mask": _own_rules(model),
    }


def _own_rules(model: Any) -> list[str] | None:
    """The rule of each layer, where it is not the checkpoint's."""
    n_layers = model.config.num_hidden_layers
    return None if model.mask is None else [str(model.mask_rule(n)) for n in range(n_layers)]


def config_content(model: Any) -> dict[str, Any]:
    """Return the content of the model's config.json; of a model without a folder, or whose config
    was changed, what `Config.from_json` reads as the same config.
    """
    with contextlib.suppress(NpllmError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it was read before
        content = read_json(model.folder / "config.json") if model.folder else {}
        if content and Config.from_json(content) == model.config:
            return content
    fields = asdict(model.config)
    rope = {key: value for key, value in fields["rope_parameters"].items() if value is not None}
    own = ("quantization",)  # of the file that was read, under another name
    kept = {key: value for key, value in fields.items() if value is not None and key not in own}
    return json.loads(json.dumps(kept | {"rope_parameters": rope}))  # lists in place of tuples


@contextlib.contextmanager
def _place(folder: Any) -> Iterator[Path]:
    """The folder to write to; it is emptied where the run fails."""
    place = Path(tempfile.mkdtemp(prefix="npllm-trace-")) if folder is None else new_folder(folder)
    try:
        yield place
    except BaseException:
        for file in place.iterdir():
            file.unlink()
        place.rmdir()
        raise
