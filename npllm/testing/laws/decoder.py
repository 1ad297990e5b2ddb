"""Laws of a whole decoder: ways to compute the same logits, which must agree."""

import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from npllm.errors import NpllmValueError
from npllm.ops import mask as rules
from npllm.testing.laws.arrays import Array, same_bits
from npllm.testing.laws.broken import Finding, LawBroken
from npllm.testing.laws.checks import Report, _strategies
from npllm.testing.laws.subjects import parameter_names
from npllm.testing.libraries import on_host

__all__ = ["FEATURES", "Decoder", "check_decoder", "decoder_findings"]

FEATURES = ("cache", "padding", "packing")
"""What can be switched off, one by one."""

N_CALL = 12

CACHED = "Logits of tokens that come one by one, with a cache, are those of the whole prompt."
CHUNKED = "Logits of a prompt in chunks, with a cache, are those of the whole prompt."
PACKED = "Documents packed in one row score as they do alone."
PADDED = "Padding, on the left or the right, changes no logit of a real token."
NEIGHBOURS = "Other tokens in the other rows of a batch change no bit of a row."
ALONE = "A row alone scores as it does in a batch."
FUTURE = "Later tokens change no bit of the logits before them."
AGAIN = f"{N_CALL} calls in a row return the same bits."
SHAPE = "Logits are a finite float array [n_batch, n_seq, n_vocab]."


@dataclass(frozen=True)
class Decoder:
    """A decoder and what a check needs to know of it.

    Parameters
    ----------
    fn : function (input_ids, *, attention_mask, cache) -> logits
    new_cache : function (n_batch) -> cache, optional
    packed : function (documents) -> function (input_ids, *, position_ids), optional
    n_vocab : int
    tolerance : float
        Of a difference, as a share of the largest absolute logit.
    """

    fn: Callable
    new_cache: Callable | None
    packed: Callable | None
    n_vocab: int
    tolerance: float

    def logits(self, ids: Array, **options: Any) -> Array:
        """Call the decoder; NumPy."""
        return np.asarray(on_host(self.fn(ids, **options)))


def check_decoder(
    fn: Callable,
    features: Iterable[str] | None = None,
    max_examples: int = 20,
    *,
    new_cache: Callable | None = None,
    packed: Callable | None = None,
    n_vocab: int | None = None,
    most: int = 24,
    tolerance: float = 1e-4,
    seed: int | None = None,
    shrink: bool = True,
) -> Report:
    """Check a whole decoder: ways to compute the same logits must agree.

    Cached = uncached, in chunks = whole, packed = separate, padded on either side = not padded;
    neighbours and later tokens change no bit; 12 calls in a row return the same bits.

    Parameters
    ----------
    fn : callable
        fn(input_ids [n_batch, n_seq], *, attention_mask=None, cache=None) -> logits [n_batch,
        n_seq, n_vocab], such as a Model.
    features : set of str, optional
        Of "cache", "padding", "packing".  None: "padding", and what the next two arguments allow.
    max_examples : int
    new_cache : function (n_batch) -> cache, optional
        Default: `fn.new_cache`, where there is one.
    packed : function (documents) -> function, optional
        Makes, of labels [n_batch, n_seq], a decoder under the document mask, called with
        `position_ids`.  Default: made of `fn.with_mask`, where there is one.
    n_vocab : int, optional
        Default: `fn.config.vocab_size`.
    most : int
        Tokens of the longest prompt.
    tolerance : float
        Of a difference, as a share of the largest absolute logit.  Of correct float32 decoders 5e-6
        was measured with trained weights (30 layers), 2e-5 with random ones (12 layers).
    seed, shrink
        As in `npllm.testing.check`.

    Returns
    -------
    report : Report
        `used` is the largest difference in tolerances.

    Raises
    ------
    LawBroken
        When a law is broken.
    NpllmValueError
        For an unknown feature, or one that the decoder gives no way to.
    """
    decoder = _decoder(fn, new_cache, packed, n_vocab, tolerance)
    on = _features(decoder, fn, features)
    seed = secrets.randbelow(2**32) if seed is None else seed
    strategies = _strategies()
    worst = _Worst()

    def hold(case: dict[str, Any]) -> Finding | None:
        worst.n += 1
        return next(decoder_findings(decoder, case, on, worst), None)

    cases = strategies.decoder_cases(most)
    found = strategies.first_broken(
        cases, hold, max_examples=max_examples, seed=seed, shrink=shrink
    )
    if found is not None:
        case, finding = found
        raise LawBroken(finding, case | {"tolerance": tolerance}, "decoder", fn, seed) from (
            finding.cause
        )
    left_out = tuple(sorted(set(FEATURES) - on))
    return Report("decoder", tuple(sorted(on)), left_out, worst.n, 0, worst.share, seed)


