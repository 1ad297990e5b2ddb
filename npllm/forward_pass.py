"""The forward pass: from token ids to logits, with or without a cache."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from npllm import ops as _ops
from npllm.arguments import (
    check_attention_mask,
    check_ids,
    check_integer,
    check_positions,
)
from npllm.arrays import DTYPES, asarray, compute_dtype
from npllm.cache import CacheOwner, KVCache
from npllm.cache.files import read_state
from npllm.cache.state import cache_dtype
from npllm.config.config import Config
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.kernels import FEW_ROWS
from npllm.model_base import ModelBase
from npllm.models import heads, phi3
from npllm.models.params import Params
from npllm.models.patch import Patch, value_names
from npllm.models.rope_tables import Rotations
from npllm.models.row_caches import RowCaches, rowwise_attention, transact_all
from npllm.ops.opset import Ops, Step
from npllm.progress import warn

__all__ = ["PREFILL_CHUNK", "CausalLM", "Tokens"]

Array = Any
Tap = Callable[[str, Array], Array]
PREFILL_CHUNK = 512  # see CausalLM.prefill_chunk: where a set of operations says nothing else


class Tokens(NamedTuple):
    """The tokens of one call, checked: ids below n_vocab, a mask and positions that fit them."""

    ids: Array  # int64 [n_batch, n_seq], NumPy
    valid: Array  # bool [n_batch, n_ctx], NumPy: which slots hold tokens, cached ones included
    positions: Array  # integers [n_seq] or [n_batch, n_seq], NumPy

    def part(self, start: int, stop: int, n_past: int) -> "Tokens":
        """Return columns start ... stop - 1 of the new tokens."""
        return Tokens(
            self.ids[:, start:stop],
            self.valid[:, : n_past + stop],
            self.positions[..., start:stop],
        )


class CausalLM(ModelBase):
    """A causal language model without text: a blueprint, its weights, the operations it runs on.

    Parameters
    ----------
    config : Config
    params : Params
    ops : Ops, optional
    mask : Rule or list of Rule, optional
        See `npllm.Model.with_mask`.
    origin : Origin, optional
        How another process reads the weights again.  Default: it gets the arrays.

    Attributes
    ----------
    cache_dtype : str, optional
        What `new_cache` keeps keys and values in: "bfloat16", "float16" or "float32".  None: what
        they are computed in.
    """

    config: Config
    params: Params
    cache_dtype: str | None = None

    def __init__(
        self,
        config: Config,
        params: Params,
        *,
        ops: Ops | str | None = None,
        mask: Any = None,
        origin: Any = None,
    ):
        self.config, self.params, self.mask, self.origin = config, params, mask, origin
        self._set_up(ops)

    def _set_up(self, ops: Ops | str | None) -> None:
        super()._set_up(ops)
        self._rotations = Rotations(self.config, compute_dtype(self.params.embed_tokens), self._xp)
        self._rules = self._rule_of_each_layer()

    def __call__(
        self,
        input_ids: Any,
        *,
        attention_mask: Any = None,
        position_ids: Any = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
        tap: Tap | None = None,
    ) -> Array:
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
        n_keep = check_integer("logits_to_keep", logits_to_keep, 0, 2**63)

        def call(draft: KVCache | None) -> Array:
            tokens = self.check_tokens(input_ids, attention_mask, position_ids, draft)
            logits = self._decode_step(tokens, draft, n_keep) if tap is None else None
            if logits is not None:
                return logits
            hidden = self._hidden(tokens, draft, tap)
            if self.config.head == "sequence":
                return self._classify_sequences(hidden, tokens, attention_mask is not None)
            return self._head(hidden, n_keep, tap)

        return self._transact(cache, call)

    def run(
        self,
        input_ids: Any,
        *,
        patch: Mapping[str, Any],
        attention_mask: Any = None,
        position_ids: Any = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
        tap: Tap | None = None,
    ) -> Array:
        """Score every possible next token while some values are replaced.

        Parameters
        ----------
        input_ids : integer array [n_batch, n_seq]
        patch : mapping of str to function or array
            By the names of `npllm.models.taps`.  A function gets the value, which it must not
            change in place, and returns what the model goes on with; an array takes the value's
            place.  Shape and dtype stay.
        attention_mask, position_ids, cache, logits_to_keep
            As in `__call__`.
        tap : function (name, array) -> array, optional
            As in `__call__`; sees every value after its patch.

        Returns
        -------
        logits : array [n_batch, n_seq, n_vocab]
            As `__call__` returns them.

        Raises
        ------
        NpllmTypeError, NpllmValueError
            As `__call__`; for a name that the run does not have, a patch that never fired, and one
            that returns another library, dtype or shape.

        Notes
        -----
        Source: "Locating and Editing Factual Associations in GPT" (Meng et al. 2022), section 2.1.
        """
        names = value_names(self.config, cached=cache is not None)
        return self(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            logits_to_keep=logits_to_keep,
            tap=Patch(patch, names, self._xp, tap),
        )

    def model(
        self,
        input_ids: Any,
        *,
        attention_mask: Any = None,
        position_ids: Any = None,
        cache: KVCache | None = None,
        tap: Tap | None = None,
    ) -> Array:
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

        def call(draft: KVCache | None) -> Array:
            tokens = self.check_tokens(input_ids, attention_mask, position_ids, draft)
            return self._hidden(tokens, draft, tap)

        return self._transact(cache, call)

    def lm_head(self, hidden: Array, *, tap: Tap | None = None) -> Array:
        """Score every token of the vocabulary for any hidden states [..., d_model]; returns logits
        [..., n_vocab].

        `tap` sees `lm_head.input` and `lm_head`, as in `__call__`.

        Warns
        -----
        UserWarning
            When `hidden` is `hidden[0]` of one text: the batch axis is lost, and with it the place
            of the axes in the result.
        """
        if self.config.head != "lm":
            raise NpllmValueError(
                f"{self.config.architectures[0]} has no lm_head: "
                f"it scores {self.config.num_labels} classes"
            )
        _warn_of_lost_batch_axis(hidden)
        return phi3.lm_head(hidden, self.params, self.ops, tap)

    def last_logits(
        self, ids: Array, valid: Array, cache: KVCache | None = None, *, n_keep: int = 1
    ) -> Array:
        """Score the tokens after the last of ids that were checked before: what a decoding loop
        calls.

        Parameters
        ----------
        ids : int64 array [n_batch, n_seq]
            NumPy, each in 0 ... n_vocab - 1; with a cache the new ones only.
        valid : bool array [n_batch, n_ctx]
            NumPy; which slots hold tokens, cached ones included.
        cache : KVCache, optional
        n_keep : int
            After how many of the last ids; at most n_seq.

        Returns
        -------
        logits : array [n_batch, n_keep, n_vocab]
            In the library of the weights.
        """

        def call(draft: KVCache | None) -> Array:
            tokens = Tokens(ids, valid, counted_positions(valid, ids.shape[1]))
            logits = self._decode_step(tokens, draft, n_keep)
            return (
                self._head(self._hidden(tokens, draft, None), n_keep, None)
                if logits is None
                else logits
            )

        return self._transact(cache, call)

    def logits_of_rows(self, ids: Array, caches: Sequence[KVCache]) -> Array:
        """Score the tokens after one new token of each row, where each row has a cache of its own.

        Parameters
        ----------
        ids : int64 array [n_batch]
            NumPy, each in 0 ... n_vocab - 1.
        caches : sequence of KVCache
            Each of one sequence without padding; is appended to.

        Returns
        -------
        logits : array [n_batch, n_vocab]
            In the library of the weights.

        Notes
        -----
        On the compiled set each row has the bits that `last_logits` gives it alone, for at most 16
        rows.  Keys are not copied, whatever the lengths of the rows.

        Source: "Orca" (Yu et al. 2022), section 4.2: selective batching.
        """

        def call(drafts: list[KVCache]) -> Array:
            return self._head(self._hidden_of_rows(ids, drafts), 1, None)[:, 0]

        if len(caches) == 1 or self.ops.replaced & {"attention_block", "decoder_layers"}:
            valid = [np.ones((1, cache.n_ctx + 1), bool) for cache in caches]
            rows = zip(ids.reshape(-1, 1, 1), valid, caches, strict=True)
            return self._xp.concat([self.last_logits(*row)[:, 0] for row in rows], axis=0)
        return transact_all(caches, call, self._cache_owner())

    def _hidden_of_rows(self, ids: Array, drafts: list[KVCache]) -> Array:
        """Send one token of each row through all layers: [n_batch, 1, d_model]."""
        positions = np.array([[draft.n_ctx] for draft in drafts])
        rows = list(zip(drafts, positions[:, None], strict=True))
        variants = [self._rotations.variants(position, 1, draft) for draft, position in rows]
        for draft, variant in zip(drafts, variants, strict=True):
            draft.check_fits(1, 1)
            self._recompute_rows(draft, variant)
        cos, sin = self._rotations.tables(self.ops, positions, np.concatenate(variants))
        hidden = phi3.forward(
            self.params,
            self.config,
            asarray(ids[:, None], self._xp),
            cos,
            sin,
            self._rules,
            rowwise_attention(self.ops),
            RowCaches(drafts, {}),
        )
        for token, (draft, position), variant in zip(ids, rows, variants, strict=True):
            seen = np.ones((1, draft.n_ctx + 1), bool)
            draft.advance(np.array([[token]]), position, seen, variant)
        return hidden

    def new_cache(self, n_batch: int = 1, *, dtype: str | None = None) -> KVCache:
        """Make an empty KV cache for n_batch sequences; `model(ids, cache=cache)` appends to it.

        Parameters
        ----------
        n_batch : int
        dtype : str, optional
            What keys and values are kept in: "bfloat16" or "float16", to which they are rounded
            once, or "float32".  Default: what `npllm.load` was told as `cache_dtype`, else what
            they are computed in.

        Raises
        ------
        NpllmValueError
            For another dtype, and for any where the model computes in float64.
        """
        owner = self._cache_owner()
        kept = cache_dtype(self.cache_dtype if dtype is None else dtype, self._computed())
        return KVCache(
            n_batch,
            self.config.num_hidden_layers,
            self.config.context_length,
            owner.window,
            owner=owner,
            dtype=kept,
        )

    def _computed(self) -> Any:
        """The dtype of new keys and values, in NumPy."""
        is_wide = compute_dtype(self.params.norm) == self._xp.float64
        return DTYPES["float64" if is_wide else "float32"]

    def load_cache(self, path: Any) -> KVCache:
        """Read a cache that `KVCache.save` wrote, of the same weights, config and mask.

        Parameters
        ----------
        path : str or Path

        Returns
        -------
        cache : KVCache
            As `new_cache` makes one, filled.

        Raises
        ------
        NpllmOSError
            When the file cannot be read, is no safetensors file, or was damaged.
        NpllmValueError
            When it is no saved cache, or one of other weights, another config or another mask.
        """
        owner = self._cache_owner()
        is_wide = self._computed() == DTYPES["float64"]
        state = read_state(path, owner, ("F64",) if is_wide else ("F32", "F16", "BF16"))
        layers = [
            layer and (self.to_backend(layer[0]), self.to_backend(layer[1]), layer[2])
            for layer in state.layers
        ]
        held = [layer[0].dtype.name for layer in state.layers if layer and not is_wide]
        cache = self.new_cache(len(state.ids), dtype=held[0] if held else None)
        return cache.load_state(state._replace(layers=layers))

    def check_cache(self, cache: KVCache, n_batch: int) -> None:
        """Raise unless a cache is of this model and of so many sequences."""
        self._cache_owner().require(cache)
        cache.check_fits(n_batch, 0)

    def mask_rule(self, layer: int = 0) -> _ops.mask.Rule:
        """Return the rule of a layer: that of `with_mask`, else causal within the checkpoint's
        sliding window.
        """
        return self._rules[layer]

    def to_backend(self, x: Array) -> Array:
        """Move a NumPy array to the library that the weights live in."""
        return asarray(x, self._xp)

    def _rule_of_each_layer(self) -> list[_ops.mask.Rule]:
        if isinstance(self.mask, list | tuple):
            return list(self.mask)
        window = self.config.sliding_window
        own = _ops.mask.causal() if window is None else _ops.mask.sliding_window(window)
        return [own if self.mask is None else self.mask] * self.config.num_hidden_layers

    def _transact(self, cache: KVCache | None, call: Callable[[KVCache | None], Array]) -> Array:
        """Run a forward pass: every one goes through here, so that a cache takes it over wholly or
        not at all.
        """
        if cache is None:
            return call(None)
        if not isinstance(cache, KVCache):
            raise NpllmTypeError(
                "cache must be a KVCache, as model.new_cache() makes one, "
                f"got {type(cache).__name__}"
            )
        return cache.transact(call, self._cache_owner())

    def _cache_owner(self) -> CacheOwner:
        """What cached keys and values depend on besides the tokens."""
        mask = None if self.mask is None else tuple(self._rules)
        return CacheOwner(self.params, self.config, mask)

    def check_tokens(
        self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: KVCache | None
    ) -> Tokens:
        """Check the arguments of a call, as in `__call__`; ids of a caller are checked here only.

        Returns
        -------
        tokens : Tokens
            With the mask and the positions that the call would use.
        """
        ids = check_ids("input_ids", input_ids, self.config.vocab_size, "vocab_size")
        n_batch, n_seq = ids.shape
        if cache is not None:
            cache.check_fits(n_batch, n_seq)
        elif n_seq > self.config.context_length:
            raise NpllmValueError(
                f"{n_seq} tokens do not fit: the context length (max_position_embeddings) is "
                f"{self.config.context_length}"
            )
        past = np.ones((n_batch, 0), dtype=bool) if cache is None else cache.valid
        valid = check_attention_mask(attention_mask, n_seq, past)
        if position_ids is None:
            return Tokens(ids, valid, counted_positions(valid, n_seq))
        return Tokens(ids, valid, check_positions(position_ids, n_batch, n_seq))

    def greedy_ids(self, ids: Array, valid: Array, cache: KVCache, n: int) -> Array | None:
        """Choose the n most likely tokens, one after another, where the set does so on the device.

        Parameters
        ----------
        ids : int64 array [n_batch, 1]
            As in `last_logits`.
        valid : bool array [n_batch, n_ctx]
        cache : KVCache
            Takes the new ids and all chosen ones but the last.
        n : int

        Returns
        -------
        chosen : int64 array [n_batch, n]
            NumPy; None, and an unchanged cache, where the set has no such step for this call, a row
            changes its RoPE frequencies on the way, or logits are no distribution.
        """

        def call(draft: KVCache) -> Array | None:
            tokens = Tokens(ids, valid, counted_positions(valid, ids.shape[1]))
            positions = np.broadcast_to(tokens.positions, ids.shape) + np.arange(n)
            variants = self._rotations.variants(positions[:, :1], len(ids), draft)
            if (self._rotations.variants(positions, len(ids), draft) != variants).any():
                return None
            chosen = self._run_step(tokens, variants, draft, n)
            if chosen is None or (chosen < 0).any():
                return None
            taken = np.append(ids, chosen[:, :-1], axis=1)
            added = np.ones((len(ids), n - 1), bool)
            draft.advance(taken, positions, np.append(valid, added, axis=1), variants)
            return chosen

        return cache.transact(call, self._cache_owner())

    def _decode_step(self, tokens: Tokens, cache: KVCache | None, n_keep: int) -> Array | None:
        """Logits [n_batch, n_keep, n_vocab] after the last n_keep of a few new tokens (0: all), by
        the set's kernel for a whole step; None where it has none for this call.
        """
        n_batch, n_seq = tokens.ids.shape
        if self.ops.decode_step is None or cache is None or not 0 < n_seq <= FEW_ROWS:
            return None
        variants = self._rotations.variants(tokens.positions, n_batch, cache)
        logits = self._run_step(tokens, variants, cache, n_keep=min(n_keep or n_seq, n_seq))
        if logits is not None:
            cache.advance(tokens.ids, tokens.positions, tokens.valid, variants)
        return logits

    def _run_step(
        self, tokens: Tokens, variants: Array, cache: KVCache, n_greedy: int = 0, n_keep: int = 1
    ) -> Array | None:
        """What the set's kernel for a whole step gives; None where it has none for this call."""
        run = self.ops.decode_step
        if run is None or self.config.head != "lm":
            return None
        self._recompute_rows(cache, variants)
        tables = partial(self._rotations.tables, self.ops)
        found = run(tokens, variants, self.params, self._step(cache), tables, n_greedy, n_keep)
        return None if found is NotImplemented else found

    def _step(self, cache: KVCache) -> Step:
        """What a kernel for a whole step is told besides tokens and weights."""
        config = self.config
        n_head, n_kv_head = config.num_attention_heads, config.num_key_value_heads
        return Step(None, None, n_head, n_kv_head, config.rms_norm_eps, self._rules, cache)

    @property
    def prefill_chunk(self) -> int:
        """Tokens that go through the layers at a time where a cache keeps the results."""
        return self.ops.prefill_chunk or PREFILL_CHUNK

    def _hidden(self, tokens: Tokens, cache: KVCache | None, tap: Tap | None) -> Array:
        """Send tokens through the layers, in chunks where a cache keeps what was computed."""
        variant = self._rotations.variants(tokens.positions, len(tokens.ids), cache)
        if cache is None:
            return self._run(tokens, variant, None, tap)
        self._recompute_rows(cache, variant)
        n_past, n_seq = cache.n_ctx, tokens.ids.shape[1]
        cache.expect(n_seq)
        size = self.prefill_chunk if tap is None else n_seq
        starts = range(0, n_seq, size)
        chunks = [tokens.part(start, min(start + size, n_seq), n_past) for start in starts]
        parts = [self._run(chunk, variant, cache, tap) for chunk in chunks]
        return parts[0] if len(parts) == 1 else self._xp.concat(parts, axis=1)

    def _run(self, tokens: Tokens, variant: Array, cache: KVCache | None, tap: Tap | None) -> Array:
        """Send tokens through all layers at once."""
        ids, valid, positions = tokens
        cos, sin = self._rotations.tables(self.ops, positions, variant)
        rules = self._rules if valid.all() else self._rules_with_padding(valid)
        ids_there = asarray(ids, self._xp)
        hidden = phi3.forward(
            self.params, self.config, ids_there, cos, sin, rules, self.ops, cache, tap
        )
        if cache is not None:
            cache.advance(ids, positions, valid, variant)
        return hidden

    def _head(self, hidden: Array, n_keep: int, tap: Tap | None) -> Array:
        """Turn the last n_keep hidden states of each row (0: all) into logits."""
        kept = hidden[:, -n_keep:, :]
        if self.config.head == "token":
            return heads.classify_tokens(kept, self.params, self.ops)
        return phi3.lm_head(kept, self.params, self.ops, tap)

    def _classify_sequences(self, hidden: Array, tokens: Tokens, is_masked: bool) -> Array:
        """Score the classes of each row at its last token that is no padding; at the first one of a
        row of padding only, as in Transformers.
        """
        n_seq, pad = tokens.ids.shape[1], self.config.pad_token_id
        valid = tokens.valid[:, -n_seq:]
        if not is_masked and pad is not None:
            valid = tokens.ids != pad
        last = (np.arange(n_seq) * valid).argmax(axis=1)
        return heads.classify_sequence(hidden, asarray(last, self._xp), self.params, self.ops)

    def _rules_with_padding(self, valid: Array) -> Sequence[_ops.mask.Rule]:
        """The rules of all layers, padding excluded; layers that share a rule go on sharing one.

        Padding on the left, which a kernel can evaluate, is given by the first slot of each row.
        """
        n_ctx = valid.shape[1]
        start = np.where(valid.any(axis=1), valid.argmax(axis=1), n_ctx)
        if (valid == (np.arange(n_ctx) >= start[:, None])).all():
            padding = _ops.mask.left_padding(asarray(start, self._xp))
        else:
            padding = _ops.mask.padding(asarray(valid, self._xp))
        both = {id(rule): rule & padding for rule in self._rules}
        return [both[id(rule)] for rule in self._rules]

    def _recompute_rows(self, cache: KVCache, variant: Array) -> None:
        """Compute cached rows anew whose frequencies change: to rotate their keys again would not
        be enough.
        """
        changed = cache.rope_variant != variant
        if cache.n_ctx == 0 or not changed.any():
            return
        rows = np.flatnonzero(changed)
        cached = Tokens(cache.ids[rows], cache.valid[rows], cache.positions[rows])
        fresh = self.new_cache(len(rows), dtype=cache.dtype and cache.dtype.name)
        fresh.expect(cache.n_ctx)
        for start in range(0, cache.n_ctx, self.prefill_chunk):
            chunk = cached.part(start, min(start + self.prefill_chunk, cache.n_ctx), 0)
            self._run(chunk, variant[rows], fresh, None)
        cache.replace_rows(rows.tolist(), fresh)


def counted_positions(valid: Array, n_seq: int) -> Array:
    """Positions of the last n_seq slots: each row's count of tokens so far."""
    if n_seq == 0:
        return np.zeros((len(valid), 0), dtype=np.int64)
    if valid.all():
        return np.arange(valid.shape[1] - n_seq, valid.shape[1])
    return np.maximum(np.cumsum(valid, axis=1) - 1, 0)[:, -n_seq:]


def _warn_of_lost_batch_axis(hidden: Array) -> None:
    """Warn where hidden states are the first row of a batch of one, as a reader of code for
    Transformers takes it: there `model.model(ids)` is a tuple.
    """
    whole: tuple[int, ...] = getattr(getattr(hidden, "base", None), "shape", ())
    if len(whole) == 3 and whole[0] == 1 and whole[1] > 1 and whole[1:] == tuple(hidden.shape):
        warn(
            f"lm_head got [n_seq, d_model] = {list(whole[1:])}, without the batch axis: its result "
            "has none either, so that [-1], not [0, -1], is the last position. "
            "model.model(ids) returns the array itself, no tuple: leave out its [0]"
        )
