"""What an answer depends on besides the row, as plain data that can be hashed and compared."""

import uuid
from dataclasses import replace
from datetime import date
from typing import Any

from npllm import __version__
from npllm.arrays import array_namespace, backend_name
from npllm.cache.files import spelled
from npllm.cache.owner import content_hash
from npllm.encoder import Encoder
from npllm.errors import NpllmValueError
from npllm.model_base import named_ops

__all__ = ["difference", "settings_of"]

Settings = dict[str, Any]


def settings_of(name: str, model: Any, options: dict[str, Any]) -> Settings:
    """Describe a task: equal settings give equal answers, but for rounding on another machine.

    Parameters
    ----------
    name : str
        Of the task.
    model : Model or Encoder
    options : dict
        Of `generate`, of JSON values.

    Returns
    -------
    settings : dict
        Of JSON values.  "unnamed functions" is None, or differs in every call: where a mask or an
        operation is a function, whose content no name tells.

    Notes
    -----
    Reads all weights: about 1 s a GB.  No path is part of the settings.
    """
    is_encoder = isinstance(model, Encoder)
    decoding = None if is_encoder or name == "score" else repr(_without_path(model))
    mask, is_named = _mask(model)
    return {
        "task": name,
        "npllm": __version__,
        "weights": content_hash(model.params),
        "encoder": content_hash(model.settings) if is_encoder else None,
        "mask": mask,
        "config": repr(model.config),
        "ops": [model.ops.name, model.ops.activations],
        "cache_dtype": None if is_encoder else model.cache_dtype,
        "tokenizer": _tokenizer(name, model.tokenizer),
        "options": options,
        "defaults": decoding,
        "date": _date(name, model.tokenizer),
        "unnamed functions": None if is_named and _has_named_ops(model) else uuid.uuid4().hex,
    }


def difference(wanted: Settings, found: Settings) -> list[str]:
    """Name what differs between a model that was asked for and one that a worker loaded."""
    return [name for name in wanted if name != "date" and wanted[name] != found[name]]


def _without_path(model: Any) -> Any:
    """The generation config, wherever it was read from."""
    return replace(model.generation_config, source="")


def _mask(model: Any) -> tuple[str | None, bool]:
    """A mask in words, and whether they tell it from every other one."""
    try:
        return spelled(None if isinstance(model, Encoder) else model.mask), True
    except NpllmValueError:
        return None, False


def _has_named_ops(model: Any) -> bool:
    """Whether the operations are one of the sets that have a name."""
    backend = backend_name(array_namespace(model._an_array()))
    return isinstance(named_ops(model.ops, backend)[0], str)


def _tokenizer(name: str, tokenizer: Any) -> list[Any] | None:
    """What token ids and texts depend on; for a chat the template as well."""
    if tokenizer is None:
        return None
    template = tokenizer.chat_template if name == "chat" else None
    return [
        tokenizer.backend.to_str(),
        tokenizer.special_tokens,
        tokenizer.add_bos_token,
        template,
    ]


def _date(name: str, tokenizer: Any) -> str | None:
    """Today, where a chat template may write it into the prompt."""
    template = getattr(tokenizer, "chat_template", None) if name == "chat" else None
    return date.today().isoformat() if "strftime_now" in (template or "") else None
