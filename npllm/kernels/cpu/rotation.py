"""Rotation of queries and keys, and the write into the KV cache, in compiled kernels."""

from typing import Any

from npllm.kernels.cpu.launching import kernel

__all__ = ["append_token", "rotate", "rotate_all"]

Array = Any


@kernel(nogil=True)
def rotate(x: Array, cos: Array, sin: Array, y: Array) -> None:
    """Rotary position embedding of one head of one token, channel i with channel i + d_rope/2; y
    may be x.
    """
    half = len(cos) // 2
    for i in range(half):
        first, second = x[i], x[i + half]
        y[i] = first * cos[i] - second * sin[i]
        y[i + half] = second * cos[i + half] + first * sin[i + half]
    for i in range(2 * half, len(x)):
        y[i] = x[i]


@kernel(nogil=True)
def append_token(
    token: Array, cos: Array, sin: Array, n_head: int, keys: Array, values: Array
) -> None:
    """Write the keys of one token, rotated, and its values, [n_kv_head, d_head]."""
    n_kv_head, d_head = keys.shape
    for h in range(n_kv_head):
        start = (n_head + h) * d_head
        rotate(token[start : start + d_head], cos, sin, keys[h])
        start += n_kv_head * d_head
        for i in range(d_head):
            values[h, i] = token[start + i]


@kernel(nogil=True)
def rotate_all(x: Array, cos: Array, sin: Array, y: Array, rotated: bool) -> None:
    """Write one head of many tokens [n_seq, d_head] into y, rotated where `rotated`."""
    for n in range(len(x)):
        for i in range(x.shape[1]):
            y[n, i] = x[n, i]
        if rotated:
            rotate(y[n], cos[n], sin[n], y[n])
