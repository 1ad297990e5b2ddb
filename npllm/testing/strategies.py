"""Cases drawn by Hypothesis: sizes by axis name, features that can be switched off one by one.

A case is a dict of plain values: what it holds is written in the message of a failure, and
`npllm.testing.replay` makes the same arrays of it without Hypothesis.  Lengths lie around multiples
of the tiles; sizes of values are those on which implementations fail.  This is the only file of the
package that imports Hypothesis.
"""

from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import strategies as st

from npllm.testing.laws.arrays import LAYOUTS
from npllm.testing.laws.positions import N_ORIGINAL

__all__ = [
    "attention_cases",
    "first_broken",
    "lengths",
    "linear_cases",
    "rms_norm_cases",
    "rope_cases",
    "sampler_cases",
    "swiglu_cases",
]

Features = frozenset[str]
Tiles = tuple[int, ...]
Cases = st.SearchStrategy[dict[str, Any]]

MOST_SHRINKS = 400  # trials after the first failure

seeds = st.integers(0, 2**16)
widths = st.sampled_from([8, 4, 16, 24, 32, 64])


def lengths(tiles: Tiles, most: int = 300) -> st.SearchStrategy[int]:
    """Draw a length: small, or one less, equal to, or one more than a multiple of a tile.

    Parameters
    ----------
    tiles : tuple of int
    most : int
        Longer ones are left out.
    """
    around = [
        tile * times + more for tile in tiles for times in (1, 2, 3) for more in (-1, 0, 1, 8)
    ]
    return st.integers(1, 8) | st.sampled_from(sorted(n for n in set(around) if 0 < n <= most))


def _switch(draw: Callable, is_on: bool) -> bool:
    return bool(is_on and draw(st.booleans()))


def _choice(draw: Callable, is_on: bool, values: list[Any]) -> Any:
    """None, or a value where the feature is on."""
    return draw(st.sampled_from([None, *values])) if is_on else None


