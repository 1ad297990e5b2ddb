"""attention_weights, attention and blockwise_attention: the definition beside a loop, and the
blockwise form beside the definition.
"""

import itertools
import re

import numpy as np
import oracles
import pytest
from close import close
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOATS, attention_calls, compute_dtypes, dtypes, normal

from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.ops import attention, attention_weights, blockwise_attention
from npllm.ops.mask import Rule, causal, padding, sliding_window

F32, F64 = np.dtype("float32"), np.dtype("float64")
both = pytest.mark.parametrize("op", [attention, blockwise_attention])
blocks = st.integers(1, 5)


def compute_dtype(*arrays):
    return F64 if any(x is not None and x.dtype == F64 for x in arrays) else F32


# --------------------------------------------------------------------------------------------- against a loop over queries and keys


@given(attention_calls(), st.data())
@both
def test_attention_equals_the_loop_over_queries_and_keys(op, call, data):
    sizes = (
        {"block_q": data.draw(blocks), "block_k": data.draw(blocks)}
        if op is blockwise_attention
        else {}
    )
    y, lse = op(call.q, call.k, call.v, return_lse=True, **call.options, **sizes)
    desired, desired_lse, _ = oracles.attention(call.q, call.k, call.v, call.visible, **call.scores)
    close(y, desired, dtype=call.q.dtype, times=4)
    close(
        lse,
        desired_lse,
        dtype=compute_dtype(call.q, call.k, call.v, call.options.get("bias")),
        times=8,
    )


@given(attention_calls())
def test_weights_equal_the_loop_over_queries_and_keys(call):
    weights = attention_weights(call.q, call.k, **call.options)
    close(
        weights,
        oracles.attention(call.q, call.k, call.v, call.visible, **call.scores)[2],
        dtype=call.q.dtype,
        times=4,
    )


@given(attention_calls(), blocks, blocks)
def test_blockwise_equals_the_definition_for_any_block_sizes(call, block_q, block_k):
    y, lse = attention(call.q, call.k, call.v, return_lse=True, **call.options)
    got, got_lse = blockwise_attention(
        call.q, call.k, call.v, return_lse=True, block_q=block_q, block_k=block_k, **call.options
    )
    close(got, y, times=4)
    close(got_lse, lse, times=8)
    close(blockwise_attention(call.q, call.k, call.v, **call.options), y, times=4)


# --------------------------------------------------------------------------------------------------------------------------- laws


@given(attention_calls(dtype=F64))
def test_weights_of_a_row_sum_to_one_or_see_nothing(call):
    weights = attention_weights(call.q, call.k, **call.options)
    bias = np.broadcast_to(call.options.get("bias", np.float64(0)), call.visible.shape)
    sees = (call.visible & (bias > -np.inf)).any(axis=-1)
    assert (weights >= 0).all()
    close(weights.sum(axis=-1), sees.astype(F64))
    close((weights != 0) & ~call.visible, np.zeros(weights.shape, bool))


