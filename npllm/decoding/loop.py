"""The loop: prefill, decode, stop."""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from npllm.arrays import to_numpy
from npllm.cache import KVCache
from npllm.decoding.constraints import constrain
from npllm.decoding.details import Answer, GenerateOutput, Recorder, StreamStep
from npllm.decoding.generation_config import Constraints
from npllm.decoding.options import Options, resolve_options
from npllm.decoding.prompt import Prompt, read_prompt, require_tokenizer
from npllm.decoding.prompt_lookup import PromptLookup
from npllm.decoding.sampler_chain import choose, uniforms
from npllm.decoding.sequences import Sequences
from npllm.errors import NpllmValueError
from npllm.finite_scores import FROM_MODEL, check_scores
from npllm.forward_pass import CausalLM, counted_positions
from npllm.kernels.compilation import working_seconds
from npllm.models.rope import frequency_choice
from npllm.progress import warn
from npllm.text.stream import TextStream

__all__ = ["Generation", "count_new_tokens", "generate_tokens", "last_logits", "start"]

Array = Any


class Generation:
    """The answers to a batch of prompts, as they come: iterate over it, then `close`.

    Parameters
    ----------
    model : Model
    prompt : Prompt
    options : Options

    Attributes
    ----------
    sequences : Sequences
        Prompts and answers, as token ids.

    Yields
    ------
    pieces : list of str
        After each step, what the text of each answer has gained.

    Warns
    -----
    UserWarning
        When the context ends before `max_new_tokens`.
    """

    def __init__(self, model: Any, prompt: Prompt, options: Options):
        if options.sampling.do_sample and options.seed is None:
            options = replace(options, seed=secrets.randbits(32))
        if options.num_beams > 1:
            raise NpllmValueError(
                f"num_beams = {options.num_beams} gives answers as a whole, not token by token; "
                "use generate or beam_search, or give num_beams=1"
            )
        self.model, self.options, self.is_text = model, options, prompt.is_text
        if options.prompt_lookup_num_tokens and len(prompt.ids) > 1:
            raise NpllmValueError(
                "prompt_lookup_num_tokens takes one prompt at a time: the rows of a batch would "
                f"keep different numbers of proposed tokens; got {len(prompt.ids)} prompts"
            )
        tokenizer = require_tokenizer(model) if options.stop or prompt.is_text else None
        eos = model.generation_config.eos_token_id
        self._streams = [TextStream(tokenizer, eos, options.stop) for _ in prompt.ids]
        self.n_new = count_new_tokens(model.config, prompt, options.max_new_tokens)
        self.sequences = Sequences(prompt.ids, prompt.valid, model.config.vocab_size, self.n_new)
        self.recorder: Recorder | None = None

    def record(self) -> Recorder:
        """Take note of log-probabilities from the first step on; call it before that."""
        self.recorder = Recorder(len(self._streams), self.options.top_logprobs)
        return self.recorder

    def __iter__(self) -> Iterator[list[str]]:
        streams = self._streams
        note = None if self.recorder is None else self.recorder.note
        for tokens in generate_tokens(self.model, self.sequences, self.options, note):
            yield [
                "" if stream.ended else stream.push(token)
                for stream, token in zip(streams, tokens, strict=True)
            ]
            self.sequences.end(np.array([stream.ended for stream in streams]))
            if all(stream.ended for stream in streams):
                return

    @property
    def seed(self) -> int | None:
        """The seed of the draw, given or drawn; None where decoding is greedy."""
        return self.options.seed if self.options.sampling.do_sample else None

    @property
    def is_done(self) -> bool:
        """Whether every answer has ended, or there is no room for another token."""
        has_room = self.sequences.n_ctx < self.sequences.n_max
        return not has_room or all(stream.ended for stream in self._streams)

    def finish_reasons(self) -> list[str]:
        """Say why each answer ends, "stop" or "length"; call it before `close`."""
        return ["stop" if stream.ended else "length" for stream in self._streams]

    def answers(self) -> tuple[Answer, ...]:
        """Run to the end; return all that is known of each answer."""
        recorder, steps = self.record(), list(self)
        reasons = self.finish_reasons()
        pieces = [*steps, self.close()]
        lengths = self.sequences.n_new_of_each()
        return tuple(
            Answer("".join(text) if self.is_text else None, tuple(tokens[:n]), reason)
            for text, tokens, n, reason in zip(
                zip(*pieces, strict=True), recorder.tokens, lengths, reasons, strict=True
            )
        )

    def output(self, is_single: bool) -> GenerateOutput:
        """Run to the end; return ids, texts, log-probabilities, finish reasons and the seed."""
        answers = self.answers()
        sequences = self.sequences.filled(self.model.generation_config.fill_id)
        texts: Any = [answer.text for answer in answers] if self.is_text else None
        text = texts[0] if is_single else texts
        return GenerateOutput(sequences, answers, self.seed, text)

    def steps(self) -> Iterator[StreamStep]:
        """Run one prompt to the end, token by token, with all that is known of each."""
        recorder = self.record()
        for (piece,) in self:
            token, reason = recorder.tokens[0][-1], None
            if self.is_done:
                (reason,) = self.finish_reasons()
                piece += self.close()[0]
            yield StreamStep(piece, token, reason, self.seed)

    def close(self) -> list[str]:
        """End every answer; return what was held back of its text."""
        return [stream.close() for stream in self._streams]

    def texts(self) -> list[str]:
        """Run to the end; return the text of each answer."""
        steps = list(self)
        return ["".join(pieces) for pieces in zip(*steps, self.close(), strict=True)]

    def ids(self) -> Array:
        """Run to the end; return prompts and answers: int64 [n_batch, n_prompt + n_new]."""
        for _ in self:
            pass
        return self.sequences.filled(self.model.generation_config.fill_id)


