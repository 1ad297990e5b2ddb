"""A row of the batch: a running job, its cache, and what is still to be read of its prompt."""

from dataclasses import replace
from typing import Any

import numpy as np

from npllm.arrays import to_numpy
from npllm.cache import KVCache
from npllm.continuous_batching.job import Event, Job
from npllm.decoding.constraints import constrain
from npllm.decoding.details import Recorder, Token
from npllm.decoding.prefill import n_read_together, pieces
from npllm.decoding.sampler_chain import choose, uniforms
from npllm.decoding.sequences import Sequences
from npllm.finite_scores import FROM_MODEL, check_scores
from npllm.models.rope import frequency_choice
from npllm.text.stream import TextStream

__all__ = ["Row"]

Array = Any
ROWS = 32  # positions whose log-probabilities are in memory at a time


class Row:
    """The answer to one job, as it comes.

    Parameters
    ----------
    model : Model
    job : Job

    Attributes
    ----------
    cache : KVCache
    n_kept : int
        How many tokens of the prompt another request may take from the cache.
    is_done : bool
    """

    def __init__(self, model: Any, job: Job):
        self.model, self.job, self.is_done = model, job, False
        ids = np.array([job.ids], np.int64)
        n_new = job.options.max_new_tokens or 0
        self.sequences = Sequences(ids, np.ones(ids.shape, bool), model.config.vocab_size, n_new)
        self._eos = model.generation_config.eos_token_id
        self._stream = TextStream(model.tokenizer, self._eos, job.options.stop)
        self._recorder = Recorder(1, job.options.top_logprobs) if job.logprobs else None
        self._sampling = replace(job.options.sampling, repetition_penalty=None)
        self._echoed: list[Token] = []
        self.n_reused = self.n_kept = 0
        self.begin(model.new_cache())

    def begin(self, cache: KVCache, n_reused: int = 0) -> None:
        """Take over a cache that holds the first n_reused tokens of the prompt."""
        n = len(self.job.ids)
        self.cache, self.n_reused = cache, n_reused
        config = self.model.config
        self._one_go = frequency_choice(config, n) != frequency_choice(config, 1)
        self._pieces = [(0, n)] if self._one_go else pieces(n_reused, n)

    @property
    def can_reuse(self) -> bool:
        """Whether keys of an earlier prompt serve: nothing is read yet, RoPE frequencies do not
        change within the prompt, and no hidden state of it is wanted.
        """
        n = len(self.job.ids)
        return self._pieces == pieces(0, n) and not self._one_go and not self.job.echo

    @property
    def is_read(self) -> bool:
        """Whether the whole prompt was read."""
        return not self._pieces

    def read_piece(self) -> Event | None:
        """Read the next piece of the prompt; after the last one, choose the first token."""
        start, stop = self._pieces[0]
        ids = self.sequences.ids[:, start:stop]
        if self.job.echo:
            logits = self._echo(ids, start)
        else:
            logits = to_numpy(self.model.last_logits(ids, np.ones((1, stop), bool), self.cache))
        self._pieces = self._pieces[1:]
        if self._pieces:
            return None
        self.n_kept = n_read_together(stop)
        if self.sequences.n_max == self.sequences.n_ctx:
            return self._event("", True)
        return self.take(logits[:, -1])

    def take(self, own_logits: Array) -> Event:
        """Choose the next token by logits [1, n_vocab], as a decoding loop of this row alone does.

        Raises
        ------
        NpllmError
            When the logits are no distribution.
        """
        check_scores(own_logits, "the model's logits", FROM_MODEL)
        logits = constrain(own_logits, self.sequences, self.job.options, self._eos)
        token = choose(logits, self._sampling, u=self._uniform())
        self.sequences.append(token)
        if self._recorder is not None:
            self._recorder.note(own_logits, token)
        text = self._stream.push(token[0])
        is_full = self.sequences.n_ctx == self.sequences.n_max
        return self._event(text, self._stream.ended or is_full)

    @property
    def last_token(self) -> int:
        """The token that is to be read next."""
        return int(self.sequences.ids[0, -1])

    def _uniform(self) -> Array | None:
        """The number that row `draw` of a batch draws at this step."""
        if not self._sampling.do_sample:
            return None
        seed, draw = self.job.options.seed or 0, self.job.draw
        return uniforms(seed, draw + 1, self.sequences.n_new)[draw:]

    def _event(self, text: str, is_done: bool) -> Event:
        """What the client is told after a token."""
        reason = None
        if is_done:
            self.is_done, reason = True, "stop" if self._stream.ended else "length"
            text += self._stream.close()
        echoed, self._echoed = tuple(self._echoed), []
        return Event(text, self._newest(), echoed, self.n_reused, reason)

    def _newest(self) -> tuple[Token, ...]:
        """The token that was chosen last; none after a prompt that is only scored."""
        if self.sequences.n_new == 0:
            return ()
        if self._recorder is None:
            return (Token(self.last_token, float("nan"), ()),)
        return (self._recorder.tokens[0][-1],)

    def _echo(self, ids: Array, start: int) -> Array:
        """Read a piece and note the log-probability of each token after it; last logits."""
        hidden = self.model.model(ids, cache=self.cache)
        targets = self.sequences.ids[0, start + 1 : start + 1 + ids.shape[1]]
        for at in range(0, len(targets), ROWS):
            wanted = targets[at : at + ROWS]
            logits = to_numpy(self.model.lm_head(hidden[:, at : at + len(wanted)]))[0]
            check_scores(logits, "the model's logits", FROM_MODEL)
            recorder = Recorder(len(wanted), self.job.options.top_logprobs)
            recorder.note(logits, wanted)
            self._echoed += [tokens[0] for tokens in recorder.tokens]
        return to_numpy(self.model.lm_head(hidden[:, -1:]))