@given(attention_calls(dtype=F64))
@both
def test_attention_is_the_mean_of_the_values_by_the_weights(op, call):
    weights = attention_weights(call.q, call.k, **call.options)
    values = np.repeat(call.v, call.q.shape[-3] // call.v.shape[-3], axis=-3)
    close(
        op(call.q, call.k, call.v, **call.options),
        np.einsum("...ij,...jd->...id", weights, values),
        times=4,
    )


@both
@pytest.mark.parametrize("name", FLOATS)
def test_a_row_without_a_visible_key_is_zero_and_its_lse_minus_infinity(op, name):
    q, k, v = (np.ones(shape, FLOATS[name]) for shape in [(2, 3, 4), (1, 5, 4), (1, 5, 2)])
    for options in (
        {"mask": np.zeros((3, 5), bool)},
        {"mask": ~(causal() | ~causal())},
        {"bias": np.full((3, 5), -np.inf, F32)},
        {"mask": Rule(lambda i, j: (i != i) & (j != j))},
    ):
        y, lse = op(q, k, v, return_lse=True, **options)
        close(y, np.zeros((2, 3, 2), FLOATS[name]))
        close(lse, np.full((2, 3), -np.inf, compute_dtype(q)))
        close(attention_weights(q, k, **options), np.zeros((2, 3, 5), FLOATS[name]))


@given(st.data(), compute_dtypes, st.integers(1, 3), st.integers(1, 3))
@both
def test_grouped_heads_are_repeated_heads(op, data, dtype, n_kv_head, group):
    q = data.draw(normal((2, n_kv_head * group, 4, 3), dtype))
    k, v = (
        data.draw(normal((2, n_kv_head, 5, 3), dtype)),
        data.draw(normal((2, n_kv_head, 5, 2), dtype)),
    )
    every_head = op(q, np.repeat(k, group, axis=1), np.repeat(v, group, axis=1), mask=causal())
    close(op(q, k, v, mask=causal()), every_head)


@given(st.data(), st.permutations(range(6)))
@both
def test_the_order_of_the_keys_does_not_matter(op, data, order):
    q, k, v = (
        data.draw(normal((2, 3, 4), F64)),
        data.draw(normal((1, 6, 4), F64)),
        data.draw(normal((1, 6, 2), F64)),
    )
    slots = np.arange(6)
    shuffled = op(q, k[:, order], v[:, order], mask=sliding_window(3), k_slots=slots[order])
    close(shuffled, op(q, k, v, mask=sliding_window(3), k_slots=slots), times=4)


@both
@pytest.mark.parametrize("n", [1, 2, 7])
def test_a_sequence_told_backwards_gives_the_same_answers_backwards(op, n):
    q, k, v = (np.random.default_rng(0).standard_normal((2, n, 3)) for _ in range(3))
    back = range(n - 1, -1, -1)
    sizes = {"block_q": 2, "block_k": 3} if op is blockwise_attention else {}
    y = op(q[:, ::-1], k[:, ::-1], v[:, ::-1], mask=causal(), q_slots=back, k_slots=back, **sizes)
    close(y, op(q, k, v, mask=causal())[:, ::-1])


@given(st.data(), st.integers(1, 5))
@both
def test_two_halves_of_the_keys_merge_by_their_lse(op, data, cut):
    q, k, v = (
        data.draw(normal((2, 3, 4), F64)),
        data.draw(normal((2, 6, 4), F64)),
        data.draw(normal((2, 6, 2), F64)),
    )
    y, lse = op(q, k, v, return_lse=True)
    (a, lse_a), (b, lse_b) = (
        op(q, k[:, part], v[:, part], return_lse=True) for part in (slice(cut), slice(cut, None))
    )
    close(np.logaddexp(lse_a, lse_b), lse)
    close(np.exp(lse_a - lse)[..., None] * a + np.exp(lse_b - lse)[..., None] * b, y)


@given(st.data(), st.integers(1, 5))
@both
def test_default_slots_let_new_queries_end_where_the_keys_end(op, data, n_new):
    q, k, v = (
        data.draw(normal((1, 6, 3), F64)),
        data.draw(normal((1, 6, 3), F64)),
        data.draw(normal((1, 6, 3), F64)),
    )
    close(op(q[:, -n_new:], k, v, mask=causal()), op(q, k, v, mask=causal())[:, -n_new:])


@given(st.data(), st.integers(1, 6))
@both
def test_what_a_rule_hides_does_not_matter(op, data, w):
    q, k, v = (
        data.draw(normal((2, 6, 3), F32)),
        data.draw(normal((2, 6, 3), F32)),
        data.draw(normal((2, 6, 2), F32)),
    )
    y = op(q, k, v, mask=sliding_window(w))
    k[:, 3:], v[:, 3:] = 50, -70
    k[:, : max(0, 3 - w)], v[:, : max(0, 3 - w)] = -30, 20
    close(op(q, k, v, mask=sliding_window(w))[:, 2], y[:, 2], times=0)


@given(st.data(), st.sampled_from([0.5, 3.0, 30.0]))
@both
def test_the_default_scale_is_one_over_the_root_of_the_head(op, data, softcap):
    q, k, v = (data.draw(normal((1, 4, 9), F64)) for _ in range(3))
    close(op(q, k, v, softcap=softcap), op(q, k, v, softcap=softcap, scale=1 / 3))
    close(op(q, k, v), op(3 * q, k, v, scale=1 / 9))


@given(attention_calls(dtype=F32, min_batch=1), dtypes)
@both
def test_narrow_keys_and_values_are_widened_exactly(op, call, kv_dtype):
    k, v = call.k.astype(kv_dtype), call.v.astype(kv_dtype)
    wide = F64 if kv_dtype == F64 else F32
    close(
        op(call.q, k, v, **call.options),
        op(call.q, k.astype(wide), v.astype(wide), **call.options),
        times=0,
    )


@given(st.data(), dtypes, dtypes, dtypes)
@both
def test_the_result_has_the_dtype_of_the_queries(op, data, q_dtype, k_dtype, v_dtype):
    q, k, v = (
        data.draw(normal((2, 3, 4), q_dtype)),
        data.draw(normal((1, 5, 4), k_dtype)),
        data.draw(normal((1, 5, 2), v_dtype)),
    )
    y, lse = op(q, k, v, return_lse=True)
    assert y.dtype == q_dtype and lse.dtype == compute_dtype(q, k, v)
    assert attention_weights(q, k).dtype == q_dtype


@both
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_scores_give_no_nan(op, size):
    q = np.array([[[1.0], [-1.0], [0.0]]], F32)
    k, v = np.array([[[size], [-size]]], F32), np.array([[[1.0], [2.0]]], F32)
    close(op(q, k, v, scale=1.0), np.array([[[1.0], [2.0], [1.5]]], F32))
    close(
        op(
            q,
            k,
            v,
            scale=1.0,
            mask=causal(),
            q_slots=np.arange(3),
            k_slots=np.arange(2),
            bias=np.array([-1e4, 1e4], F32),
        )[:, 0],
        np.array([[1.0]], F32),
    )


@both
def test_huge_scores_of_late_keys_take_over_from_early_ones(op):
    k = np.linspace(-1e4, 1e4, 9, dtype=F32)[None, :, None]
    sizes = {"block_k": 2} if op is blockwise_attention else {}
    y, lse = op(
        np.ones((1, 1, 1), F32),
        k,
        np.arange(9, dtype=F32)[None, :, None],
        scale=1.0,
        return_lse=True,
        **sizes,
    )
    close(y, np.array([[[8.0]]], F32))
    close(lse, np.array([[1e4]], F32))


@given(
    attention_calls(dtype=F32, kinds=("none", "rule", "padding"), min_batch=1), st.integers(1, 3)
)
@both
def test_another_row_of_the_batch_changes_nothing_bit_for_bit(op, call, n):
    if call.q.ndim == 3 or call.q.shape[0] == 1:
        return
    y = op(call.q, call.k, call.v, **call.options)
    for x in (call.q, call.k, call.v):
        x[1:] = n * 1000.0 - x[1:]
    close(op(call.q, call.k, call.v, **call.options)[0], y[0], times=0)


@both
def test_padding_hides_keys_by_sequence(op):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 2, 5, 3)) for _ in range(3))
    valid = np.array([[False, False, True, True, True], [True] * 5])
    y = op(q, k, v, mask=causal() & padding(valid))
    close(y[0, :, 2:], op(q[0, :, 2:], k[0, :, 2:], v[0, :, 2:], mask=causal()))
    close(y[0, :, :2], np.zeros((2, 2, 3)))
    close(y[1], op(q[1], k[1], v[1], mask=causal()))


