"""blockwise_attention under every rule: both schedules, split keys, merged parts, and which blocks
are visited.
"""

import itertools

import numpy as np
import pytest
from close import close
from hypothesis import given, settings
from hypothesis import strategies as st
from seeds import draws
from strategies import compute_dtypes, seeds
from test_mask_rules import N_BATCH, N, any_rule, said

from npllm.cache import KVCache
from npllm.errors import NpllmValueError
from npllm.ops import attention, blockwise_attention, merge_attention, split_kv_attention
from npllm.ops.mask import ALL, SOME, Rule, band, bidirectional, causal, sliding_window

F64 = np.dtype("float64")
blocks = st.integers(1, 7)
schedules = st.sampled_from(["queries", "keys"])


@st.composite
def slots(draw, n):
    """Places of n tokens among the N: a range with or without gaps, or an array in any order."""
    step = draw(st.integers(1, max(1, N // n)))
    start = draw(st.integers(0, N - (n - 1) * step - 1))
    form = range(start, start + n * step, step)
    form = form[::-1] if draw(st.booleans()) else form
    return form if draw(st.booleans()) else np.random.default_rng(draw(seeds)).permutation(N)[:n]


@st.composite
def calls(draw, dtype=None):
    """(q, k, v, options, visible): a call of blockwise_attention with a rule, and the table of what
    that shows, from the formula.
    """
    n_kv_head, group, n_seq, n_ctx = (draw(st.integers(1, high)) for high in (2, 3, 12, 16))
    d_head, d_value, rng = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 4)),
        np.random.default_rng(draw(seeds)),
    )
    dtype = draw(compute_dtypes) if dtype is None else dtype
    q, k, v = (
        rng.standard_normal((N_BATCH, *shape)).astype(dtype)
        for shape in (
            (n_kv_head * group, n_seq, d_head),
            (n_kv_head, n_ctx, d_head),
            (n_kv_head, n_ctx, d_value),
        )
    )
    rule, says = draw(any_rule)
    options = {"mask": rule, "q_slots": draw(slots(n_seq)), "k_slots": draw(slots(n_ctx))}
    options |= {"softcap": 2.0} if draw(st.booleans()) else {}
    options |= {"scale": 0.7} if draw(st.booleans()) else {}
    visible = said(says, *([int(n) for n in options[name]] for name in ("q_slots", "k_slots")))
    return q, k, v, options, visible[:, None]


def with_table(options, visible):
    """The same options with a table in place of the rule and its slots."""
    return {name: x for name, x in options.items() if name in ("scale", "softcap")} | {
        "mask": visible
    }


# --------------------------------------------------------------------------------------------------------- equal to the definition


@given(calls(), blocks, blocks, schedules)
@settings(max_examples=draws(60, 150))
def test_any_rule_over_any_slots_and_blocks_equals_the_definition_with_the_full_table(
    call, block_q, block_k, outer
):
    q, k, v, options, visible = call
    y, lse = attention(q, k, v, return_lse=True, **with_table(options, visible))
    got, got_lse = blockwise_attention(
        q, k, v, return_lse=True, block_q=block_q, block_k=block_k, outer=outer, **options
    )
    close(got, y, times=4)
    close(got_lse, lse, times=8)
    close(attention(q, k, v, **options), y, times=4)


@given(calls(), blocks, blocks)
def test_both_schedules_give_the_same_bits(call, block_q, block_k):
    """A row meets the blocks of keys in the same order in both."""
    q, k, v, options, _ = call
    one, other = (
        blockwise_attention(
            q, k, v, return_lse=True, block_q=block_q, block_k=block_k, outer=outer, **options
        )
        for outer in ("queries", "keys")
    )
    close(one[0], other[0], times=0)
    close(one[1], other[1], times=0)


@given(calls(dtype=F64), schedules, seeds)
def test_a_bias_is_added_head_by_head_in_both_schedules(call, outer, seed):
    q, k, v, options, visible = call
    bias = np.random.default_rng(seed).standard_normal((*q.shape[:3], k.shape[2]))
    got = blockwise_attention(q, k, v, bias=bias, block_q=3, block_k=2, outer=outer, **options)
    close(got, attention(q, k, v, bias=bias, **with_table(options, visible)), times=4)


