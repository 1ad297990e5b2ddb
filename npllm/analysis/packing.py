"""Packing: several documents in one row, so that no computation is spent on padding."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from npllm import ops
from npllm.analysis.score import log_probs_of
from npllm.arguments import check_ids
from npllm.arrays import to_numpy
from npllm.errors import NpllmValueError
from npllm.model import Model
from npllm.models import rope

__all__ = ["pack", "score_packed", "utilisation"]

Array = Any
Rows = list[list[int]]  # the documents of each row, by number

DEFAULT_CAPACITY = 512  # least tokens of a row, where the caller names none


def pack(lengths: Sequence[int], capacity: int) -> Rows:
    """Assign documents to rows by first-fit decreasing.

    Documents are taken in order of decreasing length; each goes into the first row with enough free
    slots.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each document, at least 1.
    capacity : int
        Tokens of a row.

    Returns
    -------
    rows : list of list of int
        The documents of each row, by number, in order.

    Raises
    ------
    NpllmValueError
        When a document is empty or longer than a row.

    Notes
    -----
    Uses at most 11/9 of the minimum number of rows, plus 6/9.

    Source: "Near-Optimal Bin Packing Algorithms" (Johnson 1973); "Efficient Sequence Packing"
    (Krell et al. 2021).
    """
    _check_lengths(lengths, capacity)
    rows: Rows = []
    free: list[int] = []  # free slots of each row
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        row = next((row for row, n in enumerate(free) if n >= lengths[number]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(capacity)
        rows[row].append(number)
        free[row] -= lengths[number]
    return rows


def _check_lengths(lengths: Sequence[int], capacity: int) -> None:
    for number, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise NpllmValueError(
                f"document {number} must have 1 ... capacity = {capacity} tokens, got {length}"
            )


def utilisation(rows: Rows, lengths: Sequence[int]) -> float:
    """Compute the share of slots that hold tokens, when all rows have the length of the longest."""
    filled = [sum(lengths[number] for number in row) for row in rows]
    return sum(filled) / (len(filled) * max(filled)) if filled else 1.0


def score_packed(
    model: Model,
    documents: Sequence[Any],
    *,
    capacity: int | None = None,
    n_rows: int = 4,
) -> list[Array]:
    """Compute the log-probability of each token of many documents, several in a row.

        score[t] = log softmax(logits after tokens 0 ... t-1)[token t],   t = 1 ... n - 1

    Parameters
    ----------
    model : Model
    documents : list of list of int, or list of str
        Token ids, or texts.
    capacity : int, optional
        Tokens of a row; default: the longest document, at least 512 where the context allows.
    n_rows : int
        Rows of one forward pass.

    Returns
    -------
    scores : list of array [n - 1]
        float64, in the order of the documents; the first token has no score.

    Raises
    ------
    NpllmValueError
        When a document is empty or does not fit the context, or a logit is NaN or +inf.

    Notes
    -----
    Each document gets its own positions (0 ...) and sees only itself (`ops.mask.documents`), so its
    scores equal those it has alone.  This holds for mask rules of the distance i - j (causal,
    windows, bands, strides).  A rule of absolute slots (fixed, block_local, global_tokens,
    random_blocks, prefix_lm) refers to other slots in a packed row.

    Source: "Efficient Sequence Packing without Cross-contamination" (Krell et al. 2021).
    """
    n_layer = model.config.num_hidden_layers
    rules = [model.mask_rule(layer) for layer in range(n_layer)]  # an encoder raises here
    ids = [_document_ids(model, document) for document in documents]
    lengths = [len(document) for document in ids]
    if capacity is None:
        capacity = min(max([DEFAULT_CAPACITY, *lengths]), model.config.context_length)
    _check_lengths(lengths, capacity)
    variants = [rope.frequency_choice(model.config, length) for length in lengths]
    rows = _pack_by_variant(lengths, capacity, variants)
    for document in ids:
        check_ids("document", [document], model.config.vocab_size, "vocab_size")
    scores: list[Array] = [None] * len(ids)
    for start in range(0, len(rows), n_rows):
        for number, score in _score_rows(model, rules, rows[start : start + n_rows], ids):
            scores[number] = score
    return scores


def _document_ids(model: Model, document: Any) -> list[int]:
    """Token ids of a text or of ids."""
    if isinstance(document, str):
        return model.require_tokenizer().encode(document)
    return [int(i) for i in document]


def _pack_by_variant(lengths: list[int], capacity: int, variants: list[Any]) -> Rows:
    """Pack documents that use the same RoPE frequencies: a row has one set of them, and longrope
    chooses it by the length.
    """
    rows: Rows = []
    for variant in sorted(set(variants)):
        numbers = [number for number, other in enumerate(variants) if other == variant]
        packed = pack([lengths[number] for number in numbers], capacity)
        rows += [[numbers[n] for n in row] for row in packed]
    return rows


def layout(rows: Rows, ids: list[list[int]]) -> tuple[Array, Array, Array]:
    """Write documents into rows.

    Returns
    -------
    tokens, positions, labels : integer array [n_batch, n_seq]
        Token ids; positions, which restart at each document; 1 ... for the documents of a row, 0
        for its unused slots.
    """
    n_seq = max(sum(len(ids[number]) for number in row) for row in rows)
    tokens, positions, labels = np.zeros((3, len(rows), n_seq), dtype=np.int64)
    for r, row in enumerate(rows):
        for label, (number, slots) in enumerate(_spans(row, ids), 1):
            tokens[r, slots] = ids[number]
            positions[r, slots] = np.arange(len(ids[number]))
            labels[r, slots] = label
    return tokens, positions, labels


def _spans(row: list[int], ids: list[list[int]]) -> Iterator[tuple[int, slice]]:
    """Yield each document of a row with its slots."""
    start = 0
    for number in row:
        stop = start + len(ids[number])
        yield number, slice(start, stop)
        start = stop


def _score_rows(
    model: Model, rules: list[Any], rows: Rows, ids: list[list[int]]
) -> Iterator[tuple[int, Array]]:
    """Run packed rows through the model; yield (document, its scores)."""
    tokens, positions, labels = layout(rows, ids)
    separate = ops.mask.documents(model.to_backend(labels))
    packed = model.with_mask([rule & separate for rule in rules])
    hidden = packed.model(tokens, position_ids=positions)
    for r, row in enumerate(rows):
        for number, slots in _spans(row, ids):
            logits = to_numpy(model.lm_head(hidden[r, slots.start : slots.stop - 1, :]))
            targets = np.array(ids[number][1:], np.int64)
            yield number, log_probs_of(logits.astype(np.float64), targets)
