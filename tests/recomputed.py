"""A value of a trace from its recorded inputs, by the operation that the index names.

Float64 and loops (oracles.py); what is not recorded, such as weights, comes from the checkpoint's
tensors, and what is seen from the index.
"""

import numpy as np
import oracles


def recomputed(trace, name, tensors):
    """Return float64 values of `name`; `tensors`: the checkpoint's, by name."""
    entry = trace.index["values"][name]
    step = trace.index["steps"][entry["step"]]
    inputs = [np.asarray(trace[one], np.float64) for one in entry["inputs"]]
    weights = [oracles.f64(tensors[f"{one}.weight"]) for one in entry["weights"]]
    config = trace.index["config"]
    context = config, step, entry
    return OPS[entry["op"]](context, *inputs, *weights)


def tables(context):
    """Cosines or sines of the step's positions, for the default frequencies."""
    config, step, entry = context
    rope = config.get("rope_parameters") or {}
    factor = config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    d_head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    d_rope = int(d_head * factor)
    pairs = np.arange(0, d_rope, 2) / d_rope
    inv_freq = (1 / 10000.0**pairs).astype(np.float32).astype(np.float64)
    positions = np.array(step["position_ids"], np.float64)
    phase = np.concatenate([positions[..., None] * inv_freq] * 2, axis=-1)
    table = {"cos": np.cos, "sin": np.sin}[entry["node"].rpartition(".")[2]](phase)
    return table[0] if len(entry["shape"]) == 2 else table


def embed(context, weight):
    return weight[np.array(context[1]["input_ids"])]


def rms_norm(context, x, gain):
    return oracles.rms_norm(x, gain, context[0]["rms_norm_eps"])


def linear(_, x, weight):
    return np.einsum("...i,oi->...o", x, weight)


def view(context, x):
    """A part of x, or x in another order, by the last word of the name."""
    config, _, entry = context
    word = entry["node"].rpartition(".")[2]
    n_head = config["num_attention_heads"]
    n_kv_head = config.get("num_key_value_heads") or n_head
    if word in ("q_proj", "k_proj", "v"):
        heads = np.stack(np.split(x, n_head + 2 * n_kv_head, axis=-1), axis=1)
        first = {"q_proj": 0, "k_proj": n_head, "v": n_head + n_kv_head}[word]
        return heads[:, first : first + (n_head if word == "q_proj" else n_kv_head)]
    if word in ("gate", "up"):
        return np.split(x, 2, axis=-1)[word == "up"]
    if word == "attention":
        return np.concatenate(list(np.moveaxis(x, 1, 0)), axis=-1)
    return x


def rope(_, x, cos, sin):
    """Channel i of the first d_rope turns with channel i + d_rope/2."""
    cos, sin = (t if t.ndim == 2 else t[:, None] for t in (cos, sin))
    half = cos.shape[-1] // 2
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    one, two = a * cos[..., :half] - b * sin[..., :half], b * cos[..., half:] + a * sin[..., half:]
    return np.concatenate([one, two, rest], axis=-1)


def cache(context, new, past=None):
    """What is new behind what was held, of which as much is kept as there is."""
    held = new if past is None else np.concatenate([past, new], axis=2)
    return held[:, :, held.shape[2] - context[2]["shape"][2] :]


def visible(context, n_batch, n_head, n_seq, n_ctx):
    """Causal, within the window, without padding; the keys are the last n_ctx slots."""
    config, step, _ = context
    n_slots = step["n_past"] + n_seq
    i, j = np.arange(step["n_past"], n_slots)[:, None], np.arange(n_slots - n_ctx, n_slots)
    window = config.get("sliding_window") or n_slots
    table = np.broadcast_to((j <= i) & (i - window < j), (n_batch, n_head, n_seq, n_ctx)).copy()
    if step["attention_mask"]:
        table &= np.array(step["attention_mask"], bool)[:, None, None, n_slots - n_ctx :]
    return table


def attention(context, q, k, v):
    n_batch, n_head, n_seq, _ = q.shape
    seen = visible(context, n_batch, n_head, n_seq, k.shape[2])
    return oracles.attention(q, k, v, seen)[0]


def attention_weights(context, q, k):
    n_batch, n_head, n_seq, _ = q.shape
    seen = visible(context, n_batch, n_head, n_seq, k.shape[2])
    return oracles.attention(q, k, k, seen)[2]


def mask(context):
    """As the index gives its shape: the axes in front may be missing, or 1."""
    *_, entry = context
    shape = (1, 1, 1, 1, *entry["shape"])[-4:]
    n_batch = len(context[1]["input_ids"])
    table = visible(context, n_batch, shape[1], *shape[2:])
    return table[: shape[0]].reshape(entry["shape"])


OPS = {
    "tables": tables,
    "embed": embed,
    "rms_norm": rms_norm,
    "linear": linear,
    "view": view,
    "rope": rope,
    "cache": cache,
    "attention": attention,
    "attention_weights": attention_weights,
    "mask": mask,
    "swiglu": lambda _, gate, up: oracles.swiglu(gate, up),
    "add": lambda _, x, y: x + y,
}
