"""Mask rules, each for several parameters; and the blocks of FlashAttention."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from npllm.ops import attention_io, mask
from npllm.ops.mask import Rule
from npllm.page.run import Run

__all__ = ["N_SLOTS", "flash", "masks"]

Array = Any
Data = dict[str, Any]

N_SLOTS = 36  # a square, so that the slots make a picture of 6 rows and 6 columns
SIDE = 6
LABELS = np.repeat([0, 1, 2], [10, 15, 11])[None]


def masks(run: Run) -> Data:
    """Give what each rule shows, for every value of its parameters that the page offers."""
    rules: dict[str, Data] = {}
    for name, formula, parameters, rule in _rules():
        entry = rules.setdefault(name, {"name": name, "formula": formula, "variants": []})
        entry["variants"].append({"parameters": parameters, "rows": _rows(rule)})
    own = repr(run.model.mask_rule(0))
    n_layer = run.model.config.num_hidden_layers
    return {"n": N_SLOTS, "side": SIDE, "rules": list(rules.values()), "own": own} | {
        "n_layer": n_layer
    }


def _rows(rule: Rule) -> list[str]:
    """A row of 0 and 1 for each query, in hexadecimal: the first key is the highest bit."""
    table = mask.to_bool(rule, N_SLOTS, N_SLOTS)
    table = table.reshape(-1, N_SLOTS, N_SLOTS)[0]
    width = -(-N_SLOTS // 4)
    return [f"{int(''.join('01'[int(x)] for x in row), 2):0{width}x}" for row in table]


def _rules() -> Iterator[tuple[str, str, dict[str, int], Rule]]:
    """Every rule: name, formula, parameters, and the rule itself."""
    yield "causal", "j <= i", {}, mask.causal()
    yield "bidirectional", "every j", {}, mask.bidirectional()
    yield from _windows()
    yield from _sparse()
    yield from _blocks()
    yield from _labelled()


def _windows() -> Iterator[tuple[str, str, dict[str, int], Rule]]:
    for w in range(1, 25):
        yield "sliding_window", "i - w < j <= i", {"w": w}, mask.sliding_window(w)
    for w in range(25):
        yield "lookback", "i - w <= j <= i", {"w": w}, mask.lookback(w)
    for w in range(0, 25, 2):
        yield "longformer_window", "|i - j| <= w / 2", {"w": w}, mask.longformer_window(w)
    for n in range(0, N_SLOTS + 1, 2):
        yield "prefix_lm", "j < n_prefix or j <= i", {"n_prefix": n}, mask.prefix_lm(n)


def _sparse() -> Iterator[tuple[str, str, dict[str, int], Rule]]:
    for before in range(9):
        for after in range(9):
            values = {"before": before, "after": after}
            yield "band", "-after <= i - j <= before", values, mask.band(before, after)
    formula = "|i - j| <= dilation * w / 2 and (i - j) mod dilation = 0"
    for w in range(0, 13, 2):
        for dilation in range(1, 5):
            values = {"w": w, "dilation": dilation}
            yield "dilated_window", formula, values, mask.dilated_window(w, dilation)
    formula = "j <= i and (i - j <= stride or (i - j) mod stride = 0)"
    for stride in range(1, 13):
        yield "strided", formula, {"stride": stride}, mask.strided(stride)
    formula = "j <= i and (same block, or j mod stride >= stride - c)"
    for stride in range(1, 13):
        for c in range(1, min(stride, 4) + 1):
            yield "fixed", formula, {"stride": stride, "c": c}, mask.fixed(stride, c)


def _blocks() -> Iterator[tuple[str, str, dict[str, int], Rule]]:
    for block in range(1, 19):
        values = {"block": block}
        yield "block_local", "i // block = j // block", values, mask.block_local(block)
        yield "causal & block_local", "j <= i and i // block = j // block", values, _local(block)
        formula = "j <= i and (same row or same column) of a picture that is `width` wide"
        yield "two-dimensional band", formula, {"width": block}, _picture_band(block)
    for n in range(7):
        rule = mask.global_tokens(range(n))
        yield "global_tokens", "i or j is one of the first n", {"n": n}, rule
    formula = "the block of j is one of n_random drawn for the block of i"
    for n_random in range(7):
        for seed in range(4):
            values = {"n_random": n_random, "seed": seed}
            yield "random_blocks", formula, values, mask.random_blocks(6, 6, n_random, seed)


def _local(block: int) -> Rule:
    return mask.causal() & mask.block_local(block)


def _picture_band(width: int) -> Rule:
    """Same row or same column, for slots that are pixels in reading order."""
    same_column = mask.Rule(lambda i, j: (i - j) % width == 0)
    return mask.causal() & (mask.block_local(width) | same_column)


def _labelled() -> Iterator[tuple[str, str, dict[str, int], Rule]]:
    formula = "j <= i and label(i) = label(j)"
    yield "causal & documents", formula, {}, mask.causal() & mask.documents(LABELS)
    for n in range(0, 13):
        rule = mask.causal() & mask.left_padding(np.array([n]))
        yield "causal & left_padding", "n <= j <= i", {"n": n}, rule
    formula = "a window, the first token, and random blocks"
    for w in range(0, 13, 2):
        rule = mask.longformer_window(w) | mask.global_tokens([0])
        yield "Big Bird", formula, {"w": w}, rule | mask.random_blocks(6, 6, 1, 0)


def flash(run: Run) -> Data:
    """Give the bytes that attention moves, for several lengths and blocks."""
    d_head = run.model.config.head_dim
    lengths = [2**n for n in range(7, 18)]
    blocks = [16, 32, 64, 128, 256]
    table = [[attention_io(n, d_head, b) for b in blocks] for n in lengths]
    return {
        "d_head": d_head,
        "lengths": lengths,
        "blocks": blocks,
        "naive": [[row["naive"] for row in line] for line in table],
        "flash_1": [[row["flash_1"] for row in line] for line in table],
        "flash_2": [[row["flash_2"] for row in line] for line in table],
    }
