"""`pipeline`: a model in the calling convention of Transformers' pipelines."""

from collections.abc import Callable
from typing import Any

from npllm.arguments import check_flag
from npllm.decoding.prompt import is_chat
from npllm.encoder import Encoder
from npllm.errors import NpllmValueError
from npllm.loading import load
from npllm.model import Model

__all__ = ["pipeline"]


def pipeline(task: str, model: Any = None) -> Callable[..., list[Any]]:
    """Wrap a model in the calling convention of Transformers' pipelines.

    Parameters
    ----------
    task : str
        "text-generation".
    model : Model, str or Path, optional
        A model, or what `load` takes.

    Returns
    -------
    pipe : function (prompt, *, return_full_text=True, **options) -> list of dict
        `pipe(prompt, max_new_tokens=50, return_full_text=False, do_sample=False)` returns
        [{"generated_text": "..."}]; a list of prompts returns one such list for each.  With
        messages and the full text, "generated_text" is the conversation with the assistant's
        message appended.  Options are those of `Model.generate`.

    Raises
    ------
    NpllmValueError
        For another task.

    Notes
    -----
    Source: `TextGenerationPipeline` in Transformers.
    """
    if task != "text-generation":
        raise NpllmValueError(f'task must be "text-generation", got {task!r}')
    model = model if isinstance(model, Model | Encoder) else load(model)

    def pipe(prompt: Any, *, return_full_text: bool = True, **options: Any) -> list[Any]:
        is_full = check_flag("return_full_text", return_full_text)
        new = model.generate(prompt, **options)
        if isinstance(prompt, list) and not is_chat(prompt):
            return [[_answer(one, text, is_full)] for one, text in zip(prompt, new, strict=True)]
        return [_answer(prompt, new, is_full)]

    return pipe


def _answer(prompt: Any, new: str, is_full: bool) -> dict[str, Any]:
    """One answer, behind its prompt where that is asked for."""
    if not is_full:
        return {"generated_text": new}
    if is_chat(prompt):
        return {"generated_text": [*prompt, {"role": "assistant", "content": new}]}
    return {"generated_text": prompt + new}
