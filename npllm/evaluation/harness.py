"""NpllmLM: a model as lm-eval calls it.

Importing this module registers the name "npllm" with lm-eval, which does not search for models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from npllm.arguments import check_integer
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.evaluation.continuations import score_continuations
from npllm.evaluation.requests import GenerationRequest, generation_request
from npllm.loading import load
from npllm.model import Model
from npllm.progress import progress_bar, warn
from npllm.text.padding import pad_left

__all__ = ["NpllmLM"]

Request = tuple[Any, list[int], list[int]]  # texts, tokens of the context and of the continuation
DEVICES = (None, "cpu")


class NpllmLM(TemplateLM):
    """A model as lm-eval calls it: log-likelihoods, and generation until a stop.

        lm_eval.simple_evaluate(model=NpllmLM(npllm.load(folder)), tasks=["hellaswag"])

    Parameters
    ----------
    model : Model, str, Path or None
        A model with a tokenizer; or what `npllm.load` takes.
    pretrained : str, optional
        The same under the name that lm-eval's own models have for it.
    batch_size : int
        Prompts that are continued at a time.  Log-likelihoods need none: see
        `score_continuations`.
    max_length : int, optional
        Longer inputs are cut on the left.  Default: the context length.
    max_gen_toks : int
        New tokens, where a task names no number.
    seed : int
        Of sampling.
    device : str, optional
        "cpu" or None.  Arrays on a GPU: `backend="cupy"`.
    max_batch_size : int, optional
        Not used: there is no search for a batch size.
    **options
        Of `npllm.load`: dtype, ops, backend, adapter, ...

    Raises
    ------
    NpllmError
        As `npllm.load`; for an encoder or classifier, a folder without a tokenizer, and another
        device.

    Notes
    -----
    Tokens, truncation and the first token of an empty context are those of lm-eval's model "hf".

    Source: `lm_eval.models.huggingface.HFLM`.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        pretrained: str | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 1234,
        device: str | None = None,
        max_batch_size: int | None = None,  # noqa: ARG002 - lm-eval hands it to every model
        **options: Any,
    ) -> None:
        super().__init__()
        if device not in DEVICES:
            raise NpllmValueError(
                f'device must be "cpu", got {device!r:.40}; backend="cupy" is the GPU'
            )
        self.model = _loaded(model if pretrained is None else pretrained, options)
        self.tokenizer = self.model.require_tokenizer()
        self.batch_size = check_integer("batch_size", _as_number(batch_size), 1, 2**31)
        most = self.model.config.context_length
        self.max_length = check_integer("max_length", max_length or most, 2, most + 1)
        self.max_gen_toks = check_integer("max_gen_toks", max_gen_toks, 1, 2**31)
        self.seed = seed

    # ------------------------------------------------------------------------------------ tokens

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._special("eos_token", self.model.generation_config.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by: the first token of texts, else the last one."""
        return self._special("bos_token", self.eot_token_id)

    def _special(self, name: str, default: Any) -> int:
        token = self.tokenizer.backend.token_to_id(self.tokenizer.special_tokens.get(name, ""))
        if token is None:
            token = default[0] if isinstance(default, list | tuple) and default else default
        if not isinstance(token, int):
            raise NpllmValueError(
                f"the model has no {name}, in tokenizer_config.json or generation_config.json: an "
                "empty context needs one"
            )
        return token

    @property
    def tokenizer_name(self) -> str:
        """A name for caches of requests."""
        folder = self.model.folder
        return str(folder or "npllm").replace("/", "__")

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        **_: Any,
    ) -> list[int]:
        """Turn a text into ids; a first token that the text has already is not added again."""
        add = add_special_tokens
        if add is None:
            prefix = self.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            add = not string.startswith(prefix)
        return self.tokenizer.encode(string, add_special_tokens=add)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Write a conversation as a text; without `add_generation_prompt` it ends with the last
        message, which is to be continued.
        """
        text = self.tokenizer.apply_chat_template(
            chat_history, add_generation_prompt=add_generation_prompt
        )
        if add_generation_prompt:
            return text
        content = chat_history[-1]["content"].rstrip()
        head, found, _ = text.rpartition(content)
        if not found:
            raise NpllmValueError(
                "the chat template changes the last message, which therefore cannot be continued"
            )
        return head + content

    # ------------------------------------------------------------------------------------ scores

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations: (log-probability, whether each token is the most likely one)."""
        pairs = self._fitted([(context, tokens) for _, context, tokens in requests])
        scores = score_continuations(self.model, pairs, progress=not disable_tqdm)
        answers = [(score.total, score.is_greedy) for score in scores]
        for request, answer in zip(requests, answers, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def _fitted(self, pairs: list[tuple[list[int], list[int]]]) -> list[Any]:
        """Contexts cut on the left so that input and continuation fit; one warning for all."""
        fitted, n_cut = [], 0
        for context, continuation in pairs:
            if len(continuation) > self.max_length:
                raise NpllmValueError(
                    f"a continuation must have at most max_length = {self.max_length} tokens, got "
                    f"{len(continuation)}"
                )
            room = self.max_length + 1 - len(continuation)
            n_cut += len(context) > room
            fitted.append((context[-room:], continuation))
        if n_cut:
            warn(
                f"{n_cut} of {len(pairs)} inputs are longer than max_length = {self.max_length} "
                "tokens: their contexts are cut on the left"
            )
        return fitted

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts: the log-probability of each, in windows of at most max_length
        tokens.
        """
        windows = [self._windows(request.args[0]) for request in requests]
        flat = [(None, *pair) for pairs in windows for pair in pairs]
        scores = iter(self._loglikelihood_tokens(flat, disable_tqdm))
        totals = [sum(next(scores)[0] for _ in pairs) for pairs in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """Context and continuation of each window of a text: every token is scored once."""
        pairs = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [make_disjoint_window(pair) for pair in pairs]

    # -------------------------------------------------------------------------------- generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue texts, each until one of its stop sequences."""
        asked = [generation_request(request.args[1], self.max_gen_toks) for request in requests]
        prompts = [self._prompt(r.args[0], n) for r, n in zip(requests, asked, strict=True)]
        answers: list[Any] = [None] * len(prompts)
        with progress_bar(
            len(prompts), "generating", unit="request", wanted=not disable_tqdm
        ) as advance:
            for numbers in _batches(prompts, asked, self.batch_size):
                texts = self._continued([prompts[n] for n in numbers], asked[numbers[0]])
                for number, text in zip(numbers, texts, strict=True):
                    answers[number] = text
                    args = requests[number].args
                    self.cache_hook.add_partial("generate_until", args, text)
                advance(len(numbers))
        return answers

    def _prompt(self, text: str, asked: GenerationRequest) -> list[int]:
        """Ids of a prompt, cut on the left so that the answer fits."""
        room = self.max_length - asked.max_new_tokens
        if room < 1:
            raise NpllmValueError(
                f"max_gen_toks must be less than max_length = {self.max_length}, got "
                f"{asked.max_new_tokens}"
            )
        ids = self.tok_encode(text)
        if len(ids) > room:
            warn(
                f"a prompt of {len(ids)} tokens leaves no room for {asked.max_new_tokens} new ones "
                f"within max_length = {self.max_length}: it is cut on the left"
            )
        return ids[-room:] or [self.prefix_token_id]

    def _continued(self, prompts: list[list[int]], asked: GenerationRequest) -> list[str]:
        """New text of some prompts that ask for the same."""
        ids, valid = pad_left(prompts, self.model.generation_config.pad_token_id or 0)
        until = list(asked.until)
        made = self.model.generate(
            ids,
            attention_mask=valid,
            max_new_tokens=asked.max_new_tokens,
            stop=until or None,
            seed=self.seed if asked.options["do_sample"] else None,
            **asked.options,
        )
        eos = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        texts = [self.tokenizer.decode(row[ids.shape[1] :]) for row in made]
        return [_until(text, [*until, eos]) for text in texts]


def _batches(
    prompts: list[list[int]], asked: list[GenerationRequest], size: int
) -> list[list[int]]:
    """Numbers of prompts that ask for the same, by falling length."""
    groups: dict[str, list[int]] = {}
    for number in sorted(range(len(prompts)), key=lambda n: -len(prompts[n])):
        groups.setdefault(repr(asked[number]), []).append(number)
    return [
        group[start : start + size]
        for group in groups.values()
        for start in range(0, len(group), size)
    ]


def _until(text: str, stops: list[str]) -> str:
    """A text before the first of its stop sequences."""
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text


def _loaded(model: Any, options: dict[str, Any]) -> Model:
    """The model that is meant; raise for one that predicts no next token."""
    if isinstance(model, Model):
        if options:
            raise NpllmTypeError(f"{', '.join(options)} go with a path, not with a loaded model")
    else:
        model = load(model, **options)
    config = getattr(model, "config", None)
    if not isinstance(model, Model) or getattr(config, "head", None) != "lm":
        raise NpllmValueError(
            "evaluation needs a causal language model, got an encoder or classifier"
        )
    return model


def _as_number(batch_size: Any) -> Any:
    """A batch size that may be a text; lm-eval's "auto" is the default."""
    if isinstance(batch_size, str) and batch_size.isdigit():
        return int(batch_size)
    if batch_size == "auto":
        return 8
    return batch_size


register_model("npllm")(NpllmLM)  # so that lm-eval finds it by name
