"""Random and nasty inputs of every operation that has a budget."""

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def _cancelling(rng, shape):
    half = rng.standard_normal((*shape[:-1], -(-shape[-1] // 2)))
    return np.concatenate([half, -half], axis=-1)[..., : shape[-1]] + 1e-3 * rng.standard_normal(
        shape
    )


def _outlier(rng, shape):
    x = rng.standard_normal(shape)
    x[..., rng.integers(shape[-1])] *= 1e4
    return x


def _nearly_equal(rng, shape):
    """Entries that a long sum rounds alike although no two are equal."""
    return rng.standard_normal() * (1 + 10.0 ** rng.uniform(-7, -3) * rng.standard_normal(shape))


def _outlier_among(rng, x):
    x[..., rng.integers(x.shape[-1])] *= 10.0 ** rng.uniform(1, 8)
    return x


KINDS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "huge": lambda rng, shape: 1e15 * rng.standard_normal(shape),
    "tiny": lambda rng, shape: 1e-20 * rng.standard_normal(shape),
    "subnormal": lambda rng, shape: 1e-40 * rng.standard_normal(shape),
    "equal": lambda rng, shape: np.full(shape, rng.standard_normal()),
    "few values": lambda rng, shape: rng.choice(rng.standard_normal(3), shape),
    "cancelling": _cancelling,
    "sparse": lambda rng, shape: rng.standard_normal(shape) * (rng.random(shape) < 0.1),
    "outlier": _outlier,
    "nearly equal": _nearly_equal,
    "outlier among nearly equal": lambda rng, shape: _outlier_among(rng, _nearly_equal(rng, shape)),
    "outlier among positive": lambda rng, shape: _outlier_among(rng, rng.random(shape)),
    "offset": lambda rng, shape: 100 + rng.standard_normal(shape),
    "positive": lambda rng, shape: rng.random(shape),
    "sorted": lambda rng, shape: np.sort(rng.standard_normal(shape), axis=-1),
    "bfloat16": lambda rng, shape: rng.standard_normal(shape).astype(BFLOAT16),
    "zeros": lambda _, shape: np.zeros(shape),
    "wide": lambda rng, shape: rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 6, shape),
}
MODERATE = (
    "normal",
    "equal",
    "nearly equal",
    "few values",
    "cancelling",
    "sparse",
    "offset",
    "positive",
    "sorted",
    "bfloat16",
    "zeros",
)


def array(rng, *shape, kinds=tuple(KINDS)):
    return KINDS[kinds[rng.integers(len(kinds))]](rng, shape).astype(np.float32)


def gain(rng, n):
    return array(rng, n, kinds=("normal", "positive", "equal", "bfloat16"))


def linear(rng):
    m, n, o = rng.integers(1, 4), rng.integers(1, 300), rng.integers(1, 5)
    bias = {"bias": array(rng, o)} if rng.random() < 0.5 else {}
    return {"x": array(rng, m, n), "weight": array(rng, o, n), **bias}


def qkv_projection(rng):
    n_head, n_kv_head, d, n = (
        4,
        int(rng.choice([1, 2, 4])),
        int(rng.integers(1, 5)),
        int(rng.integers(1, 99)),
    )
    return {
        "x": array(rng, 2, n),
        "weight": array(rng, (n_head + 2 * n_kv_head) * d, n),
        "n_head": n_head,
        "n_kv_head": n_kv_head,
    }


def rms_norm(rng):
    n = int(rng.integers(1, 400))
    return {
        "x": array(rng, 3, n),
        "weight": gain(rng, n),
        "eps": float(rng.choice([1e-5, 1e-6, 1e-12])),
    }


def layer_norm(rng):
    n = int(rng.integers(1, 400))
    return {
        "x": array(rng, 3, n),
        "weight": gain(rng, n),
        "bias": gain(rng, n),
        "eps": float(rng.choice([1e-5, 1e-6, 1e-12])),
    }


def rope(rng):
    d_head = 2 * int(rng.integers(2, 9))
    d_rope = 2 * int(rng.integers(1, d_head // 2 + 1))
    factors = {"factors": 1 + rng.random(d_rope // 2)} if rng.random() < 0.3 else {}
    positions = rng.integers(0, int(rng.choice([2, 100, 5000, 131072])), 5)
    return {
        "x": array(rng, 2, 3, 5, d_head),
        "positions": positions,
        "base": float(rng.choice([1e4, 5e5])),
        "d_rope": d_rope,
        "magnitude": float(rng.choice([1.0, 1.19])),
        **factors,
    }


def softmax(rng):
    scale = np.float32(rng.choice([0.1, 1, 10]))
    return {"x": scale * array(rng, 3, int(rng.integers(1, 300)), kinds=MODERATE)}


def attention(rng):
    n_kv_head, group, d = int(rng.choice([1, 2])), int(rng.choice([1, 3])), int(rng.integers(1, 33))
    n_seq = int(rng.integers(1, 9))
    n_ctx = n_seq + int(rng.choice([0, 5, 90]))
    scale = np.float32(rng.choice([0.1, 1, 4]))
    inputs = {
        "q": scale * array(rng, 2, n_kv_head * group, n_seq, d, kinds=MODERATE),
        "k": array(rng, 2, n_kv_head, n_ctx, d, kinds=MODERATE),
        "v": array(rng, 2, n_kv_head, n_ctx, int(rng.integers(1, 9))),
    }
    if rng.random() < 0.3:
        inputs["window"] = int(rng.integers(1, 8))
    if rng.random() < 0.3:
        inputs["valid"] = np.arange(n_ctx) >= rng.integers(0, n_ctx + 1, (2, 1))
    if rng.random() < 0.2:
        inputs["bias"] = rng.standard_normal((n_seq, n_ctx)).astype(np.float32)
    if rng.random() < 0.2:
        inputs["softcap"] = 5.0
    return inputs


def swiglu(rng):
    scale = np.float32(rng.choice([1, 1, 30]))
    return {
        "gate_up": scale
        * array(rng, 3, 2 * int(rng.integers(1, 40)), kinds=(*MODERATE, "tiny", "outlier", "wide"))
    }


def gelu(rng):
    scale = np.float32(rng.choice([1, 3]))
    kinds = (*MODERATE, "tiny", "outlier", "wide")
    return {
        "x": scale * array(rng, 3, int(rng.integers(1, 40)), kinds=kinds),
        "approximate": str(rng.choice(["none", "tanh"])),
    }


def embed(rng):
    return {"ids": rng.integers(0, 7, (2, 3)), "weight": array(rng, 7, 5)}


def add(rng):
    shape = 3, int(rng.integers(1, 40))
    return {"x": array(rng, *shape), "y": array(rng, *shape)}


INPUTS = {
    "linear": linear,
    "qkv_projection": qkv_projection,
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "rope": rope,
    "softmax": softmax,
    "attention": attention,
    "swiglu": swiglu,
    "gelu": gelu,
    "embed": embed,
    "add": add,
}


def plain(op, rng, scale=1.0):
    """Well-conditioned inputs of a fixed size, on which a mistake must show."""

    def normal(*shape):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    weight = (0.5 + rng.random(64)).astype(np.float32)
    return {
        "linear": lambda: {"x": normal(6, 64), "weight": normal(64, 64), "bias": normal(64)},
        "qkv_projection": lambda: {
            "x": normal(2, 5, 64),
            "weight": normal(64, 64),
            "n_head": 4,
            "n_kv_head": 2,
        },
        "rms_norm": lambda: {
            "x": (0.02 * (1 + normal(6, 64))).astype(np.float32),
            "weight": weight,
            "eps": 1e-5,
        },
        "layer_norm": lambda: {
            "x": (0.02 * (1 + normal(6, 64))).astype(np.float32),
            "weight": weight,
            "bias": normal(64),
            "eps": 1e-5,
        },
        "rope": lambda: {
            "x": normal(2, 3, 4, 16),
            "positions": np.array([3, 47, 259, 600]),
            "base": 5e5,
            "d_rope": 8,
            "magnitude": 1.19,
        },
        "softmax": lambda: {"x": normal(6, 64)},
        "attention": lambda: {
            "q": normal(2, 6, 9, 16),
            "k": normal(2, 3, 21, 16),
            "v": normal(2, 3, 21, 16),
            "window": 15,
            "softcap": 2.0,
        },
        "swiglu": lambda: {"gate_up": normal(6, 64)},
        "gelu": lambda: {"x": normal(6, 64), "approximate": "none"},
        "embed": lambda: {"ids": rng.permutation(16).reshape(4, 4), "weight": normal(16, 16)},
        "add": lambda: {"x": normal(6, 64), "y": normal(6, 64)},
    }[op]()
