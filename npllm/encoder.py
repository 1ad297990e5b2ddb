"""The front of an encoder: texts to vectors."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npllm import ops as _ops
from npllm.arguments import check_flag, check_ids, host_array
from npllm.arrays import asarray, to_numpy
from npllm.checkpoints.sentence_settings import SentenceSettings
from npllm.config.bert_config import BertConfig
from npllm.config.strict_json import quote
from npllm.decoding.prompt import require_tokenizer
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.finite_scores import FROM_MODEL, check_finite
from npllm.model_base import ModelBase
from npllm.models import bert
from npllm.models.bert import BertParams
from npllm.models.sentence import mean_pool
from npllm.models.sentence import normalize as unit_length
from npllm.ops.checked import replaced_ops
from npllm.ops.opset import Ops
from npllm.text.tokenizer import Tokenizer

__all__ = ["Encoder", "cosine_similarities", "mean_pool"]

Array = Any
BATCH_TOKENS = 2048  # that go through the layers at a time, padding included


class Encoder(ModelBase):
    """A bidirectional encoder: a blueprint, its weights, and the operations it runs on.

    Parameters
    ----------
    config : BertConfig
    params : BertParams
    ops : Ops, optional
    tokenizer : Tokenizer, optional
        Is set to truncate at `max_length`.
    max_length : int, optional
        Most tokens of a text, special ones included; what lies beyond is cut off.  Default:
        `max_position_embeddings`.
    folder : Path, optional
        Where it came from.
    settings : SentenceSettings, optional
        Pooling, further modules, and prompts.  Default: the mean over the tokens.
    origin : Origin, optional
        How another process reads the weights again.  Default: it gets the arrays.

    Raises
    ------
    NpllmValueError
        When max_length leaves no room for a token beside the special ones, or exceeds
        `max_position_embeddings`.
    """

    config: BertConfig
    params: BertParams

    def __init__(
        self,
        config: BertConfig,
        params: BertParams,
        *,
        ops: Ops | str | None = None,
        tokenizer: Tokenizer | None = None,
        max_length: int | None = None,
        folder: Path | None = None,
        settings: SentenceSettings | None = None,
        origin: Any = None,
    ):
        self.config, self.params, self.origin = config, params, origin
        self.tokenizer, self.folder = tokenizer, folder
        self.settings = SentenceSettings() if settings is None else settings
        self._set_up(ops)
        most = config.max_position_embeddings
        self.max_length = most if max_length is None else max_length
        if tokenizer is not None:
            n_special = tokenizer.backend.num_special_tokens_to_add(False)
            if not n_special < self.max_length <= most:
                raise NpllmValueError(
                    f"texts must be cut at {n_special + 1} ({n_special} special tokens and one "
                    f"more) ... max_position_embeddings = {most} tokens, got {self.max_length}"
                )
            tokenizer.backend.enable_truncation(self.max_length)

    def __call__(
        self, input_ids: Any, *, attention_mask: Any = None, token_type_ids: Any = None
    ) -> Array:
        """Compute the hidden state of every token, from those on both sides of it.

        Parameters
        ----------
        input_ids : integer array [n_batch, n_seq]
        attention_mask : array [n_batch, n_seq], optional
            1 for a token, 0 for padding, which nothing sees.  Default: no padding.
        token_type_ids : integer array [n_batch, n_seq], optional
            Default: 0, the first segment.

        Returns
        -------
        hidden : array [n_batch, n_seq, d_model]
            float32, or float64 when the weights are; in the library of the weights.

        Raises
        ------
        NpllmTypeError, NpllmValueError
            When ids are no integers or out of range, there are too many, or shapes do not fit.

        Notes
        -----
        Source: "BERT" (Devlin et al. 2018), section 3; `BertModel.forward` in Transformers.
        """
        config = self.config
        ids = check_ids("input_ids", input_ids, config.vocab_size, "vocab_size")
        types = np.zeros_like(ids) if token_type_ids is None else token_type_ids
        types = check_ids("token_type_ids", types, config.type_vocab_size, "type_vocab_size")
        mask = np.ones(ids.shape, dtype=bool) if attention_mask is None else attention_mask
        valid = host_array("attention_mask", mask)
        if types.shape != ids.shape or valid.shape != ids.shape or not np.isin(valid, (0, 1)).all():
            raise NpllmValueError(
                "token_type_ids and attention_mask (of 0 and 1) must be [n_batch, n_seq] = "
                f"{list(ids.shape)}, got {list(types.shape)} and {list(valid.shape)}"
            )
        if ids.shape[1] > config.max_position_embeddings:
            raise NpllmValueError(
                f"{ids.shape[1]} tokens do not fit: max_position_embeddings is "
                f"{config.max_position_embeddings}"
            )
        there = asarray(ids, self._xp), asarray(types, self._xp)
        padding = asarray(valid.astype(bool), self._xp)
        rule = None if valid.all() else _ops.mask.padding(padding)
        return bert.forward(self.params, config, *there, rule, self.ops)

    def with_ops(self, **ops: Callable[..., Any]) -> "Encoder":
        """Return the same encoder with some operations of its set replaced; see
        `npllm.Model.with_ops`.
        """
        return Encoder(
            self.config,
            self.params,
            ops=replaced_ops(self.ops, ops),
            tokenizer=self.tokenizer,
            max_length=self.max_length,
            folder=self.folder,
            settings=self.settings,
            origin=self.origin,
        )

    def embed(
        self,
        texts: Sequence[str],
        *,
        normalize: bool = True,
        prompt: str | None = None,
        prompt_name: str | None = None,
    ) -> Array:
        """Turn each text into one vector, by default the mean over its tokens, the special ones
        included.

            e = modules(pool_t(hidden[t, :]))
            e = e / sqrt(sum_i e_i**2)            where normalize is true

        Parameters
        ----------
        texts : list of str
            Longer ones than `max_length` tokens are cut.
        normalize : bool
            Give all vectors length 1, so that their products are cosines.  False leaves them as the
            folder's modules give them, of which one may be a Normalize.
        prompt : str, optional
            What to write in front of every text; "" for nothing.
        prompt_name : str, optional
            One of `settings.prompts`.  With neither, the folder's default prompt is written, if
            there is one.

        Returns
        -------
        embeddings : array [n_text, d_out]
            NumPy float32, or float64 when the weights are; d_out is d_model, unless the folder's
            modules change it.

        Raises
        ------
        NpllmTypeError
            When `texts` is no list of str.
        NpllmValueError
            When the folder has no tokenizer, or no prompt of that name; for both a prompt and a
            name; when an embedding is not finite.

        Notes
        -----
        Texts of like length go through the layers together; the order of the result is that of
        `texts`.  A text without any token (where the tokenizer adds no special ones) is pooled to
        the vector 0.

        Source: "Sentence-BERT" (Reimers and Gurevych 2019), section 3; `SentenceTransformer.encode`
        in sentence-transformers 6.2.
        """
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise NpllmTypeError(f"texts must be a list of str, got {quote(texts)}")
        is_unit = check_flag("normalize", normalize)
        tokenizer = self.require_tokenizer()
        prompt = self._prompt(prompt, prompt_name)
        rows = [tokenizer.encode(prompt + text) for text in texts]
        return self._embed_rows(rows, self._prompt_length(prompt), is_unit)

    def encode(self, text: str) -> list[int]:
        """Turn a text into the token ids that `embed` gives the layers, the folder's default prompt
        included.

        Raises
        ------
        NpllmTypeError
            When it is no str.
        NpllmValueError
            When it is longer than `max_length`, where `embed` would cut it.
        """
        tokenizer, whole = self.require_tokenizer(), self._prompt(None, None) + text
        ids = tokenizer.encode(whole)
        if len(ids) == self.max_length and tokenizer.backend.encode(whole).overflowing:
            raise NpllmValueError(f"the text has more than {self.max_length} tokens; shorten it")
        return ids

    def embed_ids(self, rows: Sequence[Sequence[int]], *, normalize: bool = True) -> Array:
        """Turn sequences of token ids into one vector each, as `embed` does with texts.

        Parameters
        ----------
        rows : list of list of int
            Special tokens, and a prompt where there is one, included.
        normalize : bool

        Returns
        -------
        embeddings : array [n_text, d_out]

        Raises
        ------
        NpllmTypeError, NpllmValueError
            For ids out of range, and for too many.
        """
        prompt = self._prompt(None, None)
        n_prompt = self._prompt_length(prompt) if prompt else 0
        return self._embed_rows(rows, n_prompt, check_flag("normalize", normalize))

    @property
    def n_out(self) -> int:
        """The width of the vectors."""
        return self._embed_rows([[]], 0, False).shape[1]

    def _embed_rows(self, rows: Sequence[Sequence[int]], n_prompt: int, is_unit: bool) -> Array:
        """Vectors of rows of ids, of which the first n_prompt are a prompt."""
        head = self.settings.head
        dtype = np.float64 if "float64" in str(self.params.word_embeddings.dtype) else np.float32
        empty = np.zeros((1, 1, self.config.hidden_size), dtype)
        embeddings = np.repeat(head(empty, np.zeros((1, 1), bool)), len(rows), axis=0)
        for batch in _batches([len(row) for row in rows]):
            ids, valid = _pad([rows[i] for i in batch], self.config.pad_token_id or 0)
            embeddings[batch] = head(to_numpy(self(ids, attention_mask=valid)), valid, n_prompt)
        check_finite(embeddings, "embeddings", FROM_MODEL)
        return unit_length(embeddings) if is_unit else embeddings

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        """The text of a prompt that is given, or named, or the folder's default."""
        prompts = self.settings.prompts
        if prompt is not None and name is not None:
            raise NpllmValueError(
                f"give a prompt or a prompt_name, not both, got {quote(prompt)} and {quote(name)}"
            )
        if prompt is not None and not isinstance(prompt, str):
            raise NpllmTypeError(f"prompt must be a str, got {quote(prompt)}")
        name = self.settings.default_prompt_name if name is None else name
        if prompt is not None or name is None:
            return prompt or ""
        if name not in prompts:
            raise NpllmValueError(
                f"prompt_name must be one of {', '.join(prompts) or 'none'}, got {quote(name)}"
            )
        return prompts[name]

    def _prompt_length(self, prompt: str) -> int:
        """How many tokens of a text are its prompt: those of the prompt alone, but for the one that
        ends it.
        """
        if not prompt or self.settings.head.include_prompt:
            return 0
        tokenizer = self.require_tokenizer()
        encoding = tokenizer.backend.encode(prompt)
        special = [tokenizer.backend.token_to_id(x) for x in tokenizer.special_tokens.values()]
        is_ended = bool(encoding.ids) and (
            encoding.special_tokens_mask[-1] == 1 or encoding.ids[-1] in special
        )
        return len(encoding.ids) - is_ended

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer; raise where the folder has none."""
        return require_tokenizer(self)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        """Refuse what only a causal language model can do."""
        raise NpllmTypeError(
            f"{self.folder or 'this model'} is an encoder: it sees both sides of every token and "
            "has no next one to predict; use embed, or load a causal language model"
        )

    generate = stream = beam_search = next_token_distribution = _refuse
    model = lm_head = new_cache = with_mask = mask_rule = _refuse
    generation_config = property(_refuse)

    def __repr__(self) -> str:
        name = self.folder.name if self.folder else self.config.model_type
        return f"<npllm.Encoder {name}, {self.ops.name} ops>"


def cosine_similarities(embeddings: Array) -> Array:
    """Compare every vector with every other.

        s[i, j] = sum_k e[i, k] * e[j, k] / (|e[i, :]| * |e[j, :]|)

    Parameters
    ----------
    embeddings : array [n, d_model]

    Returns
    -------
    s : float64 array [n, n]
        0 beside a vector that is 0.

    Raises
    ------
    NpllmValueError
        When an embedding is not finite.
    """
    e = check_finite(embeddings, "embeddings").astype(np.float64)
    e = e / np.maximum(np.linalg.norm(e, axis=1, keepdims=True), 1e-300)
    return e @ e.T


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Cut the rows, the shortest first, into batches of at most BATCH_TOKENS with padding; rows
    without tokens are in none.
    """
    batch: list[int] = []
    for i in np.argsort(lengths, kind="stable").tolist():
        if batch and lengths[i] * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        if lengths[i]:
            batch.append(i)
    if batch:
        yield batch


def _pad(rows: Sequence[Sequence[int]], fill: int) -> tuple[Array, Array]:
    """Ids [n_batch, n_seq] of rows of unequal length, padded on the right, and where they hold
    tokens.
    """
    valid = np.arange(max(map(len, rows))) < np.array([len(row) for row in rows])[:, None]
    ids = np.full(valid.shape, fill)
    ids[valid] = np.concatenate(rows)
    return ids, valid