# ------------------------------------------------------------------------------------------------- what the blockwise form leaves out


def asked(mask, n, block, **slots):
    """Run blockwise attention with a rule that writes down what it is asked for."""
    calls = []

    def visible(i, j):
        calls.append((tuple(map(int, (i.min(), i.max()))), tuple(map(int, (j.min(), j.max())))))
        return mask(i, j)

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, 2)) for _ in range(3))
    y = blockwise_attention(
        q, k, v, mask=Rule(visible, mask.bound), block_q=block, block_k=block, **slots
    )
    close(y, attention(q, k, v, mask=mask, **slots))
    return calls


@pytest.mark.parametrize("form", [range, np.arange])
@pytest.mark.parametrize(
    "mask", [causal(), sliding_window(5), sliding_window(1), causal() | sliding_window(3)]
)
def test_a_mask_is_made_for_mixed_blocks_only(mask, form):
    n, block = 24, 4
    spans = [(start, start + block - 1) for start in range(0, n, block)]
    mixed = [(i, j) for i, j in itertools.product(spans, spans) if mask.bound(*i, *j) == 1]
    assert asked(mask, n, block, q_slots=form(n), k_slots=form(n)) == mixed
    assert 0 < len(mixed) < len(spans) ** 2 / 2


def test_a_window_never_reads_what_lies_outside_of_it():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, 2)) for n in (2, 32, 32))
    desired = attention(q, k, v, mask=sliding_window(4))
    k[:, :24], v[:, :24] = np.nan, np.nan
    close(blockwise_attention(q, k, v, mask=sliding_window(4), block_q=4, block_k=8), desired)


def test_no_mask_at_all_asks_for_none():
    def fails(*_):
        raise AssertionError("asked")

    everything = Rule(fails, lambda *_: 2)
    q = np.ones((1, 8, 2))
    close(blockwise_attention(q, q, q, mask=everything, block_q=3, block_k=3), q)


@pytest.mark.parametrize(
    "mask", [None, causal(), sliding_window(100), causal() & padding(np.ones((1, 4096), bool))]
)
def test_no_table_of_all_pairs_exists(mask, traced_peak):
    n = 4096
    q = np.ones((1, 1, n, 2), F32)
    peak = traced_peak(lambda: blockwise_attention(q, q, q, mask=mask))
    assert peak < n * n / 4  # bytes: a quarter of a bool table


def test_narrow_keys_are_widened_block_by_block(traced_peak):
    k = np.ones((1, 1, 65536, 64), FLOATS["bfloat16"])
    q = np.ones((1, 1, 1, 64), F32)
    assert traced_peak(lambda: blockwise_attention(q, k, k)) < k.nbytes / 8


