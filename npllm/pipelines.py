"""`pipeline`: a model in the calling convention of Transformers' pipelines."""

from collections.abc import Callable
from typing import Any

from npllm.arguments import check_flag
from npllm.decoding.keywords import GenerateArguments
from npllm.decoding.prompt import is_chat
from npllm.encoder import Encoder
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.loading import checkpoint_folder, load, read_tokenizer
from npllm.model import Model
from npllm.text.tokenizer import Tokenizer

__all__ = ["pipeline"]


def pipeline(
    task: str, model: Any = None, *, tokenizer: Any = None, **defaults: Any
) -> Callable[..., list[Any]]:
    """Wrap a model in the calling convention of Transformers' pipelines.

    Parameters
    ----------
    task : str
        "text-generation".
    model : Model, str or Path, optional
        A model, or what `load` takes.
    tokenizer : Tokenizer, str or Path, optional
        Or the folder of one.  Default: that of the model.
    **defaults
        Options of every call that does not give them: return_full_text, and those of
        `Model.generate`, such as max_new_tokens.

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
    NpllmTypeError
        For an option that `Model.generate` does not have.

    Notes
    -----
    Source: `TextGenerationPipeline` in Transformers.
    """
    if task != "text-generation":
        raise NpllmValueError(f'task must be "text-generation", got {task!r}')
    _check_names(defaults)
    model = model if isinstance(model, Model | Encoder) else load(model)
    if tokenizer is not None and isinstance(model, Model):
        is_path = not isinstance(tokenizer, Tokenizer)
        tokenizer = read_tokenizer(checkpoint_folder(tokenizer)) if is_path else tokenizer
        model = model.with_tokenizer(tokenizer)

    def pipe(prompt: Any, **options: Any) -> list[Any]:
        asked = {"return_full_text": True} | defaults | options
        is_full = check_flag("return_full_text", asked.pop("return_full_text"))
        new = model.generate(prompt, **asked)
        if isinstance(prompt, list) and not is_chat(prompt):
            return [[_answer(one, text, is_full)] for one, text in zip(prompt, new, strict=True)]
        return [_answer(prompt, new, is_full)]

    return pipe


def _check_names(options: dict[str, Any]) -> None:
    """Raise for an option that no call could take."""
    known = {"return_full_text", *GenerateArguments.__annotations__} - {"return_dict_in_generate"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise NpllmTypeError(
            f"pipeline has no argument {unknown[0]!r}: besides model and tokenizer it takes "
            "return_full_text and the options of Model.generate; npllm.load has dtype, backend "
            "and ops"
        )


def _answer(prompt: Any, new: str, is_full: bool) -> dict[str, Any]:
    """One answer, behind its prompt where that is asked for."""
    if not is_full:
        return {"generated_text": new}
    if is_chat(prompt):
        return {"generated_text": [*prompt, {"role": "assistant", "content": new}]}
    return {"generated_text": prompt + new}