@given(any_rule, st.integers(1, 9), st.lists(st.integers(1, 6), min_size=1, max_size=6), seeds)
def test_a_windowed_cache_gives_what_all_keys_give(pair, window, steps, seed):
    """The cache hands out fewer and fewer of the slots; the rule sees where they stand."""
    rng, rule = np.random.default_rng(seed), pair[0] & sliding_window(window)
    steps = [n for n, total in zip(steps, itertools.accumulate(steps), strict=True) if total <= N]
    n = sum(steps)
    q, k, v = (rng.standard_normal((N_BATCH, heads, n, 3)) for heads in (4, 2, 2))
    cache, parts = KVCache(N_BATCH, 1, N + 1, window=window), []
    for stop, step in zip(itertools.accumulate(steps), steps, strict=True):
        new = slice(stop - step, stop)
        keys, values, k_slots = cache.append(0, k[:, :, new], v[:, :, new])
        parts.append(
            blockwise_attention(
                q[:, :, new],
                keys,
                values,
                mask=rule,
                q_slots=range(stop - step, stop),
                k_slots=k_slots,
                block_q=2,
                block_k=3,
            )
        )
        cache.advance(
            np.zeros((N_BATCH, step), int),
            np.arange(step),
            np.ones((N_BATCH, stop), bool),
            np.zeros(N_BATCH),
        )
    if parts:
        table = (
            said(pair[1], range(n), range(n))
            & (np.subtract.outer(np.arange(n), np.arange(n)) < window)
            & np.tri(n, dtype=bool)
        )
        close(np.concatenate(parts, axis=2), attention(q, k, v, mask=table[:, None]), times=4)


def test_an_unknown_schedule_raises():
    x = np.ones((1, 2, 3))
    with pytest.raises(NpllmValueError, match="outer must be one of queries, keys, got 'rows'"):
        blockwise_attention(x, x, x, outer="rows")


# -------------------------------------------------------------------------------------------------------------- split and merged


@given(calls(), st.integers(1, 20))
def test_split_keys_give_what_whole_keys_give_for_any_number_of_runs(call, n_split):
    q, k, v, options, visible = call
    y, lse = attention(q, k, v, return_lse=True, **with_table(options, visible))
    got, got_lse = split_kv_attention(q, k, v, n_split=n_split, return_lse=True, **options)
    close(got, y, times=8)
    close(got_lse, lse, times=8)
    close(split_kv_attention(q, k, v, n_split=n_split, **options), got, times=0)


@given(st.integers(1, 20), st.integers(1, 40))
def test_runs_differ_in_length_by_at_most_one_key(n_ctx, n_split):
    widths = []

    def visible(i, j):
        widths.append(j.shape[-1])
        return j <= i

    x = np.ones((1, n_ctx, 1))
    split_kv_attention(x, x, x, n_split=n_split, mask=visible)
    assert (sum(widths), len(widths)) == (n_ctx, min(n_split, n_ctx))
    assert max(widths) - min(widths) <= 1


@pytest.mark.parametrize("n_split", [0, -3])
def test_keys_are_split_into_at_least_one_run(n_split):
    x = np.ones((1, 2, 3))
    with pytest.raises(NpllmValueError, match=f"n_split must be at least 1, got {n_split}"):
        split_kv_attention(x, x, x, n_split=n_split)


@given(calls(), st.integers(1, 20))
def test_split_keys_take_a_table_as_well_as_a_rule(call, n_split):
    q, k, v, options, visible = call
    options = with_table(options, visible)
    close(
        split_kv_attention(q, k, v, n_split=n_split, **options),
        attention(q, k, v, **options),
        times=8,
    )
    options["mask"] = visible[..., :1]
    close(
        split_kv_attention(q, k, v, n_split=n_split, **options),
        attention(q, k, v, **options),
        times=8,
    )


