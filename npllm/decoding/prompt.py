"""From a prompt of any kind to token ids, padded on the left."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from npllm.arguments import check_attention_mask, check_ids
from npllm.arrays import is_array
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.text.padding import pad_left

__all__ = ["Prompt", "is_chat", "pad_left", "read_prompt", "require_tokenizer"]

Array = Any


class Prompt(NamedTuple):
    """Prompts as token ids: checked, of one length."""

    ids: Array  # int64 [n_batch, n_prompt], NumPy
    valid: Array  # bool [n_batch, n_prompt], NumPy: False where a row is padding
    is_text: bool  # False: the caller gave ids
    is_single: bool  # True: one text or one conversation, not a list of them


def read_prompt(
    model: Any, prompt: Any, attention_mask: Any = None, tools: Sequence[Any] | None = None
) -> Prompt:
    """Turn a prompt into token ids.

    Parameters
    ----------
    model : Model
        Its tokenizer, sizes and pad id are used.
    prompt : str, list of str, list of messages, or integer array [n_batch, n_prompt]
    attention_mask : array [n_batch, n_prompt], optional
        Only with an array of ids: 0 for padding on the left.
    tools : list, optional
        Only with messages: what the chat template is told of tools.

    Returns
    -------
    prompt : Prompt

    Raises
    ------
    NpllmTypeError, NpllmValueError
        For what is no prompt, for ids outside the vocabulary, and where the prompt does not fit the
        context; names both numbers.  When the model is a classifier.
    """
    config, pad = model.config, model.generation_config.pad_token_id or 0
    if config.head != "lm":
        raise NpllmValueError(
            f"{config.architectures[0]} scores classes and cannot generate text; "
            "call the model with ids"
        )
    if tools is not None and not is_chat(prompt):
        raise NpllmTypeError("tools go with a list of messages: the chat template describes them")
    found = (
        _from_ids(config, prompt, attention_mask)
        if is_array(prompt)
        else _from_text(model, prompt, attention_mask, tools, pad)
    )
    if found.ids.shape[1] >= config.context_length:
        raise NpllmValueError(
            f"the prompt has {found.ids.shape[1]} tokens, but the context length "
            f"(max_position_embeddings) is {config.context_length}, and the answer must fit in as "
            "well; shorten the prompt"
        )
    return found


def _from_ids(config: Any, prompt: Array, attention_mask: Any) -> Prompt:
    ids = check_ids("input_ids", prompt, config.vocab_size, "vocab_size")
    past = np.ones((len(ids), 0), dtype=bool)
    valid = check_attention_mask(attention_mask, ids.shape[1], past)
    if not valid[:, -1].all():
        raise NpllmValueError(
            "attention_mask must be 1 in its last column: prompts are padded on the left, "
            "the answer follows the last token"
        )
    return Prompt(ids, valid, is_text=False, is_single=False)


def _from_text(model: Any, prompt: Any, attention_mask: Any, tools: Any, pad: int) -> Prompt:
    if attention_mask is not None:
        raise NpllmTypeError(
            "attention_mask goes with an array of token ids; "
            "texts are padded and masked by themselves"
        )
    rows = _encode(require_tokenizer(model), prompt, tools)
    if not all(rows):
        raise NpllmValueError("the prompt is empty: it must hold at least one token")
    ids, valid = pad_left(rows, pad)
    ids = check_ids("input_ids", ids, model.config.vocab_size, "vocab_size")
    is_single = isinstance(prompt, str) or is_chat(prompt)
    return Prompt(ids, valid, is_text=True, is_single=is_single)


def _encode(tokenizer: Any, prompt: Any, tools: Any) -> list[list[int]]:
    """The token ids of each text."""
    if isinstance(prompt, str):
        return [tokenizer.encode(prompt)]
    if is_chat(prompt):
        return [tokenizer.encode_chat(prompt, **({} if tools is None else {"tools": tools}))]
    if isinstance(prompt, list | tuple) and prompt:
        return [tokenizer.encode(text) for text in prompt]
    raise NpllmTypeError(
        "prompt must be a str, a list of str, a list of messages or an integer array "
        f"[n_batch, n_prompt], got {str(prompt)[:80]!r}"
    )


def is_chat(prompt: Any) -> bool:
    """Return whether a prompt is a list of messages."""
    return (
        isinstance(prompt, list | tuple)
        and len(prompt) > 0
        and all(isinstance(message, dict) for message in prompt)
    )


def require_tokenizer(model: Any) -> Any:
    """Return the tokenizer of a model or encoder; raise where its folder has none."""
    if model.tokenizer is None:
        raise NpllmValueError(
            f"{model.folder or 'this model'}: has no tokenizer.json, "
            "so it takes token ids only, not text"
        )
    return model.tokenizer