class _Worst:
    """Largest difference seen, in tolerances, and the number of cases."""

    share: float = 0.0
    n: int = 0


def _decoder(
    fn: Callable,
    new_cache: Callable | None,
    packed: Callable | None,
    n_vocab: int | None,
    tolerance: float,
) -> Decoder:
    """Fill in what the decoder says of itself."""
    n_vocab = n_vocab or getattr(getattr(fn, "config", None), "vocab_size", None)
    if n_vocab is None:
        raise NpllmValueError("n_vocab must be given, since the decoder has no config.vocab_size")
    if packed is None and hasattr(fn, "with_mask"):
        packed = _packed(fn)
    return Decoder(fn, new_cache or getattr(fn, "new_cache", None), packed, n_vocab, tolerance)


def _packed(fn: Any) -> Callable:
    """Make a decoder under a document mask of one that takes mask rules."""
    return lambda documents: fn.with_mask(fn.mask_rule() & rules.documents(documents))


def _features(decoder: Decoder, fn: Callable, asked: Iterable[str] | None) -> frozenset[str]:
    names = parameter_names(fn if not hasattr(fn, "forward") else fn.forward)
    can = {
        "cache": decoder.new_cache is not None,
        "packing": decoder.packed is not None,
        "padding": names is None or bool({"attention_mask", "**"} & names),
    }
    wanted = {name for name in FEATURES if can[name]} if asked is None else set(asked)
    impossible = sorted(name for name in wanted if not can.get(name))
    if impossible:
        raise NpllmValueError(
            f"features of a decoder must be of {', '.join(FEATURES)}; the cache needs new_cache, "
            f"packing needs packed, padding a parameter attention_mask; got "
            f"{', '.join(impossible)}"
        )
    return frozenset(wanted)


# ------------------------------------------------------------------ the laws


def decoder_findings(
    decoder: Decoder, case: dict[str, Any], on: frozenset[str], worst: Any
) -> Iterator[Finding]:
    """Yield the laws that a case breaks."""
    rng = np.random.default_rng(case["seed"])
    ids = rng.integers(0, decoder.n_vocab, (case["n_batch"], case["n_seq"]))
    try:
        whole = decoder.logits(ids)
        if whole.shape != (*ids.shape, decoder.n_vocab) or not np.isfinite(whole).all():
            wanted = [*ids.shape, decoder.n_vocab]
            yield Finding(SHAPE, f"got {whole.dtype} {list(whole.shape)} for {wanted}")
            return
        for law, found, wanted, place in _attempts(decoder, case, on, rng, ids, whole):
            yield from _difference(decoder, law, found, wanted, place, worst)
    except NotImplementedError as error:
        yield Finding(CACHED, f"it raised {type(error).__name__}: {error}", cause=error)


def _attempts(
    decoder: Decoder, case: dict, on: frozenset[str], rng: Any, ids: Array, whole: Array
) -> Iterator[tuple[str, Array, Array, str]]:
    """Yield (law, logits found, logits wanted, place) of each way to compute the same."""
    for n in range(N_CALL - 1):
        yield AGAIN, decoder.logits(ids), whole, f"call {n + 2}"
    yield from _others(decoder, rng, ids, whole)
    if "cache" in on:
        yield from _cached(decoder, case["chunks"], ids, whole)
    if "padding" in on:
        yield from _padded(decoder, case["n_pad"], rng, ids, whole)
    if "packing" in on and ids.shape[1] > 1:
        yield from _packed_attempts(decoder, case["cut"], ids)