def start(
    model: Any,
    prompt: Any,
    attention_mask: Any = None,
    *,
    tools: Any = None,
    **options: Any,
) -> Generation:
    """Check a prompt and options; return the generation that they ask for, not begun yet.

    Parameters
    ----------
    model : Model
    prompt, attention_mask, tools
        As in `read_prompt`.
    **options
        As in `resolve_options`.

    Returns
    -------
    generation : Generation

    Raises
    ------
    NpllmTypeError, NpllmValueError
        Before any work is done.
    """
    resolved = resolve_options(model.generation_config, **options)
    return Generation(model, read_prompt(model, prompt, attention_mask, tools), resolved)


def generate_tokens(
    model: Any,
    sequences: Sequences,
    options: Options = Options(),
    note: Callable[[Array, Array], object] | None = None,
) -> Iterator[Array]:
    """Continue a batch of prompts, token by token.

    Parameters
    ----------
    model : Model
    sequences : Sequences
        Holds the prompts; each new token is appended.
    options : Options
        seed: the same seed draws the same numbers; None draws fresh ones.  use_cache=False computes
        the whole sequence again for every token.  prompt_lookup_num_tokens: tokens are proposed and
        verified several in a pass; each is chosen from its own logits, with its own number.
        cache: what it holds of the beginning of the prompts is not computed again.
    note : function (logits [n_batch, n_vocab], token [n_batch]), optional
        Is told of the model's own logits of each step, and of the token that was chosen.

    Yields
    ------
    token : integer array [n_batch]
        The next token of each row.  The caller says when to stop.
    """
    n_batch, eos = len(sequences.ids), model.generation_config.eos_token_id
    cache = _reused(model, sequences, options.cache) if options.use_cache else None
    seed = secrets.randbits(64) if options.seed is None else options.seed
    sampling = replace(options.sampling, repetition_penalty=None)  # a constraint, applied first
    lookup = PromptLookup(options.prompt_lookup_num_tokens)
    may_queue = note is None and _is_plain_greedy(options)
    while sequences.n_ctx < sequences.n_max:
        if cache is not None and may_queue:
            queued = _queued(model, sequences, cache)
            if queued is not None:
                yield from _one_by_one(queued, sequences, cache)
                continue
        proposed, is_first = _proposed(model, lookup, sequences), sequences.n_new == 0
        n_kept, start, seconds = 0, working_seconds(), 0.0
        try:
            for own_logits in step_logits(model, sequences, proposed, cache):
                seconds = seconds or working_seconds() - start
                logits = constrain(own_logits, sequences, options, eos)
                u = uniforms(seed, n_batch, sequences.n_new) if sampling.do_sample else None
                token = choose(logits, sampling, u=u)
                sequences.append(token)
                if note is not None:
                    note(own_logits, token)
                yield token
                if n_kept == len(proposed) or token[0] != proposed[n_kept]:
                    break
                n_kept += 1
        finally:  # also where the caller stops
            if cache is not None and cache.n_ctx >= sequences.n_ctx:
                cache.crop(sequences.n_ctx - 1)
        if not is_first:
            lookup.learn(len(proposed), n_kept, seconds)


def _is_plain_greedy(options: Options) -> bool:
    """Tell whether each token is the one of the highest logit, and nothing else counts."""
    sampling = options.sampling
    changed = options.logits_processors or options.constraints != Constraints()
    plain = not sampling.do_sample and sampling.repetition_penalty in (None, 1)
    return plain and not changed and not options.prompt_lookup_num_tokens