@st.composite
def parts(draw):
    """Results over some sets of keys: y [n, heads, rows, d] and lse, where whole sets may have
    shown a row nothing.
    """
    rng, n, dtype = (
        np.random.default_rng(draw(seeds)),
        draw(st.integers(1, 6)),
        draw(compute_dtypes),
    )
    lse = rng.choice([-np.inf, -200.0, 0.0, 3.0, 300.0], (n, 2, 3)) + rng.standard_normal((n, 2, 3))
    return np.where(lse > -np.inf, 1.0, 0.0).astype(dtype)[..., None] * rng.standard_normal(
        (n, 2, 3, 4)
    ).astype(dtype), lse.astype(dtype)


def merged(y, lse, groups):
    """Merge each group by itself, and then the results."""
    pieces = [merge_attention(y[group], lse[group]) for group in groups]
    return merge_attention(*(np.stack(piece) for piece in zip(*pieces, strict=True)))


@given(parts(), st.data())
def test_parts_merge_to_the_same_in_any_grouping_and_order(part, data):
    y, lse = part
    order = data.draw(st.permutations(range(len(y))))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(y) - 1)))) | {0, len(y)})
    groups = [order[a:b] for a, b in itertools.pairwise(cuts)]
    whole, whole_lse = merge_attention(y, lse)
    got, got_lse = merged(y, lse, groups)
    close(got, whole, times=4)
    close(got_lse, whole_lse, times=4)


@given(parts())
def test_merged_parts_are_weighted_by_their_sums_of_exponentials(part):
    y, lse = (x.astype(np.float64) for x in part)
    got, got_lse = merge_attention(*part)
    desired_lse = np.logaddexp.reduce(lse, axis=0)
    finite = desired_lse > -np.inf
    share = np.exp(lse - np.where(finite, desired_lse, 0))
    close(got_lse, desired_lse, dtype=part[1].dtype, times=2)
    close(got, (share[..., None] * y).sum(axis=0), dtype=part[0].dtype, times=4)
    assert (got[~finite] == 0).all()


@given(parts())
def test_a_part_that_saw_nothing_changes_nothing_and_one_part_is_itself(part):
    y, lse = part
    nothing = np.zeros_like(y[:1]), np.full_like(lse[:1], -np.inf)
    for one, other in zip(
        merge_attention(y, lse),
        merge_attention(*map(np.concatenate, zip(part, nothing, strict=True))),
        strict=True,
    ):
        close(other, one, times=0)
    alone, alone_lse = merge_attention(y[:1], lse[:1])
    close(alone, y[0], times=0)
    close(alone_lse, lse[0], times=0)


def test_parts_come_back_in_the_dtype_of_y_and_lse_of_another_shape_raises():
    y, lse = merge_attention(np.ones((2, 3, 4), np.float16), np.zeros((2, 3), np.float32))
    assert (y.dtype, lse.dtype) == (np.float16, np.float32)
    with pytest.raises(NpllmValueError, match="lse must be"):
        merge_attention(np.ones((2, 3, 4)), np.zeros((2, 4)))


# ---------------------------------------------------------------------------------------------------------- which blocks are visited


