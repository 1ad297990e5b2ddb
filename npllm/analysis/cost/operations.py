"""Operations and bytes of one forward pass, by operation.  The package docstring has the
conventions.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from npllm.analysis.cost.parameters import bias_sizes, linear_shapes
from npllm.analysis.cost.weight_bytes import WeightBytes
from npllm.config.config import Config

__all__ = ["FORMULAS", "SOFTMAX", "Cost", "Sizes", "pair_flops", "visible_pairs"]

SOFTMAX = 5  # operations for each visible pair


class Cost(NamedTuple):
    """Operations, and bytes moved."""

    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        """Operations for each byte moved: arithmetic intensity."""
        return self.flops / self.bytes if self.bytes else 0.0

    def __add__(self, other: Any) -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def visible_pairs(n_seq: int, n_past: int = 0, window: int | None = None) -> int:
    """Count the visible pairs of query and key, for n_seq queries after n_past cached tokens.

        sum_(i = n_past ... n_past + n_seq - 1) min(i + 1, window)

    Parameters
    ----------
    n_seq, n_past : int
    window : int, optional
        None: each query sees every earlier key.

    Returns
    -------
    n_pair : int

    Notes
    -----
    Source: causal mask of "Attention Is All You Need" (Vaswani et al. 2017), section 3.2.3.
    """
    stop = n_past + n_seq
    if window is None or stop <= window:
        return _triangle(stop) - _triangle(n_past)
    n_growing = max(0, window - n_past)  # queries that still see every earlier key
    return _triangle(n_past + n_growing) - _triangle(n_past) + (n_seq - n_growing) * window


def _triangle(n: int) -> int:
    """Visible pairs of the first n queries without a window."""
    return n * (n + 1) // 2


def pair_flops(config: Config) -> int:
    """Return the operations of attention for each visible pair, over all layers and heads."""
    n_head = config.num_hidden_layers * config.num_attention_heads
    return n_head * (4 * config.head_dim + 1 + SOFTMAX)


@dataclass(frozen=True)
class Sizes:
    """The sizes of one forward pass, on which the formulas depend."""

    config: Config
    n_seq: int
    n_past: int
    n_batch: int
    n_logits: int
    weights: WeightBytes
    wide: int  # bytes of a number of an activation

    @property
    def n_token(self) -> int:
        """New tokens of all sequences."""
        return self.n_batch * self.n_seq

    @property
    def n_layer(self) -> int:
        """Layers."""
        return self.config.num_hidden_layers

    @property
    def d_q(self) -> int:
        """Width of the queries of all heads."""
        return self.config.num_attention_heads * self.config.head_dim

    @property
    def d_kv(self) -> int:
        """Width of the keys, or of the values, of all heads."""
        return self.config.num_key_value_heads * self.config.head_dim


def _embed(z: Sizes) -> Cost:
    row = z.weights["embedding"] // z.config.vocab_size
    return Cost(0, z.n_token * (8 + row + z.config.hidden_size * z.wide))


def _rope_tables(z: Sizes) -> Cost:
    d = z.config.d_rope
    n_bytes = 8 * z.n_seq + d // 2 * z.wide + 2 * z.n_seq * d * z.wide
    return Cost(z.n_seq * (d // 2 + 4 * d), n_bytes)


def _rms_norm(z: Sizes) -> Cost:
    n, d = 2 * z.n_layer + 1, z.config.hidden_size
    n_bytes = n * 2 * z.n_token * d * z.wide + z.weights["norms"]
    return Cost(n * z.n_token * (4 * d + 3), n_bytes)


def _linear(z: Sizes) -> Cost:
    biases, d = bias_sizes(z.config), z.config.hidden_size
    cost = Cost(0, 0)
    for name, (d_out, d_in) in linear_shapes(z.config).items():
        flops = z.n_token * (2 * d_in * d_out + biases[name])
        n_bytes = z.n_token * (d_in + d_out) * z.wide
        cost += Cost(z.n_layer * flops, z.n_layer * n_bytes + z.weights[name])
    if z.n_logits == 0:
        return cost
    n, d_out = z.n_batch * z.n_logits, z.config.vocab_size
    return cost + Cost(2 * n * d * d_out, n * (d + d_out) * z.wide + z.weights["lm_head"])


def _apply_rope(z: Sizes) -> Cost:
    d, tables = z.config.d_rope, 2 * z.n_seq * z.config.d_rope
    n_rotated = z.n_token * (z.config.num_attention_heads + z.config.num_key_value_heads) * d
    n_bytes = z.wide * (2 * z.n_token * (z.d_q + z.d_kv) + 2 * tables)
    return Cost(z.n_layer * 3 * n_rotated, z.n_layer * n_bytes)


def _attention(z: Sizes) -> Cost:
    window = z.config.sliding_window
    pairs = z.n_batch * visible_pairs(z.n_seq, z.n_past, window)
    n_key = z.n_seq + (z.n_past if window is None else min(z.n_past, window - 1))
    n_bytes = z.wide * (2 * z.n_token * z.d_q + 2 * z.n_batch * n_key * z.d_kv)
    return Cost(pairs * pair_flops(z.config), z.n_layer * n_bytes)


def _swiglu(z: Sizes) -> Cost:
    d = z.config.intermediate_size
    return Cost(z.n_layer * 5 * z.n_token * d, z.n_layer * 3 * z.n_token * d * z.wide)


FORMULAS = {
    "embed": _embed,
    "rope_tables": _rope_tables,
    "rms_norm": _rms_norm,
    "linear": _linear,
    "apply_rope": _apply_rope,
    "attention": _attention,
    "swiglu": _swiglu,
}
"""Name of the operation -> function of `Sizes` that gives its cost."""
