"""Model: a causal language model with text: generate, stream, search, embed in a pipeline."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Unpack, overload

from npllm import ops as _ops
from npllm.adapters import AdaptableLM
from npllm.arguments import check_flag, check_mask
from npllm.arrays import is_array
from npllm.checkpoints.fetch import EMBEDDING_MODEL
from npllm.config.config import Config
from npllm.decoding import loop
from npllm.decoding.beam import Beams, beam_search, beam_texts, best_answers
from npllm.decoding.details import StreamStep
from npllm.decoding.generation_config import GenerationConfig
from npllm.decoding.keywords import BeamArguments, GenerateArguments, StreamArguments, takes
from npllm.decoding.options import require_details, resolve_options
from npllm.decoding.prompt import is_chat, read_prompt, require_tokenizer
from npllm.decoding.sampler_chain import next_token_distribution
from npllm.decoding.sequences import seen_tokens
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.models import module_tree
from npllm.models.params import Params
from npllm.ops.checked import replaced_ops
from npllm.ops.opset import Ops
from npllm.text.tokenizer import Tokenizer

__all__ = ["Model"]

Array = Any


class Model(AdaptableLM):
    """A causal language model: a blueprint, its weights, and the operations it runs on.

    Parameters
    ----------
    config : Config
    params : Params
    ops : Ops, optional
    tokenizer : Tokenizer, optional
    generation_config : GenerationConfig, optional
    folder : Path, optional
        Where it came from.
    mask : Rule or list of Rule, optional
        See `with_mask`.
    origin : Origin, optional
        How another process reads the weights again.  Default: it gets the arrays.
    """

    def __init__(
        self,
        config: Config,
        params: Params,
        *,
        ops: Ops | str | None = None,
        tokenizer: Tokenizer | None = None,
        generation_config: GenerationConfig | None = None,
        folder: Path | None = None,
        mask: Any = None,
        origin: Any = None,
    ):
        super().__init__(config, params, ops=ops, mask=mask, origin=origin)
        self.tokenizer, self.folder = tokenizer, folder
        own = GenerationConfig(config.eos_token_id, config.pad_token_id)
        self.generation_config = generation_config or own

    @takes(GenerateArguments)
    def generate(self, prompt: Any, **options: Unpack[GenerateArguments]) -> Any:
        """Continue a prompt.

        Parameters
        ----------
        prompt : str, list of str, list of messages, or integer array [n_batch, n_prompt]
            Messages are {"role": ..., "content": ...} and go through the checkpoint's chat
            template.
        max_new_tokens : int or None
            Default 50.  None: until a stop, or until the context is full.
        do_sample : bool, optional
            False: greedy.  None: sample where an option below asks for it, else as
            generation_config.json says, else greedy.
        temperature, top_k, top_p, min_p, repetition_penalty : number, optional
            See `npllm.ops`.  None: as generation_config.json says, else off.  temperature=0 is
            greedy.
        seed : int, optional
            Replays the same draw; greedy decoding draws nothing.
        stop : str or list of str, optional
            The answer ends before the first of these; the checkpoint's own stop ids end it as well.
            None: stop_strings of generation_config.json.
        use_cache : bool
            False computes the whole sequence again for every token.
        cache : KVCache, optional
            Of `new_cache` or `load_cache`.  What it holds of the beginning of the prompt, from an
            earlier call, is not computed again; afterwards it holds this prompt and its answer.
        attention_mask : array [n_batch, n_prompt], optional
            Only with an array of ids: 0 for padding on the left.
        num_beams : int, optional
            Above 1: the best answer of a beam search, with length_penalty and early_stopping of
            generation_config.json; see `beam_search`.  None: as generation_config.json says, else
            1.
        min_new_tokens, no_repeat_ngram_size : int, optional
        bad_words_ids : list of list of int, optional
        suppress_tokens, begin_suppress_tokens, forced_eos_token_id : list of int, optional
            See the functions of these names in `npllm.ops`.  None: as generation_config.json says,
            else off.
        logits_processors : sequence of function (ids, logits) -> logits
            Run after all of these and before the filters of sampling.  NumPy: ids [n_batch, n_ctx],
            padding included, and logits [n_batch, n_vocab], which a function returns in the same
            shape and dtype.
        prompt_lookup_num_tokens : int, optional
            For one prompt: up to so many tokens that followed the same words earlier, at most 15,
            are proposed and verified in one pass.  The text is the same (but at near ties on a set
            that sums rows together in another order; the compiled set does not), sooner where it
            repeats the prompt.  Fewer are proposed where the measured seconds say that it does
            not pay.  None: off.  See `npllm.decoding.prompt_lookup`.
        tools : list of dict, optional
            Only with messages: JSON schemas that the chat template describes to the model.
        return_dict_in_generate : bool
            Return a `GenerateOutput`: ids, log-probabilities, finish reasons and the seed as well.
        top_logprobs : int
            With it: how many of the most likely tokens to name for each generated one.

        Returns
        -------
        text : str or list of str
            The new text only, for text and messages; for an array of ids int64 [n_batch, n_prompt +
            n_new], the prompt included, rows that ended early filled with the pad id (else the
            first stop id).

        Raises
        ------
        NpllmTypeError, NpllmValueError
            For contradictory options (do_sample=False with a temperature), values out of range, a
            prompt beyond the context length; before any work is done.

        Notes
        -----
        Source: `GenerationMixin.generate` in Transformers.
        """
        asked: dict[str, Any] = dict(options)
        mask, tools = asked.pop("attention_mask", None), asked.pop("tools", None)
        with_details = check_flag(
            "return_dict_in_generate", asked.pop("return_dict_in_generate", False)
        )
        resolved = resolve_options(self.generation_config, **asked)
        require_details(resolved, with_details, "return_dict_in_generate=True")
        found = read_prompt(self, prompt, mask, tools)
        if resolved.num_beams > 1:
            answers = best_answers(self, found, resolved)
            return answers[0] if found.is_single else answers
        run = loop.Generation(self, found, resolved)
        if with_details:
            return run.output(found.is_single)
        answers = run.texts() if found.is_text else run.ids()
        return answers[0] if found.is_single else answers

    @overload
    def stream(
        self, prompt: Any, *, details: Literal[False] = False, **options: Unpack[StreamArguments]
    ) -> Iterator[str]: ...
    @overload
    def stream(
        self, prompt: Any, *, details: Literal[True], **options: Unpack[StreamArguments]
    ) -> Iterator[StreamStep]: ...
    @takes(StreamArguments)
    def stream(
        self, prompt: Any, *, details: bool = False, **options: Unpack[StreamArguments]
    ) -> Iterator[Any]:
        """Continue one prompt, and yield the new text piece by piece, never half a character.

        Parameters
        ----------
        prompt : str or list of messages
        details : bool
            Yield a `StreamStep` for each token: its text, id and log-probability, and at the end
            the finish reason.
        max_new_tokens, do_sample, ...
            As in `generate`.  `num_beams` above 1 is refused.  `top_logprobs` goes with `details`.

        Returns
        -------
        pieces : iterator of str, or of StreamStep

        Raises
        ------
        NpllmTypeError, NpllmValueError
            As `generate`, at once and not at the first piece.
        """
        if not (isinstance(prompt, str) or is_chat(prompt)):
            raise NpllmTypeError(
                "stream takes one text or one list of messages, "
                f"got {type(prompt).__name__}; see generate"
            )
        run = loop.start(self, prompt, **options)
        details = check_flag("details", details)
        require_details(run.options, details, "details=True")
        return run.steps() if details else _pieces(run)

    @takes(
        BeamArguments, num_beams=4, num_return_sequences=1, length_penalty=1.0, early_stopping=False
    )
    def beam_search(self, prompt: Any, **options: Unpack[BeamArguments]) -> Beams | list[Any]:
        """Search for the answers of the highest score.

        Parameters
        ----------
        prompt : str, list of str, list of messages, or integer array [n_batch, n_prompt]
        attention_mask : array [n_batch, n_prompt], optional
            Only with an array of ids: 0 for padding on the left.
        num_beams, num_return_sequences, max_new_tokens, length_penalty, early_stopping
            See `npllm.decoding.beam.beam_search`, where the formula stands.
        repetition_penalty, stop, ...
            As in `generate`.

        Returns
        -------
        answers : list of dict, or Beams
            For text and messages [{"text", "score"}, ...], the best first, and a list of such lists
            for a list of prompts; for an array of ids `Beams(sequences, scores)`.

        Notes
        -----
        Source: `GenerationMixin._beam_search` in Transformers.
        """
        search = beam_search if is_array(prompt) else beam_texts
        return search(self, prompt, **options)

    def next_token_distribution(
        self,
        prompt: Any,
        *,
        order: str = "transformers",
        attention_mask: Any = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
    ) -> Array:
        """Give the exact distribution of the token after a prompt, after all filters.

        Parameters
        ----------
        prompt : str, list of str, list of messages, or integer array [n_batch, n_prompt]
        order : str
            "transformers" or "llama.cpp": in which order the filters are applied.
        attention_mask : array [n_batch, n_prompt], optional
            Only with an array of ids: 0 for padding on the left.
        temperature, top_k, top_p, min_p, repetition_penalty : number, optional
            What is left out is off, whatever generation_config.json says.

        Returns
        -------
        p : array [n_batch, n_vocab]
            NumPy float64; see `npllm.decoding.sampler_chain.next_token_distribution`.
        """
        ids, valid, *_ = read_prompt(self, prompt, attention_mask)
        logits = loop.last_logits(self, ids, attention_mask=valid)
        return next_token_distribution(
            logits,
            order=order,
            seen=seen_tokens(ids, valid, self.config.vocab_size),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )

    def embed(self, *_: Any, **__: Any) -> Any:
        """Refuse: only an encoder embeds texts."""
        raise NpllmTypeError(
            f"{self.folder or 'this model'} is a language model and is no encoder; embed is for "
            "folders of model_type bert, such as the one that "
            f"`npllm fetch {EMBEDDING_MODEL}` gets"
        )

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer; raise where the folder has none."""
        return require_tokenizer(self)

    def on(self, ops: Ops | str | None) -> "Model":
        """Return the same model on another set of operations, with the same weights."""
        return self._changed(ops=ops)

    def with_tokenizer(self, tokenizer: Tokenizer) -> "Model":
        """Return the same model with another tokenizer, on the same weights."""
        return self._changed(tokenizer=tokenizer)

    def with_mask(self, mask: Any) -> "Model":
        """Return the same model under another mask rule, on the same weights.

        Parameters
        ----------
        mask : Rule, list of Rule or None
            For all layers, or one for each layer (an alternating full and sparse stack as in GPT-3
            is a list).  It replaces the checkpoint's own rule, so that a causal one must say so:
            `causal() & ...`.  None: the checkpoint's own.

        Returns
        -------
        model : Model

        Raises
        ------
        NpllmTypeError
            For what is no rule: a function or a table.
        NpllmValueError
            When a list does not have one rule for each layer.

        Notes
        -----
        Padding is hidden in any case.

        Source: "Language Models are Few-Shot Learners" (Brown et al. 2020), section 2.1,
        alternating dense and sparse layers.
        """
        rules = mask if isinstance(mask, list | tuple) else [mask] if mask is not None else []
        for rule in rules:
            check_mask(rule)
        if not all(isinstance(rule, _ops.mask.Rule) for rule in rules):
            raise NpllmTypeError(
                "mask must be a Rule of npllm.ops.mask, a list of them or None, "
                f"got {str(mask)[:100]}; Rule(function) makes one of a function"
            )
        n_layer = self.config.num_hidden_layers
        if isinstance(mask, list | tuple) and len(mask) != n_layer:
            raise NpllmValueError(
                f"mask must hold one rule for each of {n_layer} layers, got {len(mask)}"
            )
        return self._changed(mask=mask)

    def with_ops(self, **ops: Callable[..., Any]) -> "Model":
        """Return the same model with some operations of its set replaced, on the same weights.

        Parameters
        ----------
        **ops : callable
            By name, with the signatures of `npllm.ops`.  A slot that contains a replaced part is
            emptied, so that the new part runs; everything else stays as fast as it was.

        Returns
        -------
        model : Model

        Raises
        ------
        NpllmTypeError
            For a name that no operation has.  While the model runs: when a replaced operation
            returns another library or dtype than its definition.
        NpllmValueError
            While the model runs: when it returns another shape.

        Notes
        -----
        `npllm.testing.adapt` makes such a function of one that takes torch or JAX arrays.
        """
        return self._changed(ops=replaced_ops(self.ops, ops))

    def _changed(self, **changes: Any) -> "Model":
        """A model on the same weights with some settings replaced."""
        settings = {
            "ops": self.ops,
            "tokenizer": self.tokenizer,
            "generation_config": self.generation_config,
            "folder": self.folder,
            "mask": self.mask,
            "origin": self.origin,
        }
        model = Model(self.config, self.base_params, **settings | changes)
        model.cache_dtype = self.cache_dtype
        model.__dict__.update(self._adapter_state())
        model.set_adapter(self.adapter)
        return model

    def _on_params(self, params: Params) -> "Model":
        """The same settings on other weights, which come from no file."""
        model = Model(
            self.config,
            params,
            ops=self.ops,
            tokenizer=self.tokenizer,
            generation_config=self.generation_config,
            folder=self.folder,
            mask=self.mask,
        )
        model.cache_dtype = self.cache_dtype
        return model

    def __str__(self) -> str:
        return module_tree.describe(self.config)

    def __repr__(self) -> str:
        name = self.folder.name if self.folder else self.config.model_type
        adapter = "" if self.adapter is None else f", adapter {self.adapter}"
        return f"<npllm.Model {name}, {self.ops.name} ops, mask {self._mask_text()}{adapter}>"

    def _mask_text(self) -> str:
        """The mask in short: one rule, or each different one with the number of its layers."""
        counts = Counter(repr(self.mask_rule(i)) for i in range(self.config.num_hidden_layers))
        if len(counts) == 1:
            return next(iter(counts))
        return ", ".join(f"{rule} in {n} layers" for rule, n in counts.items())


def _pieces(run: loop.Generation) -> Iterator[str]:
    """The text of one answer, piece by piece, without empty ones."""
    for (piece,) in run:
        if piece:
            yield piece
    (rest,) = run.close()
    if rest:
        yield rest
