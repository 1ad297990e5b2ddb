"""Fresh inputs for every operation of `diagnose`, with the edges that tell options apart."""

import numpy as np


def normal(rng, *shape, scale=1.0):
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def attention(rng):
    kind = rng.choice(["padded", "cached", "packed"])
    n_kv_head, group, d_head = (
        int(rng.integers(2, 4)),
        int(rng.integers(2, 4)),
        int(rng.choice([8, 12, 16])),
    )
    n_head = n_kv_head * group
    if kind == "packed":
        n_seq = n_ctx = int(rng.integers(8, 14))
        n_head = n_kv_head
    else:
        n_seq, n_ctx = int(rng.integers(5, 9)), int(rng.integers(11, 15))
    inputs = {
        "q": normal(rng, 2, n_head, n_seq, d_head),
        "k": normal(rng, 2, n_kv_head, n_ctx, d_head),
        "v": normal(rng, 2, n_kv_head, n_ctx, d_head),
        "window": int(rng.integers(3, 6)),
        "scale": float(rng.uniform(0.2, 0.7)),
        "d_rope": d_head // 2,
    }
    if kind == "padded":
        inputs["valid"] = np.arange(n_ctx) >= np.array([[n_ctx - 2], [rng.integers(0, 3)]])
    if kind == "packed":
        cut = rng.integers(2, n_ctx - 1, 2)
        inputs["documents"] = (np.arange(n_ctx) >= cut[:, None]).astype(np.int64)
    return inputs


def rope(rng):
    kind = rng.choice(["long", "padded", "packed", "across"])
    d_rope, d_head = int(rng.choice([8, 12])), int(rng.choice([16, 20]))
    n_seq = int(rng.integers(5, 9))
    inputs = {
        "x": normal(rng, 2, 3, n_seq, d_head),
        "base": float(rng.choice([5e5, 1e6])),
        "d_rope": d_rope,
        "magnitude": float(rng.uniform(1.1, 1.3)),
        "n_original": 4096,
        "factors": np.stack(
            [rng.uniform(1, 1.5, d_rope // 2), rng.uniform(3, 9, d_rope // 2)]
        ).astype(np.float32),
    }
    inputs["positions"] = {
        "long": lambda: np.sort(rng.choice(np.arange(5001, 65000, 2), n_seq, replace=False)),
        "padded": lambda: np.maximum(
            np.arange(n_seq) - np.array([[int(rng.integers(2, 4))], [0]]), 0
        ),
        "packed": lambda: np.concatenate([np.arange(n_seq - 3), np.arange(3)]),
        "across": lambda: np.arange(n_seq) + 4096 - 2,
    }[kind]()
    return inputs


def rms_norm(rng):
    d, sizes = int(rng.integers(12, 40)), np.geomspace(3e-3, 1, 4).astype(np.float32)[:, None]
    return {
        "x": sizes * (normal(rng, 4, d) + np.float32(0.5)),
        "weight": normal(rng, d, scale=0.1) + np.float32(0.3),
        "eps": float(rng.uniform(5e-5, 5e-4)),
    }


def swiglu(rng):
    return {"gate_up": normal(rng, 4, 2 * int(rng.integers(6, 20)))}


def linear(rng):
    return {"x": normal(rng, 3, 7, 24), "weight": normal(rng, int(rng.integers(5, 20)), 24)}


def qkv_projection(rng):
    n_kv_head = int(rng.integers(2, 4))
    n_head, d_head, d_model = n_kv_head * 2, int(rng.choice([4, 6])), int(rng.integers(8, 14))
    return {
        "x": normal(rng, 2, int(rng.integers(4, 7)), d_model),
        "weight": normal(rng, (n_head + 2 * n_kv_head) * d_head, d_model),
        "n_head": n_head,
        "n_kv_head": n_kv_head,
    }


def embed(rng):
    return {"ids": rng.integers(0, 9, (2, 3)), "weight": normal(rng, 9, 12)}


def lm_head(rng):
    return {
        "hidden": normal(rng, 3, 12),
        "weight": normal(rng, 9, 12),
        "embedding": normal(rng, 9, 12),
    }


def sampler(rng):
    """Rows of half-integers, with ties, and one that reaches top_p exactly."""
    rows = rng.integers(-8, 9, (6, 8)) / 2.0
    rows[0], rows[1] = (
        rng.permutation([3.0, 3, 2, 2, 2, 2, -30, -30]),
        rng.permutation([2.0, 2, 2, 2, -30, -30, -30, -30]),
    )
    return {
        "logits": rows.astype(np.float32),
        "temperature": 2.0,
        "top_k": int(rng.integers(3, 5)),
        "top_p": 0.75,
        "min_p": float(rng.choice([0.2, 0.3])),
    }


FRESH = {
    "attention": attention,
    "attention_lse": attention,
    "rope": rope,
    "rms_norm": rms_norm,
    "swiglu": swiglu,
    "linear": linear,
    "qkv_projection": qkv_projection,
    "embed": embed,
    "lm_head": lm_head,
    "sampler": sampler,
}
