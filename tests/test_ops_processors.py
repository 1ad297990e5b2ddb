"""npllm.ops.processors: which tokens may not follow.  Beside loops over Python lists in float64, and
beside the classes of Transformers.
"""

import numpy as np
import optional
import pytest
from close import close
from hypothesis import given
from hypothesis import strategies as st

from npllm import ops
from npllm.errors import NpllmValueError

torch = optional.module("torch")
processors = optional.module("transformers.generation.logits_process")

N_VOCAB = 7
tokens = st.lists(st.integers(-2, N_VOCAB + 2), max_size=4)
words = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=5)


@st.composite
def steps(draw):
    """Logits [n_batch, n_vocab], ids [n_batch, n_ctx] and the rows without their padding."""
    n_batch, n_ctx = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    logits = rng.standard_normal((n_batch, N_VOCAB))
    ids = rng.integers(0, draw(st.sampled_from([2, 3, N_VOCAB])), (n_batch, n_ctx))
    n_pad = rng.integers(0, n_ctx, n_batch) if draw(st.booleans()) else np.zeros(n_batch, int)
    ids[np.arange(n_ctx) < n_pad[:, None]] = -1
    return logits, ids, [row[n:].tolist() for row, n in zip(ids, n_pad, strict=True)]


def without(logits, excluded):
    """The oracle: -inf in each row at the ids of a list."""
    rows = [row.tolist() for row in logits]
    for row, ids in zip(rows, excluded, strict=True):
        for token in ids:
            row[token] = -np.inf
    return np.array(rows)


def ends_with(row, end):
    return len(end) <= len(row) and row[len(row) - len(end) :] == end


def in_vocabulary(ids):
    return [i for i in ids if 0 <= i < N_VOCAB]


@given(steps(), tokens)
def test_suppressed_tokens_are_excluded_and_no_others(step, suppressed):
    logits, _, rows = step
    want = without(logits, [in_vocabulary(suppressed)] * len(rows))
    close(ops.suppress_tokens(logits, suppressed), want, times=0)


@given(steps(), tokens, st.integers(0, 3), st.integers(0, 3))
def test_the_first_token_and_the_stop_ids_are_suppressed_in_their_time(step, ids, n_new, least):
    logits, _, rows = step
    fewer = without(logits, [in_vocabulary(ids)] * len(rows))
    begin = ops.begin_suppress_tokens(logits, ids, n_new)
    close(begin, fewer if n_new == 0 else logits, times=0)
    longer = ops.min_new_tokens(logits, ids, n_new, least)
    close(longer, fewer if n_new < least else logits, times=0)


@given(steps(), st.lists(st.integers(0, N_VOCAB - 1), min_size=1, max_size=3), st.integers(1, 3))
def test_the_last_token_is_a_forced_one(step, forced, n_left):
    logits, _, rows = step
    others = [i for i in range(N_VOCAB) if i not in forced]
    want = without(np.zeros_like(logits), [others] * len(rows)) if n_left == 1 else logits
    close(ops.forced_eos_token_id(logits, forced, n_left), want, times=0)


@given(steps(), st.integers(1, 5))
def test_no_run_of_tokens_comes_twice(step, size):
    logits, ids, rows = step
    excluded = []
    for row in rows:
        runs = [row[j : j + size] for j in range(len(row) - size + 1)]
        end = row[len(row) - size + 1 :] if size > 1 else []
        excluded.append([i for i in range(N_VOCAB) if len(row) >= size - 1 and [*end, i] in runs])
    close(ops.no_repeat_ngram_size(logits, ids, size), without(logits, excluded), times=0)


@given(steps(), words, st.lists(st.integers(0, N_VOCAB - 1), max_size=2))
def test_no_bad_word_is_completed(step, bad, eos):
    logits, ids, rows = step
    bad_ones = [word for word in bad if len(word) > 1 or word[0] not in eos]
    excluded = [[w[-1] for w in bad_ones if ends_with(row, w[:-1])] for row in rows]
    close(ops.bad_words_ids(logits, ids, bad, eos), without(logits, excluded), times=0)


@pytest.mark.parametrize("word", [[], [N_VOCAB], [0, -1]])
def test_words_that_cannot_be_are_refused(word):
    with pytest.raises(
        NpllmValueError, match="bad_words_ids must hold token ids below n_vocab = 7"
    ):
        ops.bad_words_ids(np.zeros((1, N_VOCAB)), np.zeros((1, 2), int), [word])


def test_values_that_cannot_be_are_refused():
    with pytest.raises(NpllmValueError, match="no_repeat_ngram_size must be at least 1, got 0"):
        ops.no_repeat_ngram_size(np.zeros((1, N_VOCAB)), np.zeros((1, 2), int), 0)
    with pytest.raises(NpllmValueError, match="forced_eos_token_id must be a token id below"):
        ops.forced_eos_token_id(np.zeros((1, N_VOCAB)), [N_VOCAB], 1)


# -------------------------------------------------------------------------- beside Transformers


def of_transformers(processor, ids, logits):
    """What a class of Transformers makes of the same ids and logits."""
    return processor(torch.tensor(ids), torch.tensor(logits)).numpy()


def of_steps_without_padding(step):
    return step[1].min() >= 0


unpadded = steps().filter(of_steps_without_padding)


@pytest.mark.live
@given(unpadded, st.integers(1, 5))
def test_ngrams_are_those_of_transformers(step, size):
    logits, ids, _ = step
    want = of_transformers(processors.NoRepeatNGramLogitsProcessor(size), ids, logits)
    close(ops.no_repeat_ngram_size(logits, ids, size), want, times=0)


@pytest.mark.live
@given(unpadded, words.filter(bool), st.lists(st.integers(0, N_VOCAB - 1), min_size=1, max_size=2))
def test_bad_words_are_those_of_transformers(step, bad, eos):
    logits, ids, _ = step
    if not any(word not in [[i] for i in eos] for word in bad):
        return  # Transformers refuses what leaves no word
    want = of_transformers(processors.NoBadWordsLogitsProcessor(bad, eos), ids, logits)
    close(ops.bad_words_ids(logits, ids, bad, eos), want, times=0)


@pytest.mark.live
@given(
    unpadded,
    st.lists(st.integers(0, N_VOCAB - 1), min_size=1, max_size=3),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_suppressing_and_forcing_is_that_of_transformers(step, chosen, n_new, least):
    logits, ids, _ = step
    n_prompt = max(ids.shape[1] - n_new, 0)
    n_new = ids.shape[1] - n_prompt
    suppress = processors.SuppressTokensLogitsProcessor(chosen)
    close(ops.suppress_tokens(logits, chosen), of_transformers(suppress, ids, logits), times=0)
    begin = processors.SuppressTokensAtBeginLogitsProcessor(chosen, n_prompt)
    want = of_transformers(begin, ids, logits)
    close(ops.begin_suppress_tokens(logits, chosen, n_new), want, times=0)
    longer = processors.MinNewTokensLengthLogitsProcessor(n_prompt, least, chosen)
    want = of_transformers(longer, ids, logits)
    close(ops.min_new_tokens(logits, chosen, n_new, least), want, times=0)
    for n_left in (1, 2):
        forced = processors.ForcedEOSTokenLogitsProcessor(ids.shape[1] + n_left, chosen)
        want = of_transformers(forced, ids, logits)
        close(ops.forced_eos_token_id(logits, chosen, n_left), want, times=0)