def _others(decoder: Decoder, rng: Any, ids: Array, whole: Array) -> Iterator[tuple]:
    """Change what must not matter: the rows beside, and the tokens behind."""
    n_batch, n_seq = ids.shape
    if n_batch > 1:
        other = rng.integers(0, decoder.n_vocab, ids.shape)
        other[0] = ids[0]
        yield NEIGHBOURS, decoder.logits(other)[:1], whole[:1], "row 0"
        yield ALONE, decoder.logits(ids[:1]), whole[:1], "row 0"
    if n_seq > 1:
        keep = int(rng.integers(1, n_seq))
        other = ids.copy()
        other[:, keep:] = rng.integers(0, decoder.n_vocab, (n_batch, n_seq - keep))
        yield FUTURE, decoder.logits(other)[:, :keep], whole[:, :keep], f"the first {keep} tokens"


def _cached(decoder: Decoder, chunks: list[int], ids: Array, whole: Array) -> Iterator[tuple]:
    """Compute with a cache: one by one from a prefill, and in chunks."""
    n_seq = ids.shape[1]
    first = max(1, n_seq - N_CALL)
    for law, sizes in ((CACHED, [first] + [1] * (n_seq - first)), (CHUNKED, chunks)):
        cache, start = decoder.new_cache(len(ids)), 0  # type: ignore[misc]
        for size in sizes:
            part = slice(start, min(start + size, n_seq))
            if part.start >= n_seq:
                break
            found = decoder.logits(ids[:, part], cache=cache)
            yield law, found, whole[:, part], f"tokens {part.start} ... {part.stop - 1}"
            start = part.stop


def _padded(decoder: Decoder, n_pad: int, rng: Any, ids: Array, whole: Array) -> Iterator[tuple]:
    """Pad all rows, on the left and on the right, with tokens of any kind."""
    n_batch, n_seq = ids.shape
    padding = rng.integers(0, decoder.n_vocab, (n_batch, n_pad))
    ones, zeros = np.ones_like(ids), np.zeros_like(padding)
    for side in ("left", "right"):
        order = 1 if side == "right" else -1
        row = np.concatenate((ids, padding)[::order], axis=1)
        valid = np.concatenate((ones, zeros)[::order], axis=1)
        real = slice(n_pad, None) if side == "left" else slice(0, n_seq)
        found = decoder.logits(row, attention_mask=valid)[:, real]
        yield PADDED, found, whole, f"{n_pad} pad tokens on the {side}"


def _packed_attempts(decoder: Decoder, cut: int, ids: Array) -> Iterator[tuple]:
    """Two documents in one row, behind each other, against each alone."""
    n_seq = ids.shape[1]
    cut = min(max(cut, 1), n_seq - 1)
    labels = np.broadcast_to(np.arange(n_seq) >= cut, ids.shape).astype(np.int64)
    positions = np.concatenate([np.arange(cut), np.arange(n_seq - cut)])
    together = decoder.packed(labels)  # type: ignore[misc]
    found = np.asarray(on_host(together(ids, position_ids=positions)))
    for part in (slice(0, cut), slice(cut, n_seq)):
        alone = decoder.logits(ids[:, part])
        yield PACKED, found[:, part], alone, f"tokens {part.start} ... {part.stop - 1}"


def _difference(
    decoder: Decoder, law: str, found: Array, wanted: Array, place: str, worst: Any
) -> Iterator[Finding]:
    """Compare two ways: bit by bit, or within the tolerance, as the law says."""
    if found.shape != wanted.shape:
        yield Finding(law, f"logits of {place} are {list(found.shape)}, not {list(wanted.shape)}")
        return
    if law in (NEIGHBOURS, FUTURE, AGAIN):
        if not same_bits(found, wanted):
            n = np.count_nonzero(found != wanted)
            yield Finding(law, f"{n} of {found.size} logits of {place} differ")
        return
    got, right = found.astype(np.float64), wanted.astype(np.float64)
    size = np.abs(right).max() or 1.0
    share = np.abs(got - right).max() / size / decoder.tolerance
    if not share <= 1:
        says = f"logits of {place} differ by {share * decoder.tolerance:.3g} of the largest"
        yield Finding(law, says, used=float(share))
    worst.share = max(worst.share, float(share))
