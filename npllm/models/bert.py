"""BERT: the bidirectional contrast.  Learned positions, post-norm, exact GELU; the layers are those of 2017."""

from typing import Any, NamedTuple

from npllm.arrays import array_namespace
from npllm.models.transformer import AttentionParams, EncoderLayerParams, FeedForwardParams, NormParams, encoder_layer

__all__ = ["BertParams", "expected_shapes", "forward", "make_params", "mean_pool"]

Array = Any


class BertParams(NamedTuple):
    """Weights of a BERT encoder."""

    word_embeddings: Array  # [n_vocab, d_model]
    position_embeddings: Array  # [n_pos, d_model]
    token_type_embeddings: Array  # [n_type, d_model]
    embeddings_norm: NormParams
    layers: tuple[EncoderLayerParams, ...]


def forward(params, ids, mask, n_head, eps, ops):
    """Turn token ids into hidden states, every position seeing both sides.

        x = layer_norm(word[ids] + position[0 ... n - 1] + type[0]);   x = encoder_layer_l(x) for each layer l

    Parameters
    ----------
    params : BertParams
    ids : integer array [n_batch, n_seq]
    mask : Rule or None
        Hides padding.
    n_head : int
    eps : float
    ops : Ops

    Returns
    -------
    hidden : array [n_batch, n_seq, d_model]

    Notes
    -----
    Source: "BERT" (Devlin et al. 2018), section 3; `BertModel` in Transformers.
    """
    positions = array_namespace(ids).arange(ids.shape[-1])
    x = ops.embed(ids, params.word_embeddings) + ops.embed(0 * ids, params.token_type_embeddings)
    x = x + ops.embed(positions, params.position_embeddings)
    x = ops.layer_norm(x, params.embeddings_norm.weight, params.embeddings_norm.bias, eps)
    for layer in params.layers:
        x = encoder_layer(x, layer, n_head, ops, mask=mask, activation=ops.gelu, eps=eps)
    return x


def mean_pool(hidden, valid, normalize=True):
    """Average the hidden states of a text's tokens, padding left out, and scale the mean to length 1.

        mean[b, :] = sum_n valid[b, n] * hidden[b, n, :] / sum_n valid[b, n];   y = mean / |mean|

    Parameters
    ----------
    hidden : array [n_batch, n_seq, d_model]
    valid : bool array [n_batch, n_seq]
    normalize : bool

    Returns
    -------
    y : array [n_batch, d_model]

    Notes
    -----
    Source: "Sentence-BERT" (Reimers and Gurevych 2019), section 3; `Pooling` and `Normalize` in sentence-transformers.
    """
    xp = array_namespace(hidden, valid)
    weight = xp.astype(valid, hidden.dtype)[..., None]
    mean = xp.sum(weight * hidden, axis=1) / xp.maximum(xp.sum(weight, axis=1), xp.full_like(weight[:, 0], 1e-9))
    if not normalize:
        return mean
    length = xp.sqrt(xp.sum(mean * mean, axis=-1, keepdims=True))
    return mean / xp.maximum(length, xp.full_like(length, 1e-12))


def expected_shapes(config):
    """List the tensors of a BERT checkpoint: name in the file -> shape."""
    d_model, d_ff = config.hidden_size, config.intermediate_size
    shapes = {
        "embeddings.word_embeddings.weight": (config.vocab_size, d_model),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, d_model),
        "embeddings.token_type_embeddings.weight": (config.type_vocab_size, d_model),
        "embeddings.LayerNorm.weight": (d_model,), "embeddings.LayerNorm.bias": (d_model,),
    }
    linears = {"attention.self.query": (d_model, d_model), "attention.self.key": (d_model, d_model),
               "attention.self.value": (d_model, d_model), "attention.output.dense": (d_model, d_model),
               "intermediate.dense": (d_ff, d_model), "output.dense": (d_model, d_ff)}
    for number in range(config.num_hidden_layers):
        prefix = f"encoder.layer.{number}."
        for name, shape in linears.items():
            shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[:1]}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{prefix}{name}.weight": (d_model,), f"{prefix}{name}.bias": (d_model,)}
    return shapes


def make_params(tensors, config):
    """Put the tensors of a checkpoint, by name, into BertParams."""
    def pair(name):
        return tensors[name + ".weight"], tensors[name + ".bias"]

    def layer(prefix):
        q, k, v, o = (pair(prefix + name) for name in ("attention.self.query", "attention.self.key", "attention.self.value",
                                                       "attention.output.dense"))
        attention = AttentionParams(q[0], k[0], v[0], o[0], q[1], k[1], v[1], o[1])
        network = FeedForwardParams(*pair(prefix + "intermediate.dense"), *pair(prefix + "output.dense"))
        return EncoderLayerParams(attention, NormParams(*pair(prefix + "attention.output.LayerNorm")), network,
                                  NormParams(*pair(prefix + "output.LayerNorm")))

    return BertParams(
        *(tensors[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")),
        NormParams(*pair("embeddings.LayerNorm")),
        tuple(layer(f"encoder.layer.{number}.") for number in range(config.num_hidden_layers)))

