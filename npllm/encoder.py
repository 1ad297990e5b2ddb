"""The front of an encoder: texts to vectors."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import normalizers

from npllm import ops as _ops
from npllm.arguments import host_array, host_integers, native_weights
from npllm.arrays import array_namespace, asarray, backend_name, is_integer, to_numpy
from npllm.checkpoints import bert_layout
from npllm.checkpoints.sentence_settings import (
    SentenceSettings,
    read_sentence_settings,
    token_count,
)
from npllm.config.bert_config import BertConfig
from npllm.config.regular_file import is_present
from npllm.config.strict_json import quote, read_json
from npllm.decision import FROM_MODEL, check_finite
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.kernels import choose_ops
from npllm.models import bert
from npllm.models.sentence import mean_pool
from npllm.models.sentence import normalize as unit_length
from npllm.ops.checked import replaced_ops
from npllm.text.tokenizer import Tokenizer

__all__ = ["Encoder", "cosine_similarities", "load_encoder", "mean_pool"]

BATCH_TOKENS = 2048  # that go through the layers at a time, padding included


def load_encoder(folder, *, dtype=None, ops=None, xp=np, mmap=True):
    """Load an encoder from a checkpoint folder of model_type "bert".

    Parameters
    ----------
    folder : str or Path
        config.json and model.safetensors; tokenizer.json where texts are to be embedded.
    dtype, ops, mmap
        As in `npllm.load`.
    xp : module
        The array library to put the weights into.

    Returns
    -------
    encoder : Encoder

    Raises
    ------
    NpllmOSError
        When a file is missing or unreadable.
    NpllmValueError
        When its content is contradictory or not implemented, such as a module of modules.json.

    Notes
    -----
    A text is cut to the first of these that the folder states, and never longer than
    `max_position_embeddings`: max_seq_length of sentence_bert_config.json, model_max_length of
    tokenizer_config.json, and, which sentence-transformers does not read in its own folders, the
    truncation of tokenizer.json.

    Source: `SentenceTransformer` in the library sentence-transformers, whose files these are.
    """
    folder = Path(folder)
    config = BertConfig.from_json(folder)
    settings = read_sentence_settings(folder, config.hidden_size, dtype, mmap)
    params = bert_layout.load_params(
        folder, config, dtype=dtype, xp=xp, is_pooled=settings.is_stated, mmap=mmap
    )
    has_tokenizer = is_present(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_folder(folder) if has_tokenizer else None
    if tokenizer is not None and settings.do_lower_case:
        _lower_case(tokenizer.backend)
    max_length = _max_length(folder, config, settings) if has_tokenizer else None
    return Encoder(
        config,
        params,
        ops=ops,
        tokenizer=tokenizer,
        max_length=max_length,
        folder=folder,
        settings=settings,
    )


class Encoder:
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

    Raises
    ------
    NpllmValueError
        When max_length leaves no room for a token beside the special ones, or exceeds
        `max_position_embeddings`.
    """

    def __init__(
        self,
        config,
        params,
        *,
        ops=None,
        tokenizer=None,
        max_length=None,
        folder=None,
        settings=None,
    ):
        self.settings = SentenceSettings() if settings is None else settings
        self.config, self.params, self.tokenizer, self.folder = (
            config,
            native_weights(params),
            tokenizer,
            folder,
        )
        self._xp = array_namespace(self.params.word_embeddings)
        self.ops = choose_ops(ops, backend_name(self._xp))
        self.max_length = config.max_position_embeddings if max_length is None else max_length
        if tokenizer is not None:
            n_special = tokenizer.backend.num_special_tokens_to_add(False)
            if not n_special < self.max_length <= config.max_position_embeddings:
                raise NpllmValueError(
                    f"texts must be cut at {n_special + 1} ({n_special} special tokens and one more) ... "
                    f"max_position_embeddings = {config.max_position_embeddings} tokens, got {self.max_length}"
                )
            tokenizer.backend.enable_truncation(self.max_length)

    def __call__(self, input_ids, *, attention_mask=None, token_type_ids=None):
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
        ids = _check_ids("input_ids", input_ids, config.vocab_size, "vocab_size")
        types = np.zeros_like(ids) if token_type_ids is None else token_type_ids
        types = _check_ids("token_type_ids", types, config.type_vocab_size, "type_vocab_size")
        valid = (
            np.ones(ids.shape, dtype=bool)
            if attention_mask is None
            else host_array("attention_mask", attention_mask)
        )
        if types.shape != ids.shape or valid.shape != ids.shape or not np.isin(valid, (0, 1)).all():
            raise NpllmValueError(
                f"token_type_ids and attention_mask (of 0 and 1) must be [n_batch, n_seq] = {list(ids.shape)}, "
                f"got {list(types.shape)} and {list(valid.shape)}"
            )
        if ids.shape[1] > config.max_position_embeddings:
            raise NpllmValueError(
                f"{ids.shape[1]} tokens do not fit: max_position_embeddings is {config.max_position_embeddings}"
            )
        mask = None if valid.all() else _ops.mask.padding(asarray(valid.astype(bool), self._xp))
        return bert.forward(
            self.params, config, asarray(ids, self._xp), asarray(types, self._xp), mask, self.ops
        )

    def with_ops(self, **ops: Callable) -> "Encoder":
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
        )

    def embed(self, texts, *, normalize=True, prompt=None, prompt_name=None):
        """Turn each text into one vector, by default the mean over its tokens, the special ones
        included.

            e = modules(pool_t(hidden[t, :])),   divided by sqrt(sum_i e_i**2) where normalize is true

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
        tokenizer, head = self.require_tokenizer(), self.settings.head
        prompt = self._prompt(prompt, prompt_name)
        rows, n_prompt = (
            [tokenizer.encode(prompt + text) for text in texts],
            self._prompt_length(prompt),
        )
        dtype = np.float64 if "float64" in str(self.params.word_embeddings.dtype) else np.float32
        d_model = self.config.hidden_size
        empty = np.zeros((1, 1, d_model), dtype)
        embeddings = np.repeat(head(empty, np.zeros((1, 1), bool)), len(rows), axis=0)
        for batch in _batches([len(row) for row in rows]):
            ids, valid = _pad([rows[i] for i in batch], self.config.pad_token_id or 0)
            embeddings[batch] = head(to_numpy(self(ids, attention_mask=valid)), valid, n_prompt)
        check_finite(embeddings, "embeddings", FROM_MODEL)
        return unit_length(embeddings) if normalize else embeddings

    def _prompt(self, prompt, name):
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

    def _prompt_length(self, prompt):
        """How many tokens of a text are its prompt: those of the prompt alone, but for the one that
        ends it.
        """
        if not prompt or self.settings.head.include_prompt:
            return 0
        encoding = self.tokenizer.backend.encode(prompt)
        special = [
            self.tokenizer.backend.token_to_id(text)
            for text in self.tokenizer.special_tokens.values()
        ]
        is_ended = bool(encoding.ids) and (
            encoding.special_tokens_mask[-1] == 1 or encoding.ids[-1] in special
        )
        return len(encoding.ids) - is_ended

    def require_tokenizer(self):
        """Return the tokenizer; raise where the folder has none."""
        if self.tokenizer is None:
            raise NpllmValueError(
                f"{self.folder or 'this encoder'}: has no tokenizer.json, so it takes token ids only, not text"
            )
        return self.tokenizer

    def _refuse(self, *_, **__):
        """Refuse what only a causal language model can do."""
        raise NpllmTypeError(
            f"{self!r} is an encoder: it sees both sides of every token and has no next one to predict; use "
            "embed, or load a causal language model"
        )

    generate = stream = beam_search = next_token_distribution = model = lm_head = new_cache = (
        with_mask
    ) = mask_rule = _refuse
    generation_config = property(_refuse)

    def __repr__(self):
        return f"<npllm.Encoder {self.folder.name if self.folder else self.config.model_type}, {self.ops.name} ops>"


def cosine_similarities(embeddings):
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


def _batches(lengths):
    """Cut the rows, the shortest first, into batches of at most BATCH_TOKENS with padding; rows
    without tokens are in none.
    """
    batch = []
    for i in np.argsort(lengths, kind="stable").tolist():
        if batch and lengths[i] * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        if lengths[i]:
            batch.append(i)
    if batch:
        yield batch


def _pad(rows, fill):
    """Ids [n_batch, n_seq] of rows of unequal length, padded on the right, and where they hold
    tokens.
    """
    valid = np.arange(max(map(len, rows))) < np.array([len(row) for row in rows])[:, None]
    ids = np.full(valid.shape, fill)
    ids[valid] = np.concatenate(rows)
    return ids, valid


def _check_ids(name, x, size, size_name):
    """Return ids as a NumPy array; raise unless they are integers [n_batch, n_seq] below a size."""
    ids = host_integers(name, x)
    if not is_integer(ids) or ids.ndim != 2 or 0 in ids.shape:
        raise NpllmTypeError(
            f"{name} must be integers [n_batch, n_seq], both at least 1, got {ids.dtype} {list(ids.shape)}"
        )
    if ids.min() < 0 or ids.max() >= size:
        raise NpllmValueError(
            f"{name} must lie in 0 ... {size_name} - 1 = {size - 1}, got {ids.min()} ... {ids.max()}"
        )
    return ids


def _max_length(folder, config, settings):
    """At how many tokens the folder cuts a text."""
    length, places = settings.max_length, [("tokenizer_config.json", ("model_max_length",))]
    if not settings.is_stated:
        places.append(("tokenizer.json", ("truncation", "max_length")))
    for file, keys in places:
        value = read_json(folder / file) if length is None and is_present(folder / file) else None
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            length = token_count(folder / file, ".".join(keys), value)
    return (
        config.max_position_embeddings
        if length is None
        else min(length, config.max_position_embeddings)
    )


def _lower_case(backend):
    """Let a tokenizer begin with writing a text in lower case, unless it does so already by itself."""
    steps = backend.normalizer
    known = (
        [*steps] if isinstance(steps, normalizers.Sequence) else [] if steps is None else [steps]
    )
    if not any(isinstance(step, normalizers.Lowercase) for step in known):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *known])
