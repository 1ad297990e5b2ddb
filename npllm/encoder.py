"""Encoders: a BERT folder as a function from texts to vectors."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from npllm import ops as _ops
from npllm.arrays import array_namespace, asarray, is_integer, to_numpy
from npllm.checkpoint import load_tensors
from npllm.config import JsonReader, read_json
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.models import bert
from npllm.tokenizer import Tokenizer

__all__ = ["BertConfig", "Encoder", "load_encoder"]

BATCH = 32  # texts that are computed at a time

# Keys of a BERT config.json that change nothing at inference.
KEYS_WITHOUT_EFFECT = frozenset("""
    attention_probs_dropout_prob hidden_dropout_prob classifier_dropout is_decoder add_cross_attention bos_token_id eos_token_id
    tie_word_embeddings model_max_length
""".split())


@dataclass(frozen=True)
class BertConfig:
    """Sizes and choices of a BERT encoder, named as in config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    pad_token_id: int

    @classmethod
    def from_json(cls, path_or_dict):
        """Read and validate a config.json of model_type bert.

        Raises
        ------
        NpllmOSError, NpllmValueError
            As `Config.from_json`.
        """
        data = path_or_dict if isinstance(path_or_dict, dict) else read_json(Path(path_or_dict))
        read = JsonReader(data, "config" if isinstance(path_or_dict, dict) else str(path_or_dict), KEYS_WITHOUT_EFFECT)
        for key, only in (("model_type", "bert"), ("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
            if read.text(key, default=only) != only:
                raise NpllmValueError(f"{read.where}: {key} must be {only!r}, got {data[key]!r}, which is not implemented")
        for ignored in ("architectures", "dtype", "torch_dtype"):
            read.get(ignored)
        sizes = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                 "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2}
        config = cls(**{key: read.size(key, default=size) for key, size in sizes.items()},
                     layer_norm_eps=read.number("layer_norm_eps", default=1e-12), pad_token_id=read.token("pad_token_id") or 0)
        if config.hidden_size % config.num_attention_heads:
            raise NpllmValueError(f"{read.where}: hidden_size must be a multiple of num_attention_heads = "
                                  f"{config.num_attention_heads}, got {config.hidden_size}")
        read.finish()
        return config


class Encoder:
    """A bidirectional encoder: hidden states of every token, and one vector for each text.

    Parameters
    ----------
    config : BertConfig
    params : npllm.models.bert.BertParams
    ops : Ops, optional
    tokenizer : Tokenizer, optional
    max_tokens : int, optional
        Longer texts are cut; default: as many as there are positions.
    folder : Path, optional
    """

    def __init__(self, config, params, *, ops=None, tokenizer=None, max_tokens=None, folder=None):
        self.config, self.params, self.tokenizer, self.folder = config, params, tokenizer, folder
        self.ops = _ops.blockwise if ops is None else ops
        self.max_tokens = min(max_tokens or config.max_position_embeddings, config.max_position_embeddings)
        self._xp = array_namespace(params.word_embeddings)
        if tokenizer is not None:
            tokenizer.backend.enable_truncation(self.max_tokens)

    def __call__(self, input_ids, *, attention_mask=None):
        """Compute the hidden state of every token.

        Parameters
        ----------
        input_ids : integer array [n_batch, n_seq]
        attention_mask : array [n_batch, n_seq], optional
            1 for a token, 0 for padding.

        Returns
        -------
        hidden : array [n_batch, n_seq, d_model]

        Raises
        ------
        NpllmTypeError, NpllmValueError
            When ids are no integers, out of range, or more than there are positions; when shapes do not fit.

        Notes
        -----
        Source: `BertModel` in Transformers.
        """
        ids = to_numpy(input_ids) if hasattr(input_ids, "__array_namespace__") else np.asarray(input_ids)
        if not is_integer(ids) or ids.ndim != 2 or 0 in ids.shape:
            raise NpllmTypeError(f"input_ids must be integers [n_batch, n_seq], both at least 1, got {ids.dtype} {list(ids.shape)}")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise NpllmValueError(f"token ids must lie in 0 ... vocab_size - 1 = {self.config.vocab_size - 1}, got {ids.min()} ... "
                                  f"{ids.max()}")
        if ids.shape[1] > self.config.max_position_embeddings:
            raise NpllmValueError(f"{ids.shape[1]} tokens do not fit: max_position_embeddings is {self.config.max_position_embeddings}")
        valid = np.ones(ids.shape, dtype=bool) if attention_mask is None else np.asarray(to_numpy(attention_mask)).astype(bool)
        if valid.shape != ids.shape:
            raise NpllmValueError(f"attention_mask must be [n_batch, n_seq] = {list(ids.shape)}, got {list(valid.shape)}")
        rule = None if valid.all() else _ops.mask.padding(asarray(valid, self._xp))
        return bert.forward(self.params, asarray(ids, self._xp), rule, self.config.num_attention_heads,
                            self.config.layer_norm_eps, self.ops)

    def embed(self, texts, *, normalize=True):
        """Turn texts into vectors, so that the product of two tells how alike the texts are.

        Parameters
        ----------
        texts : list of str
        normalize : bool
            Scale every vector to length 1.

        Returns
        -------
        vectors : array [n, d_model]
            NumPy float32 (float64 when the weights are): the mean of the hidden states of each text's tokens.

        Raises
        ------
        NpllmTypeError
            When `texts` is no list of str.

        Notes
        -----
        A text beyond the length that the folder states is cut there.

        Source: "Sentence-BERT" (Reimers and Gurevych 2019), section 3.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise NpllmTypeError(f"texts must be a list of str, got {str(texts)[:80]!r}")
        rows = [self.require_tokenizer().encode(text) for text in texts]
        vectors = np.zeros((len(rows), self.config.hidden_size), dtype=_float(self.params))
        by_length = sorted(range(len(rows)), key=lambda n: len(rows[n]))  # so that little is spent on padding
        for batch in range(math.ceil(len(rows) / BATCH)):
            numbers = by_length[batch * BATCH : (batch + 1) * BATCH]
            ids, valid = _pad_right([rows[n] for n in numbers], self.config.pad_token_id)
            hidden = self(ids, attention_mask=valid)
            vectors[numbers] = to_numpy(bert.mean_pool(hidden, asarray(valid, self._xp), normalize))
        return vectors

    def require_tokenizer(self):
        """Return the tokenizer; raise where the folder has none."""
        if self.tokenizer is None:
            raise NpllmValueError(f"{self.folder or 'this encoder'}: has no tokenizer.json, so it takes token ids only, not text")
        return self.tokenizer

    def __repr__(self):
        return f"<npllm.Encoder {self.folder.name if self.folder else 'bert'}, {self.ops.name} ops>"


def load_encoder(folder, *, dtype=None, ops=None, xp=np):
    """Load an encoder from a folder of model_type bert; `npllm.load` does it for you.

    Raises
    ------
    NpllmOSError, NpllmValueError
        As `npllm.load`; also when the folder asks for another pooling than the mean.
    """
    folder = Path(folder)
    config = BertConfig.from_json(folder / "config.json")
    tensors = load_tensors(folder, bert.expected_shapes(config), dtype=dtype, xp=xp, ignored=("pooler.", "embeddings.position_ids"))
    tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").is_file() else None
    _check_pooling(folder / "1_Pooling" / "config.json")
    return Encoder(config, bert.make_params(tensors, config), ops=ops, tokenizer=tokenizer, folder=folder,
                   max_tokens=_max_tokens(folder / "sentence_bert_config.json"))


def _check_pooling(path):
    """Raise where a folder asks for another pooling than the mean over the tokens."""
    modes = read_json(path) if path.is_file() else {}
    others = [name for name, on in modes.items() if name.startswith("pooling_mode_") and on and name != "pooling_mode_mean_tokens"]
    if others:
        raise NpllmValueError(f"{path}: only pooling_mode_mean_tokens is implemented, got {', '.join(others)}")


def _max_tokens(path):
    """The length at which texts are cut, where the folder says one."""
    settings = read_json(path) if path.is_file() else {}
    return JsonReader(settings, str(path)).size("max_seq_length", default=None)


def _pad_right(rows, pad):
    ids = np.full((len(rows), max(map(len, rows))), pad, dtype=np.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    valid = np.arange(ids.shape[1]) < np.array([[len(tokens)] for tokens in rows])
    return ids, valid


def _float(params):
    return np.float64 if str(params.word_embeddings.dtype) == "float64" else np.float32
