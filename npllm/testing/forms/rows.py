"""Operations on rows with their forks: norm, gated product, linear maps, embedding."""

from collections.abc import Callable

import numpy as np

from npllm.testing.forms.common import Answer, Array, Choice, NotApplicableError, Work, gamma

__all__ = ["embed", "linear", "lm_head", "qkv_projection", "rms_norm", "swiglu"]

TINY = 2.0**-126

GAINS: dict[str, Callable[[Array], Array]] = {
    "1 + w": lambda w: 1 + w,
    "twice": lambda w: w * w,
    "omitted": np.ones_like,
}
EPS = {"eps 1e-6": 1e-6, "eps 1e-5": 1e-5, "eps omitted": 0.0}


def rms_norm(inputs: dict, choice: Choice, work: Work) -> Answer:
    """Normalise each row under the options of `choice`.

        y = w x / sqrt(mean x**2 + eps);   slack = |y| (gamma_(n+1) / 2 + 5 u)

    Returns
    -------
    answer : Answer
        Arrays [n_row, width].
    """
    x = _flat(inputs["x"]).astype(work.dtype)
    w = inputs["weight"].astype(work.dtype)
    w = GAINS[choice["C28"]](w) if "C28" in choice else w
    option, n = choice.get("C29"), x.shape[-1]
    eps = np.asarray(EPS.get(option or "", inputs["eps"]), dtype=work.dtype)
    mean = x.mean(axis=-1, keepdims=True) if option == "centred" else np.zeros((), work.dtype)
    square = ((x - mean) ** 2).sum(axis=-1, keepdims=True)
    square = square if option == "sum of squares" else square / np.asarray(n, work.dtype)
    root = np.sqrt(square) + eps if option == "eps outside the root" else np.sqrt(square + eps)
    y = w * ((x - mean) / np.where(root == 0, 1, root))
    if work.dtype != np.float64:
        return Answer(y, None)
    relative = np.abs(y) * (gamma(n + 1, work.unit) / 2 + 5 * work.unit)
    if option == "centred":
        size = np.abs(x).mean(axis=-1, keepdims=True) + np.abs(x)
        relative = relative + np.abs(w) * gamma(n + 1, work.unit) * size / np.where(
            root == 0, 1, root
        )
    return Answer(y, relative)


def swiglu(inputs: dict, choice: Choice, work: Work) -> Answer:
    """Gate the up projection under the options of `choice`.

        y = gate / (1 + exp(-gate)) * up;   slack = |y| 7 u + |gate up| 2**-126

    Returns
    -------
    answer : Answer
        Arrays [n_row, width].
    """
    x = _flat(inputs["gate_up"]).astype(work.dtype)
    half = x.shape[-1] // 2
    gate, up = x[:, :half], x[:, half:]
    if choice.get("C7") == "up first":
        gate, up = up, gate
    if choice.get("C7") == "interleaved":
        gate, up = x[:, 0::2], x[:, 1::2]
    with np.errstate(over="ignore"):
        y = gate / (1 + np.exp(-gate)) * up
    if work.dtype != np.float64:
        return Answer(y, None)
    return Answer(y, 7 * work.unit * np.abs(y) + np.abs(gate * up) * TINY)


def linear(inputs: dict, choice: Choice, work: Work) -> Answer:
    """Multiply rows by a matrix under the options of `choice`.

        y = x W^T + bias;   slack = gamma_(n+1) (|x||W|^T + |bias|)

    Returns
    -------
    answer : Answer
        Arrays [n_row, width].
    """
    x, w = _flat(inputs["x"]).astype(work.dtype), inputs["weight"].astype(work.dtype)
    if choice.get("C31") == "weight [d_in, d_out]":
        w = w.reshape(w.shape[::-1]).T
    bias = 0 if inputs["bias"] is None else inputs["bias"].astype(work.dtype)
    y = x @ w.T + bias
    if work.dtype != np.float64:
        return Answer(y, None)
    size = np.abs(x) @ np.abs(w).T + np.abs(bias)
    return Answer(y, gamma(x.shape[-1] + 1, work.unit) * size)


def qkv_projection(inputs: dict, choice: Choice, work: Work) -> Answer:
    """Project rows to query, key and value heads under the options of `choice`.

    Returns
    -------
    answer : Answer
        Arrays [n_batch, n_head + 2 n_kv_head, n_seq, d_head]: queries, keys, values.
    """
    x, n_head, n_kv_head = inputs["x"], inputs["n_head"], inputs["n_kv_head"]
    answer = linear(inputs, choice, work)
    n_seq = x.shape[-2]
    cut = [
        _heads(part, n_seq, n_head, n_kv_head, choice)
        for part in (answer.y, answer.slack)
        if part is not None
    ]
    return Answer(cut[0], cut[1] if len(cut) > 1 else None)


def _heads(y: Array, n_seq: int, n_head: int, n_kv_head: int, choice: Choice) -> Array:
    """Cut rows [n_batch * n_seq, width] into [n_batch, n_head + 2 n_kv_head, n_seq, d_head]."""
    n_all = n_head + 2 * n_kv_head
    d_head = y.shape[-1] // n_all
    owner = _row_blocks(n_head, n_kv_head, choice)
    y = y.reshape(-1, n_seq, n_all, d_head)[:, :, owner]
    if choice.get("C31") == "heads not moved":
        parts = np.split(y, [n_head, n_head + n_kv_head], axis=2)
        parts = [part.reshape(len(y), part.shape[2], n_seq, d_head) for part in parts]
        return np.concatenate(parts, axis=1)
    return np.swapaxes(y, 1, 2)


def _row_blocks(n_head: int, n_kv_head: int, choice: Choice) -> Array:
    """For each head of q, k, v: which block of d_head weight rows it is made of."""
    n_all, group = n_head + 2 * n_kv_head, n_head // n_kv_head
    blocks = np.arange(n_all)
    q, k, v = np.split(blocks, [n_head, n_head + n_kv_head])
    if choice.get("C6") == "per-head interleave":
        places = blocks.reshape(n_kv_head, group + 2)
        q, k, v = places[:, :group].ravel(), places[:, group], places[:, group + 1]
    if choice.get("C22") == "k and v swapped":
        k, v = v, k
    if choice.get("C22") == "q and k swapped":
        if choice.get("C6"):
            raise NotApplicableError("the order of blocks is open where heads interleave")
        k, q = blocks[:n_kv_head], blocks[n_kv_head : n_kv_head + n_head]
    return np.concatenate([q, k, v])


def embed(inputs: dict, choice: Choice, work: Work) -> Answer:
    """Look up rows of the table under the options of `choice`."""
    weight = inputs["weight"].astype(work.dtype)
    y = weight[inputs["ids"].ravel()]
    if choice.get("C33") == "times sqrt(d_model)":
        y = y * np.asarray(weight.shape[-1] ** 0.5, dtype=work.dtype)
        return Answer(y, 2 * work.unit * np.abs(y))
    return Answer(y, np.zeros_like(y))


def lm_head(inputs: dict, choice: Choice, work: Work) -> Answer:
    """Map hidden states to logits, with the head or, wrongly, with the embedding table."""
    weight = inputs["weight"]
    if choice.get("C33") == "tied":
        if inputs["embedding"] is None:
            raise NotApplicableError("a tied head shows where the embedding is given")
        weight = inputs["embedding"]
    return linear({"x": inputs["hidden"], "weight": weight, "bias": None}, choice, work)


def _flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])
