"""Packing: several documents in one row, so that no computation is spent on padding."""

import numpy as np

from npllm import ops
from npllm.arrays import to_numpy
from npllm.decision import FROM_MODEL, check_scores
from npllm.errors import NpllmValueError
from npllm.models import rope

__all__ = ["pack", "score_packed", "utilisation"]


def pack(lengths, capacity):
    """Put documents into as few rows as first-fit decreasing finds.

    The longest document comes first; each goes into the first row that still has room for it.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each document, at least 1.
    capacity : int
        Tokens of a row.

    Returns
    -------
    rows : list of list of int
        Which documents stand in each row, in order.

    Raises
    ------
    NpllmValueError
        When a document is empty or longer than a row.

    Notes
    -----
    At most 11/9 of the best number of rows, plus 6/9.

    Source: "Near-Optimal Bin Packing Algorithms" (Johnson 1973); "Efficient Sequence Packing"
    (Krell et al. 2021).
    """
    _check_lengths(lengths, capacity)
    rows, room = [], []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        fits = next((row for row, left in enumerate(room) if left >= lengths[number]), None)
        if fits is None:
            rows.append([])
            room.append(capacity)
            fits = len(rows) - 1
        rows[fits].append(number)
        room[fits] -= lengths[number]
    return rows


def _check_lengths(lengths, capacity):
    for number, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise NpllmValueError(
                f"document {number} must have 1 ... capacity = {capacity} tokens, got {length}"
            )


def utilisation(rows, lengths):
    """Tell which part of the computed slots holds tokens, when every row is as long as the longest
    one.
    """
    filled = [sum(lengths[number] for number in row) for row in rows]
    return sum(filled) / (len(filled) * max(filled)) if filled else 1.0


def score_packed(model, documents, *, capacity=None, n_rows=4):
    """Score documents token by token, several to a row: the log-probability of each token after
    those before it.

        score[t] = log softmax(logits after tokens 0 ... t-1)[token t],   t = 1 ... n - 1

    Parameters
    ----------
    model : Model
    documents : list of list of int, or list of str
        Token ids, or texts.
    capacity : int, optional
        Tokens of a row; default: the longest document, at least 512.
    n_rows : int
        Rows that are computed at a time.

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
    Each document gets its own positions (0 ...) and sees only itself (`ops.mask.documents`), so the
    scores are those it has alone.  That holds for mask rules of the distance i - j (causal,
    windows, bands, strides); a rule that goes by absolute slots (fixed, block_local, global_tokens,
    random_blocks, prefix_lm) means other slots in a packed row.

    Source: "Efficient Sequence Packing without Cross-contamination" (Krell et al. 2021).
    """
    rules = [
        model.mask_rule(layer) for layer in range(model.config.num_hidden_layers)
    ]  # refused by an encoder
    ids = [
        model.require_tokenizer().encode(d) if isinstance(d, str) else [int(i) for i in d]
        for d in documents
    ]
    lengths = list(map(len, ids))
    capacity = (
        min(max([512, *lengths]), model.config.context_length) if capacity is None else capacity
    )
    _check_lengths(lengths, capacity)
    rows = _pack_alike(
        lengths, capacity, [rope.frequency_choice(model.config, length) for length in lengths]
    )
    scores = [None] * len(ids)
    for start in range(0, len(rows), n_rows):
        for number, score in _score_rows(model, rules, rows[start : start + n_rows], ids):
            scores[number] = score
    return scores


def _pack_alike(lengths, capacity, choices):
    """Pack documents by themselves that use the same RoPE frequencies: a row has one set, and
    longrope goes by the length.
    """
    rows = []
    for choice in sorted(set(choices)):
        alike = [number for number, other in enumerate(choices) if other == choice]
        rows += [
            [alike[n] for n in row] for row in pack([lengths[number] for number in alike], capacity)
        ]
    return rows


def layout(rows, ids):
    """Lay documents out in rows: token ids, positions that restart, and a label for each document
    (0 for the empty rest).

    Returns
    -------
    tokens, positions, labels : integer array [n_batch, n_seq]
    """
    n_seq = max(sum(len(ids[number]) for number in row) for row in rows)
    tokens, positions, labels = np.zeros((3, len(rows), n_seq), dtype=np.int64)
    for r, row in enumerate(rows):
        start = 0
        for label, number in enumerate(row, 1):
            stop = start + len(ids[number])
            tokens[r, start:stop], positions[r, start:stop], labels[r, start:stop] = (
                ids[number],
                np.arange(stop - start),
                label,
            )
            start = stop
    return tokens, positions, labels


def _score_rows(model, rules, rows, ids):
    """Run some packed rows through the model; yield (document, its scores)."""
    tokens, positions, labels = layout(rows, ids)
    apart = ops.mask.documents(model.to_backend(labels))
    packed = model.with_mask([rule & apart for rule in rules])
    hidden = packed.model(tokens, position_ids=positions)
    for r, row in enumerate(rows):
        start = 0
        for number in row:
            stop = start + len(ids[number])
            logits = to_numpy(model.lm_head(hidden[r, start : stop - 1, :])).astype(np.float64)
            check_scores(logits, "the model's logits", FROM_MODEL)
            largest = logits.max(axis=-1, keepdims=True) if stop - start > 1 else 0.0
            log_sum = np.log(np.exp(logits - largest).sum(axis=-1)) + np.squeeze(largest)
            yield number, logits[np.arange(stop - start - 1), ids[number][1:]] - log_sum
            start = stop
