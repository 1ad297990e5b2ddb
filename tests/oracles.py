"""Naive formulas to compare the ops with: float64, one entry at a time.  They share no code with
npllm.
"""

import math

import numpy as np


def f64(x):
    return np.asarray(x).astype(np.float64)


def embed(ids, weight):
    return f64([weight[n] for n in ids.ravel()]).reshape(*ids.shape, weight.shape[1])


def linear(x, weight, bias=None):
    rows = [
        [math.fsum(row * column) for column in f64(weight)]
        for row in f64(x).reshape(-1, x.shape[-1])
    ]
    return f64(rows).reshape(*x.shape[:-1], len(weight)) + (0 if bias is None else f64(bias))


def rms_norm(x, weight, eps):
    rows = [
        f64(weight) * row / math.sqrt(math.fsum(row**2) / len(row) + eps)
        for row in f64(x).reshape(-1, x.shape[-1])
    ]
    return f64(rows).reshape(x.shape)


def silu(x):
    return f64(
        [n / (1 + math.exp(-n)) if n > -700 else n * math.exp(n) for n in f64(x).ravel()]
    ).reshape(x.shape)


def swiglu(gate, up):
    return silu(gate) * f64(up)


def gated_bound(rows, weight):
    """How far float32 may be off in swiglu(rows @ weight.T): 2e-6 of what the sums would be if
    nothing in them cancelled.
    """
    sums = np.abs(f64(rows)) @ np.abs(f64(weight)).T
    return (
        2e-6 * sums[..., : len(weight) // 2] * (1 + sums[..., len(weight) // 2 :])
        + 2e-6 * sums[..., len(weight) // 2 :]
    )


def softmax(row):
    e = [math.exp(n - max(row)) if max(row) > -math.inf else 0.0 for n in row]
    return [n / math.fsum(e) if any(e) else 0.0 for n in e]


def rope(x, positions, inv_freq, scale=1.0, interleaved=False):
    """Each pair of channels as a complex number, multiplied by scale * exp(1j * phase); positions
    [n_batch or 1, n_seq].
    """
    y, half = f64(x).copy(), len(inv_freq)
    for *at, n in np.ndindex(x.shape[:-1]):
        turn = scale * np.exp(
            1j * (positions[at[0] if len(positions) > 1 else 0][n] * f64(inv_freq))
        )
        a, b = (
            (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
            if interleaved
            else (slice(0, half), slice(half, 2 * half))
        )
        pair = (y[*at, n, a] + 1j * y[*at, n, b]) * turn
        y[*at, n, a], y[*at, n, b] = pair.real, pair.imag
    return y


def attention(q, k, v, visible, bias=None, scale=None, softcap=None):
    """Return (y, lse, weights), one query and one key at a time; visible is a full bool array [...,
    n_head, n_seq, n_ctx].
    """
    q, k, v = f64(q), f64(k), f64(v)
    bias = np.broadcast_to(0.0 if bias is None else f64(bias), visible.shape)
    group = q.shape[-3] // k.shape[-3]
    y, lse, weights = (
        np.zeros((*q.shape[:-1], v.shape[-1])),
        np.full(q.shape[:-1], -np.inf),
        np.zeros(visible.shape),
    )
    for at in np.ndindex(q.shape[:-1]):
        head = (*at[:-2], at[-2] // group)
        s = {
            j: score(q[at], k[*head, j], scale, softcap) + bias[*at, j]
            for j in range(k.shape[-2])
            if visible[*at, j]
        }
        s = {j: n for j, n in s.items() if n > -np.inf}
        if s:
            lse[at] = max(s.values()) + math.log(
                math.fsum(math.exp(n - max(s.values())) for n in s.values())
            )
        for j, n in s.items():
            weights[*at, j] = math.exp(n - lse[at])
            y[at] += weights[*at, j] * v[*head, j]
    return y, lse, weights


def score(q, k, scale=None, softcap=None):
    s = math.fsum(q * k) * (1 / math.sqrt(len(q)) if scale is None else scale)
    return s if softcap is None else softcap * math.tanh(s / softcap)


def repetition_penalty(row, seen, penalty):
    return [
        (n / penalty if n > 0 else n * penalty) if was_seen else n
        for n, was_seen in zip(row, seen, strict=True)
    ]


def top_k(row, k):
    return [n if sum(other > n for other in row) < k else -math.inf for n in row]


def top_p(row, p):
    kept, total, probability = set(), 0.0, softmax(row)
    for i in sorted(range(len(row)), key=lambda i: (-row[i], i)):
        if total < p or not kept:
            kept.add(i)
        total += probability[i]
    return [n if i in kept else -math.inf for i, n in enumerate(row)]


def min_p(row, p):
    probability = softmax(row)
    return [
        n if q >= p * max(probability) else -math.inf for n, q in zip(row, probability, strict=True)
    ]
