"""The projections that have a name in every description of a transformer: Q, K and V, and the LM
head.
"""

from typing import Any

from npllm.arrays import array_namespace, expect_shape
from npllm.errors import NpllmValueError
from npllm.ops.linear import linear, split_heads

__all__ = ["lm_head", "qkv_projection", "split_qkv"]

Array = Any


def qkv_projection(
    x: Array, weight: Array, n_head: int, n_kv_head: int, bias: Array | None = None
) -> tuple[Array, Array, Array]:
    """Project each position to its queries, keys and values, cut into heads.

        q[..., h, n, :] = W_q[h] @ x[..., n, :] + b_q[h],  W_q[h] = weight[h*d_head : (h+1)*d_head]
        k[..., h, n, :] = W_k[h] @ x[..., n, :] + b_k[h],  W_k[h] follows the n_head blocks of W_q
        v[..., h, n, :] = W_v[h] @ x[..., n, :] + b_v[h],  W_v[h] follows the blocks of W_k

    Parameters
    ----------
    x : array [..., n_seq, d_model]
    weight : array [(n_head+2*n_kv_head)*d_head, d_model]
        The rows of W_q of all heads, then W_k, then W_v, each head
        d_head rows.  In Phi-3 checkpoints `qkv_proj`; in Llama's `q_proj`, `k_proj` and `v_proj`
        below each other.
    n_head, n_kv_head : int
    bias : array [(n_head+2*n_kv_head)*d_head], optional

    Returns
    -------
    q : array [..., n_head, n_seq, d_head]
    k, v : array [..., n_kv_head, n_seq, d_head]
        In the dtype of `x`; views of one product where the library has views.

    Raises
    ------
    NpllmValueError
        When the rows of `weight` are no multiple of n_head + 2*n_kv_head, or shapes do not fit.

    Notes
    -----
    Sums in the compute dtype of `linear`.

    Source: "Attention Is All You Need" (Vaswani et al. 2017), section 3.2.2; `Phi3Attention` in
    Transformers.
    """
    return split_qkv(linear(x, weight, bias), n_head, n_kv_head)


def split_qkv(qkv: Array, n_head: int, n_kv_head: int) -> tuple[Array, Array, Array]:
    """Cut projected rows [..., n_seq, (n_head+2*n_kv_head)*d_head] into the heads of q, k and v."""
    array_namespace(qkv)
    expect_shape("qkv", qkv, dots=None, n_seq=None, d_qkv=None)
    n_all, d_qkv = n_head + 2 * n_kv_head, qkv.shape[-1]
    if min(n_head, n_kv_head) < 1 or d_qkv % n_all:
        raise NpllmValueError(
            f"d_qkv must be (n_head + 2*n_kv_head) * d_head, a multiple of {n_head} + "
            f"2*{n_kv_head} = {n_all}, "
            f"got {d_qkv}"
        )
    d_head = d_qkv // n_all
    q_end, k_end = n_head * d_head, (n_head + n_kv_head) * d_head
    q, k, v = qkv[..., :q_end], qkv[..., q_end:k_end], qkv[..., k_end:]
    return split_heads(q, n_head), split_heads(k, n_kv_head), split_heads(v, n_kv_head)


def lm_head(hidden: Array, weight: Array) -> Array:
    """Score every token of the vocabulary by its product with the hidden state.

        logits[..., t] = sum_i hidden[..., i] * weight[t, i]

    Parameters
    ----------
    hidden : array [..., d_model]
        After the final norm.
    weight : array [n_vocab, d_model]
        `lm_head`; where a checkpoint ties them, the embedding table.

    Returns
    -------
    logits : array [..., n_vocab]
        In the dtype of `hidden`.

    Raises
    ------
    NpllmValueError
        When the shapes do not fit.

    Notes
    -----
    Source: `Phi3ForCausalLM.lm_head` in Transformers.
    """
    return linear(hidden, weight)
