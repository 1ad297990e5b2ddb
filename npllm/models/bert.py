"""The wiring of BERT: three embeddings, then post-norm encoder layers that see both sides."""

from typing import Any, NamedTuple

from npllm.arrays import array_namespace
from npllm.models.transformer import EncoderLayerParams, NormParams, encoder_layer
from npllm.ops import Ops

__all__ = ["BertParams", "forward"]

Array = Any


class BertParams(NamedTuple):
    """Weights of a BERT encoder.  Immutable."""

    word_embeddings: Array  # [n_vocab, d_model]
    position_embeddings: Array  # [n_pos, d_model]
    token_type_embeddings: Array  # [n_type, d_model]
    norm: NormParams  # of the sum of the three
    layers: tuple[EncoderLayerParams, ...]  # n_layer of them


def forward(params: Any, config: Any, ids: Array, token_types: Array, mask: Any, ops: Ops) -> Array:
    """Compute the hidden state of every position.

        x = layer_norm(word[ids] + type[token_types] + position[0 ... n_seq - 1])
        x = encoder_layer(x), n_layer times

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
    x = ops.add(
        ops.embed(ids, params.word_embeddings), ops.embed(token_types, params.token_type_embeddings)
    )
    x = ops.add_positions(x, xp.arange(ids.shape[1]), params.position_embeddings)
    x = ops.layer_norm(x, params.norm.weight, params.norm.bias, config.layer_norm_eps)
    activation = {"gelu": ops.gelu, "relu": ops.relu, "silu": ops.silu}[config.hidden_act]
    for layer in params.layers:
        x = encoder_layer(
            x,
            layer,
            config.num_attention_heads,
            ops,
            mask=mask,
            activation=activation,
            eps=config.layer_norm_eps,
        )
    return x