@st.composite
def attention_cases(
    draw: Callable,
    features: Features,
    tiles: Tiles = (16, 64),
    dtype: str = "float32",
    sizes: tuple[str, ...] = ("plain", "huge", "equal", "cancelling", "subnormal"),
) -> dict[str, Any]:
    """Draw a case of attention: what `npllm.testing.laws.attention` makes arrays of."""
    n_batch, n_kv_head = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    group = draw(st.integers(1, 3)) if "gqa" in features else 1
    n_seq = draw(lengths(tiles, 130))
    n_past = draw(lengths(tiles, 200)) if _switch(draw, "cache" in features) else 0
    n_ctx = n_seq + n_past
    is_padded = _switch(draw, "padding" in features)
    pads = st.integers(0, n_ctx - 1)
    slots = _choice(draw, "slots" in features, ["ring", "unused rows"])
    slots = "ring" if slots and not n_past else slots
    poison = "poison" in features
    return {
        "n_batch": n_batch,
        "n_head": n_kv_head * group,
        "n_kv_head": n_kv_head,
        "n_seq": n_seq,
        "n_ctx": n_ctx,
        "d_head": draw(widths),
        "window": _choice(draw, "window" in features, [1, 4, max(1, n_ctx // 2)]),
        "padding": [draw(pads) if is_padded else 0 for _ in range(n_batch)],
        "bias": _switch(draw, "bias" in features),
        "softcap": _choice(draw, "softcap" in features, [30.0, 2.0]),
        "scale": _choice(draw, "scale" in features, [0.3, 0.05]),
        "slots": slots,
        "lse": _switch(draw, "lse" in features),
        "hidden": draw(st.sampled_from(["same", "large", *(["NaN"] if poison else [])])),
        "poison": poison,
        "size": draw(st.sampled_from(sizes)),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "dtype": dtype,
        "seed": draw(seeds),
    }


@st.composite
def rope_cases(
    draw: Callable, features: Features, tiles: Tiles = (16, 64), dtype: str = "float32"
) -> dict[str, Any]:
    """Draw a case of a rotation: what `npllm.testing.laws.positions` makes arrays of.

    Half of the cases lie where LongRoPE changes its factors: the longest call without the long
    ones, the shortest with them, one in the middle.
    """
    n_seq, starts = draw(lengths(tiles, 70)), [0]
    starts += [1, 300] if "cache" in features else []
    starts += [15962, 70001] if "long" in features else []
    is_across = _switch(draw, {"factors", "long"} <= set(features))
    across = [N_ORIGINAL - n_seq + n for n in (0, 1, (n_seq + 1) // 2)]
    return {
        "n_batch": draw(st.integers(1, 2)),
        "n_head": draw(st.integers(1, 3)),
        "n_seq": n_seq,
        "d_head": draw(st.sampled_from([8, 16, 20, 32, 64, 96])),
        "start": draw(st.sampled_from(across if is_across else starts)),
        "base": draw(st.sampled_from([10000.0, 5e5])),
        "partial": _switch(draw, "partial" in features),
        "magnitude": _switch(draw, "magnitude" in features),
        "factors": is_across or _switch(draw, "factors" in features),
        "padding": _switch(draw, "padding" in features),
        "packing": _switch(draw, "packing" in features and not is_across),
        "size": draw(st.sampled_from(["plain", "huge", "equal", "subnormal"])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "dtype": dtype,
        "seed": draw(seeds),
    }


@st.composite
def rms_norm_cases(
    draw: Callable, _: Features, tiles: Tiles = (16, 64), dtype: str = "float32"
) -> dict[str, Any]:
    """Draw a case of RMSNorm."""
    sizes = ["plain", "huge", "equal", "cancelling", "subnormal", "zeros"]
    return {
        "n_row": draw(st.integers(1, 6)),
        "d_model": draw(lengths(tiles)),
        "eps": draw(st.sampled_from([1e-5, 1e-6, 1e-3])),
        "size": draw(st.sampled_from(sizes)),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "dtype": dtype,
        "seed": draw(seeds),
    }


@st.composite
def linear_cases(
    draw: Callable, features: Features, tiles: Tiles = (16, 64), dtype: str = "float32"
) -> dict[str, Any]:
    """Draw a case of a linear map."""
    return {
        "n_row": draw(st.integers(1, 6) | lengths(tiles, 70)),
        "d_in": draw(lengths(tiles)),
        "d_out": draw(lengths(tiles, 70)),
        "bias": _switch(draw, "bias" in features),
        "size": draw(st.sampled_from(["plain", "huge", "equal", "cancelling", "subnormal"])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "dtype": dtype,
        "seed": draw(seeds),
    }


@st.composite
def swiglu_cases(
    draw: Callable, _: Features, tiles: Tiles = (16, 64), dtype: str = "float32"
) -> dict[str, Any]:
    """Draw a case of the gated product."""
    return {
        "n_row": draw(st.integers(1, 6)),
        "d_ff": draw(lengths(tiles)),
        "size": draw(st.sampled_from(["plain", "huge", "equal", "subnormal"])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "dtype": dtype,
        "seed": draw(seeds),
    }


@st.composite
def qkv_cases(
    draw: Callable, _: Features, tiles: Tiles = (16, 64), dtype: str = "float32"
) -> dict[str, Any]:
    """Draw a case of a fused projection."""
    n_kv_head = draw(st.integers(1, 3))
    return {
        "n_seq": draw(lengths(tiles, 20)),
        "n_head": n_kv_head * draw(st.integers(1, 3)),
        "n_kv_head": n_kv_head,
        "d_head": draw(st.sampled_from([4, 8, 16])),
        "d_in": draw(lengths(tiles, 70)),
        "size": draw(st.sampled_from(["plain", "cancelling"])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "dtype": dtype,
        "seed": draw(seeds),
    }


@st.composite
def embed_cases(
    draw: Callable, _: Features, tiles: Tiles = (16, 64), dtype: str = "float32"
) -> dict[str, Any]:
    """Draw a case of a table of embeddings."""
    return {
        "n_row": draw(st.integers(1, 6)),
        "n_vocab": draw(lengths(tiles, 70)),
        "d_model": draw(lengths(tiles, 70)),
        "size": draw(st.sampled_from(["plain", "huge", "subnormal"])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "dtype": dtype,
        "seed": draw(seeds),
    }


@st.composite
def sampler_cases(draw: Callable, features: Features, u: bool = False) -> dict[str, Any]:
    """Draw a case of a sampler: logits with ties, and options that meet their boundaries."""
    return {
        "n_row": draw(st.integers(1, 16)),
        "n_vocab": draw(st.integers(2, 16)),
        "temperature": _choice(draw, "temperature" in features, [2.0, 0.5] * 2),
        "top_k": _choice(draw, "top_k" in features, [None, 2, 4, 12]),
        "top_p": _choice(draw, "top_p" in features, [0.5, 0.75, 0.875] * 2),
        "min_p": _choice(draw, "min_p" in features, [0.25, 0.3, 0.05] * 2),
        "repetition_penalty": _choice(draw, "repetition_penalty" in features, [1.3]),
        "size": draw(st.sampled_from(["plain", "flat", "flat", "dyadic", "equal"])),
        "u": u,
        "seed": draw(seeds),
    }


@st.composite
def text_cases(draw: Callable, _: Features) -> dict[str, Any]:
    """Draw a case of a stream of text."""
    return {
        "n_token": draw(st.integers(1, 8)),
        "split": draw(st.booleans()),
        "seed": draw(seeds),
    }


@st.composite
def decoder_cases(draw: Callable, most: int = 24) -> dict[str, Any]:
    """Draw a case of a decoder: a prompt, its chunks, its padding, where it is cut."""
    n_seq = draw(st.integers(1, most))
    return {
        "n_batch": draw(st.integers(1, 3)),
        "n_seq": n_seq,
        "chunks": draw(st.lists(st.integers(1, 7), min_size=n_seq, max_size=n_seq)),
        "n_pad": draw(st.integers(1, 5)),
        "cut": draw(st.integers(1, most)),
        "seed": draw(seeds),
    }


# ------------------------------------------------------------------ the search


class _Broken(Exception):
    def __init__(self, case: dict[str, Any], finding: Any) -> None:
        super().__init__()
        self.case, self.finding = case, finding


def first_broken(
    cases: Cases,
    examine: Callable[[dict[str, Any]], Any],
    *,
    max_examples: int,
    seed: int,
    shrink: bool = True,
) -> tuple[dict[str, Any], Any] | None:
    """Search for a case that breaks a law, and shrink it.

    Parameters
    ----------
    cases : strategy
    examine : function (case) -> finding or None
    max_examples : int
    seed : int
        The same seed draws the same cases.
    shrink : bool
        Return the smallest case that breaks a law, not the first.

    Returns
    -------
    found : tuple of case and finding, or None
    """
    known: dict[str, Any] = {}  # a function that is not deterministic is called once a case
    first: list[int] = []  # number of cases that were known at the first failure

    def hold(case: dict[str, Any]) -> None:
        key = repr(case)
        if key not in known:
            is_over = bool(first) and len(known) - first[0] > MOST_SHRINKS
            known[key] = None if is_over else examine(case)
        if known[key] is not None:
            first.append(len(known))
            raise _Broken(case, known[key])

    phases = [hypothesis.Phase.generate] + [hypothesis.Phase.shrink] * shrink
    quiet = hypothesis.settings(
        max_examples=max_examples,
        database=None,
        deadline=None,
        phases=phases,
        derandomize=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        verbosity=hypothesis.Verbosity.quiet,
        report_multiple_bugs=False,
        print_blob=False,
    )
    search = hypothesis.seed(seed)(quiet(hypothesis.given(case=cases)(hold_case(hold))))
    try:
        search()
    except _Broken as broken:
        return broken.case, broken.finding
    return None


def hold_case(hold: Callable) -> Callable:
    """Give a function the one argument that Hypothesis fills."""

    def inner(case: dict[str, Any]) -> None:
        hold(case)

    return inner


CASES: dict[str, Callable[..., Cases]] = {
    "attention": attention_cases,
    "rope": rope_cases,
    "rms_norm": rms_norm_cases,
    "linear": linear_cases,
    "lm_head": linear_cases,
    "swiglu": swiglu_cases,
    "qkv_projection": qkv_cases,
    "embed": embed_cases,
    "sampler": sampler_cases,
    "detokenize": text_cases,
}
"""Operation -> function (features, ...) -> strategy."""