def _queued(model: Any, sequences: Sequences, cache: KVCache) -> Array | None:
    """The next tokens [n_batch, n], chosen on the device without waiting for the host in between;
    None where the model's set cannot do that.
    """
    n = min(model.ops.n_queued, sequences.n_max - sequences.n_ctx, cache.max_slots - cache.n_ctx)
    if model.ops.decode_step is None or cache.n_ctx != sequences.n_ctx - 1 or n < 1:
        return None
    return model.greedy_ids(sequences.ids[:, -1:], sequences.valid, cache, n)


def _one_by_one(queued: Array, sequences: Sequences, cache: KVCache) -> Iterator[Array]:
    """Append and yield queued tokens; the cache forgets those behind which the caller stops."""
    try:
        for token in queued.T:
            sequences.append(token)
            yield token
    finally:
        if cache.n_ctx >= sequences.n_ctx:
            cache.crop(sequences.n_ctx - 1)


def _reused(model: Any, sequences: Sequences, cache: KVCache | None) -> KVCache:
    """The caller's cache, cut to what it holds of the beginning of the prompts; else a new one.

    The last token of the prompts is left to be computed, since its logits are wanted.
    """
    n_batch, n_prompt = sequences.ids.shape
    if cache is None:
        return model.new_cache(n_batch)
    model.check_cache(cache, n_batch)
    n = min(cache.n_ctx, n_prompt - 1)
    valid = sequences.valid[:, :n]
    same = (cache.ids[:, :n] == sequences.ids[:, :n]) | ~valid
    same &= (cache.valid[:, :n] == valid) & (cache.positions[:, :n] == counted_positions(valid, n))
    differs = np.flatnonzero(~same.all(axis=0))
    n_same = int(differs[0]) if len(differs) else n
    cache.crop(n_same if n_same >= cache.first_crop else 0)
    return cache


def _proposed(model: Any, lookup: PromptLookup, sequences: Sequences) -> Array:
    """What to verify besides the next token: nothing before the first one, nothing beyond the end,
    and nothing that other frequencies of RoPE would rotate.
    """
    if sequences.n_new == 0 or not lookup.n_tokens:
        return sequences.ids[0, :0]
    proposed = lookup.propose(sequences.ids[0], sequences.n_max - sequences.n_ctx - 1)
    n, length = len(proposed), int(np.count_nonzero(sequences.valid))
    choice = frequency_choice(model.config, length)
    while n and frequency_choice(model.config, length + n) != choice:
        n -= 1
    return proposed[:n]


def step_logits(
    model: CausalLM, sequences: Sequences, proposed: Array, cache: KVCache | None
) -> Iterator[Array]:
    """One pass: logits [n_batch, n_vocab] after the sequences, then after each proposed token."""
    new = sequences.ids[:, 0 if cache is None else cache.n_ctx :]
    valid, n = sequences.valid, len(proposed)
    if n:
        new = np.append(new, proposed[None], axis=1)
        valid = np.append(valid, np.ones((1, n), bool), axis=1)
    logits = to_numpy(model.last_logits(new, valid, cache, n_keep=1 + n))
    for i in range(1 + n):
        yield check_scores(logits[:, i], "the model's logits", FROM_MODEL)


def last_logits(
    model: CausalLM, ids: Array, *, attention_mask: Array, cache: KVCache | None = None
) -> Array:
    """Send new tokens through the model; NumPy logits [n_batch, n_vocab] after the last one, of
    which each row is a distribution.

    Parameters
    ----------
    model : CausalLM
    ids : int64 array [n_batch, n_seq]
        NumPy, checked.
    attention_mask : bool array [n_batch, n_ctx]
        NumPy, checked.
    cache : KVCache, optional

    Raises
    ------
    NpllmValueError
        When a row is none: NaN, +inf, or nothing but -inf.
    """
    logits = to_numpy(model.last_logits(ids, attention_mask, cache))[:, -1]
    return check_scores(logits, "the model's logits", FROM_MODEL)


def count_new_tokens(config: Any, prompt: Prompt, max_new_tokens: int | None) -> int:
    """How many tokens may follow a prompt; warns where the context ends before max_new_tokens.

    None: as many as the context holds.
    """
    n_prompt = prompt.ids.shape[1]
    n_left = config.context_length - n_prompt
    if max_new_tokens is None:
        return n_left
    if n_left < max_new_tokens:
        warn(
            f"the context length (max_position_embeddings) is {config.context_length}: after "
            f"{n_prompt} tokens of prompt there is room for {n_left} new tokens, "
            f"not {max_new_tokens}"
        )
    return min(n_left, max_new_tokens)