# --------------------------------------------------------------------------------------------------------------------- small and wrong


@both
@pytest.mark.parametrize(("batch", "n_seq"), [((), 0), ((2,), 0), ((0,), 3), ((2, 0), 0)])
def test_no_query_and_no_sequence_give_empty_results(op, batch, n_seq):
    q, k, v = np.ones((*batch, 4, n_seq, 3)), np.ones((*batch, 2, 5, 3)), np.ones((*batch, 2, 5, 2))
    y, lse = op(q, k, v, mask=causal(), return_lse=True)
    close(y, np.ones((*batch, 4, n_seq, 2)))
    close(lse, np.ones((*batch, 4, n_seq)))


def weights_of(q, k, v, **options):
    del v  # weights need no values
    return attention_weights(q, k, **options)


ops_with_mask = pytest.mark.parametrize("op", [weights_of, attention, blockwise_attention])


@ops_with_mask
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": (3, 2)},
            "q must be [..., n_head, n_seq, d_head], got [3, 2]",
        ),
        (
            {"k": (2, 2, 5, 4)},
            "k must be [..., n_kv_head, n_ctx, d_head] = [..., n_kv_head, n_ctx, 3], got [2, 2, 5, 4]",
        ),
        ({"k": (2, 2, 0, 3), "v": (2, 2, 0, 3)}, "n_ctx = 0"),
        ({"k": (2, 3, 5, 3), "v": (2, 3, 5, 3)}, "n_head = 4 and n_kv_head = 3"),
        ({"k": (2, 0, 5, 3), "v": (2, 0, 5, 3)}, "n_kv_head = 0"),
        (
            {"k": (3, 2, 5, 3), "v": (3, 2, 5, 3)},
            "same axes in front of the heads, got q [2, 4, 2, 3], k [3, 2, 5, 3]",
        ),
        ({"k": (1, 2, 5, 3), "v": (1, 2, 5, 3)}, "same axes in front of the heads"),
        (
            {"mask": np.ones((3, 5), bool)},
            "mask must broadcast to [..., n_head, n_seq, n_ctx] = [2, 4, 2, 5], got [3, 5]",
        ),
        ({"mask": np.ones((1, 2, 4, 2, 5), bool)}, "mask must broadcast"),
        (
            {"bias": np.ones((3, 5))},
            "bias must broadcast to [..., n_head, n_seq, n_ctx] = [2, 4, 2, 5], got [3, 5]",
        ),
        ({"q_slots": np.arange(3)}, "q_slots must be [n_seq] = [2], got [3]"),
        ({"k_slots": range(4)}, "k_slots must be [n_ctx] = [5], got [4]"),
    ],
)
def test_what_does_not_fit_raises_with_both_sides(op, change, message):
    shapes = {"q": (2, 4, 2, 3), "k": (2, 2, 5, 3), "v": (2, 2, 5, 3)}
    arrays = {name: np.ones(change.get(name, shape)) for name, shape in shapes.items()}
    options = {name: x for name, x in change.items() if name not in shapes}
    with pytest.raises(NpllmValueError, match=re.escape(message)):
        op(**arrays, **options)


@both
@pytest.mark.parametrize(
    ("v", "message"),
    [
        ((2, 2, 4, 3), "[..., 2, 5, d_value], got [2, 2, 4, 3]"),
        ((2, 1, 5, 3), "[..., 2, 5, d_value]"),
    ],
)
def test_values_must_match_the_keys(op, v, message):
    with pytest.raises(
        NpllmValueError, match=re.escape(f"v must be [..., n_kv_head, n_ctx, d_value] = {message}")
    ):
        op(np.ones((2, 4, 2, 3)), np.ones((2, 2, 5, 3)), np.ones(v))


@ops_with_mask
@pytest.mark.parametrize(
    "options",
    [
        {"mask": np.ones((2, 5))},
        {"mask": np.ones((2, 5), int)},
        {"mask": [[True] * 5] * 2},
        {"mask": True},
        {"bias": [[0.0] * 5] * 2},
        {"q_slots": [0, 1]},
        {"k_slots": np.arange(5.0)},
        {"q_slots": np.array([[0, 1]])},
        {"k_slots": 3},
    ],
    ids=repr,
)
def test_arguments_of_another_kind_raise(op, options):
    with pytest.raises(NpllmTypeError):
        op(np.ones((2, 4, 2, 3)), np.ones((2, 2, 5, 3)), np.ones((2, 2, 5, 3)), **options)


@pytest.mark.parametrize("sizes", [{"block_q": 0}, {"block_k": 0}, {"block_q": -1}])
def test_blocks_of_nothing_raise(sizes):
    x = np.ones((1, 2, 3))
    with pytest.raises(NpllmValueError, match="block_q and block_k must be at least 1"):
        blockwise_attention(x, x, x, **sizes)