def visits(rule, n, block_q, block_k, outer="queries", *, d=1):
    """Count (blocks visited, blocks whose mask is evaluated) while n queries attend to n keys, one
    head of width d.
    """
    evaluated, moved = [], []

    def visible(i, j):
        evaluated.append((i, j))
        return rule(i, j)

    x = np.zeros((1, n, d), np.float32)
    blockwise_attention(
        x,
        x,
        x,
        mask=Rule(visible, rule.bound),
        block_q=block_q,
        block_k=block_k,
        outer=outer,
        moved=moved.append,
    )
    once = (
        2 * -(-n // block_q) if outer == "queries" else -(-n // block_k)
    )  # what is moved whether anything is visited or not
    return len(moved) - once, len(evaluated)


def spans(n, size):
    return [(a, min(a + size, n) - 1) for a in range(0, n, size)]


@pytest.mark.slow
def test_a_window_of_2047_at_32768_visits_its_band_of_blocks_and_no_more():
    """Phi-3-mini-4k's window: queries a ... b meet keys a - 2046 ... b, whose blocks are counted by
    division.
    """
    n, w, block_q, block_k = 32768, 2047, 512, 1024
    first, last = (
        np.array([div(a, b) for a, b in spans(n, block_q)])
        for div in (lambda a, _: max(0, a - w + 1) // block_k, lambda _, b: b // block_k)
    )
    expected = int((last - first + 1).sum())
    assert expected == 1 + 1 + 2 + 2 + 60 * 3, (
        "three blocks of keys for every block of queries but the first four"
    )
    visited, evaluated = visits(sliding_window(w), n, block_q, block_k)
    assert visited == expected
    inside = sum(
        1 for a, b in spans(n, block_q) for c, e in spans(n, block_k) if e <= a and c > b - w
    )
    assert inside > 30 and evaluated == expected - inside, "where all is visible no mask is made"


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9), schedules)
def test_causal_visits_the_lower_triangle_of_blocks_only(n, block_q, block_k, outer):
    visited, evaluated = visits(causal(), n, block_q, block_k, outer)
    assert visited == sum(b // block_k + 1 for _, b in spans(n, block_q))
    assert evaluated == sum(
        1 for a, b in spans(n, block_q) for c, e in spans(n, block_k) if c <= b and e > a
    ), "the diagonal only"


@given(
    st.integers(1, 60),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(1, 9),
    st.integers(1, 9),
    schedules,
)
def test_a_band_visits_every_block_that_it_touches_and_no_other(
    n, before, after, block_q, block_k, outer
):
    distance = np.subtract.outer(np.arange(n), np.arange(n))
    touched = (distance <= before) & (distance >= -after)
    pairs = [
        touched[a : b + 1, c : e + 1] for a, b in spans(n, block_q) for c, e in spans(n, block_k)
    ]
    visited, evaluated = visits(band(before, after), n, block_q, block_k, outer)
    assert visited == sum(pair.any() for pair in pairs)
    assert evaluated == sum(pair.any() and not pair.all() for pair in pairs)


@given(st.integers(1, 40), blocks, blocks, schedules)
def test_where_all_is_visible_no_mask_is_evaluated(n, block_q, block_k, outer):
    assert visits(bidirectional(), n, block_q, block_k, outer) == (
        -(-n // block_q) * -(-n // block_k),
        0,
    )
    nothing = visits(~bidirectional(), n, block_q, block_k, outer)
    assert nothing == (0, 0)


def test_slots_decide_what_is_visited_and_not_the_order_of_the_arrays():
    """Keys that stand in slots 100 ... are ahead of queries in 0 ...; a gap in a range is no reason
    to visit.
    """
    asked = []
    rule = Rule(lambda i, j: j <= i, lambda *block: asked.append(block) or causal().bound(*block))
    x = np.ones((1, 4, 2))
    close(
        blockwise_attention(x, x, x, mask=rule, q_slots=range(4), k_slots=range(106, 98, -2)),
        np.zeros_like(x),
    )
    assert asked == [(0, 3, 100, 106)]
    blockwise_attention(
        x, x, x, mask=rule, q_slots=np.array([7, 5, 9, 6]), k_slots=np.array([3, 0, 2, 1])
    )
    assert asked[1:] == [(5, 9, 0, 3)]
    assert (causal().bound(*asked[0]), causal().bound(*asked[1])) == (0, ALL)


def test_a_function_without_a_bound_is_evaluated_on_every_block():
    seen = []
    x = np.ones((1, 6, 2))
    blockwise_attention(
        x, x, x, mask=lambda i, j: seen.append((i.shape, j.shape)) or (j <= i), block_q=4, block_k=3
    )
    assert seen == [((4, 1), (1, 3))] * 2 + [((2, 1), (1, 3))] * 2
    assert Rule(lambda i, j: j <= i).bound(0, 1, 5, 6) == SOME
