"""The wiring of BERT: three embeddings, then post-norm encoder layers that see both sides."""

from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import array_namespace
from npllm.checkpoints.safetensors import INTEGER_DTYPES, TensorReader, check_shapes, read_entries, view_of
from npllm.checkpoints.unused import warn_of_unused
from npllm.models.transformer import AttentionParams, EncoderLayerParams, FeedForwardParams, NormParams, encoder_layer

__all__ = ["BertParams", "expected_shapes", "forward", "load_params"]

Array = Any
POSITION_IDS, POOLER = "embeddings.position_ids", ("pooler.dense.weight", "pooler.dense.bias")


class BertParams(NamedTuple):
    """Weights of a BERT encoder.  Immutable."""

    word_embeddings: Array  # [n_vocab, d_model]
    position_embeddings: Array  # [n_pos, d_model]
    token_type_embeddings: Array  # [n_type, d_model]
    norm: NormParams  # of the sum of the three
    layers: tuple[EncoderLayerParams, ...]  # n_layer of them


def forward(params, config, ids, token_types, mask, ops):
    """Compute the hidden state of every position.

        x = layer_norm(word[ids] + type[token_types] + position[0 ... n_seq - 1]);   then x = encoder_layer(x), n_layer times

    Parameters
    ----------
    params : BertParams
    config : BertConfig
    ids : integer array [n_batch, n_seq]
    token_types : integer array [n_batch, n_seq]
        0 for the first segment, 1 for the second.
    mask : Rule or None
        None: every position sees every other.
    ops : Ops

    Returns
    -------
    hidden : array [n_batch, n_seq, d_model]
        float32, or float64 when the weights are.

    Raises
    ------
    NpllmValueError
        When n_seq exceeds n_pos, or an id lies outside its table.

    Notes
    -----
    Source: "BERT" (Devlin et al. 2018), section 3 and figure 2; `BertModel` in Transformers.
    """
    xp = array_namespace(ids)
    x = ops.add(ops.embed(ids, params.word_embeddings), ops.embed(token_types, params.token_type_embeddings))
    x = ops.add_positions(x, xp.arange(ids.shape[1]), params.position_embeddings)
    x = ops.layer_norm(x, params.norm.weight, params.norm.bias, config.layer_norm_eps)
    activation = {"gelu": ops.gelu, "relu": ops.relu, "silu": ops.silu}[config.hidden_act]
    for layer in params.layers:
        x = encoder_layer(x, layer, config.num_attention_heads, ops, mask=mask, activation=activation, eps=config.layer_norm_eps)
    return x


def load_params(folder, config, *, dtype=None, xp=np, is_pooled=False):
    """Load the weights of a BERT folder.

    Parameters
    ----------
    folder : str or Path
    config : BertConfig
    dtype, xp
        As in `npllm.checkpoints.safetensors.load_params`.
    is_pooled : bool
        The folder says how vectors are made of hidden states, so that nobody expects the pooler.

    Returns
    -------
    params : BertParams

    Raises
    ------
    NpllmOSError
        When a file is missing, truncated, or not safetensors.
    NpllmValueError
        One error that lists every missing, unknown and misshapen tensor and every unusable dtype.

    Warns
    -----
    UserWarning
        For position ids that do not count up, and for a pooler, which is not used, unless `is_pooled`.

    Notes
    -----
    Names may begin with "bert.", as they do where a head was trained on top.
    """
    entries = _without_prefix(read_entries(folder))
    check_shapes(folder, entries, expected_shapes(config), frozenset((POSITION_IDS, *POOLER)))
    _warn_of_ignored(folder, entries, config, is_pooled)
    reader = TensorReader(entries, dtype, xp, None)
    params = assemble(lambda name: reader.read([name]), config)
    reader.finish()
    return params


def _warn_of_ignored(folder, entries, config, is_pooled):
    """Warn of tensors that hold something and are not used."""
    ids, n_pos = entries.get(POSITION_IDS), config.max_position_embeddings
    if ids is not None and not _counts_up(ids, n_pos):
        warn_of_unused(folder, [POSITION_IDS], f"it is not 0 ... {n_pos - 1}, which is used")
    if not is_pooled:
        warn_of_unused(folder, [name for name in POOLER if name in entries],
                       "hidden states are combined as 1_Pooling/config.json says, else by their mean", stacklevel=5)


def _counts_up(entry, n):
    """Whether a tensor of the file holds the integers 0 ... n - 1."""
    return entry.dtype in INTEGER_DTYPES and np.array_equal(view_of(entry).reshape(-1), np.arange(n))


def expected_shapes(config):
    """List every tensor that a checkpoint of this configuration holds.

    Parameters
    ----------
    config : BertConfig

    Returns
    -------
    shapes : dict of str to tuple of int
        Tensor name, without the prefix "bert." -> shape.
    """
    d_model, d_ff = config.hidden_size, config.intermediate_size
    tables = {"word": config.vocab_size, "position": config.max_position_embeddings, "token_type": config.type_vocab_size}
    shapes = {f"embeddings.{table}_embeddings.weight": (rows, d_model) for table, rows in tables.items()}
    norms = ["embeddings.LayerNorm"]
    for number in range(config.num_hidden_layers):
        layer = f"encoder.layer.{number}."
        linears = {**{f"attention.{leaf}": (d_model, d_model) for leaf in ("self.query", "self.key", "self.value", "output.dense")},
                   "intermediate.dense": (d_ff, d_model), "output.dense": (d_model, d_ff)}
        for leaf, shape in linears.items():
            shapes |= {f"{layer}{leaf}.weight": shape, f"{layer}{leaf}.bias": shape[:1]}
        norms += [layer + "attention.output.LayerNorm", layer + "output.LayerNorm"]
    return shapes | {f"{norm}.{leaf}": (d_model,) for norm in norms for leaf in ("weight", "bias")}


def assemble(get, config):
    """Put the tensors that `get(name)` gives into their places.

    Parameters
    ----------
    get : function (name) -> array
        The names are those of `expected_shapes`.
    config : BertConfig

    Returns
    -------
    params : BertParams
    """

    def norm(name):
        return NormParams(get(name + ".weight"), get(name + ".bias"))

    def layer(name):
        linears = [f"{name}.attention.{leaf}" for leaf in ("self.query", "self.key", "self.value", "output.dense")]
        attention = AttentionParams(*(get(f"{linear}.{leaf}") for leaf in ("weight", "bias") for linear in linears))
        network = FeedForwardParams(*(get(f"{name}.{half}.dense.{leaf}") for half in ("intermediate", "output")
                                      for leaf in ("weight", "bias")))
        return EncoderLayerParams(attention, norm(name + ".attention.output.LayerNorm"), network, norm(name + ".output.LayerNorm"))

    tables = (get(f"embeddings.{table}_embeddings.weight") for table in ("word", "position", "token_type"))
    return BertParams(*tables, norm("embeddings.LayerNorm"),
                      tuple(layer(f"encoder.layer.{number}") for number in range(config.num_hidden_layers)))


def _without_prefix(entries):
    """Entries under their names without "bert."; a name that stands there with and without it keeps it, and will be unknown."""
    short = {name: name.removeprefix("bert.") for name in entries}
    return {name if short[name] != name and short[name] in entries else short[name]: entry for name, entry in entries.items()}
