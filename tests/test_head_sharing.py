"""Shared key/value heads: MHA, GQA and MQA are one code path; pooled heads; the bytes of keys and
values that each choice costs.
"""

import numpy as np
import pytest
import tiny
from close import close
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOATS, normal, seeds
from test_mask_rules import N, any_rule

from npllm.cache import KVCache
from npllm.errors import NpllmValueError
from npllm.ops import (
    attention,
    attention_weights,
    blockwise_attention,
    linear,
    mean_pool_kv_heads,
    merge_heads,
    split_heads,
    split_kv_attention,
)

OPS = {
    "attention": attention,
    "queries": lambda *a, **o: blockwise_attention(*a, block_q=3, block_k=4, **o),
    "keys": lambda *a, **o: blockwise_attention(*a, block_q=3, block_k=4, outer="keys", **o),
    "split": lambda *a, **o: split_kv_attention(*a, n_split=3, **o),
}
every_op = pytest.mark.parametrize("name", OPS)


@every_op
@given(any_rule, st.integers(1, 4), st.integers(1, 4), seeds)
def test_shared_heads_are_repeated_heads(name, pair, n_kv_head, group, seed):
    """Convention C8: heads h and h + 1 read the same keys; a tiling, where h and h + n_kv_head do,
    is another result.
    """
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((2, n_kv_head * group, 9, 3))
    k, v = (rng.standard_normal((2, n_kv_head, N, width)) for width in (3, 2))
    y = OPS[name](q, k, v, mask=pair[0], q_slots=range(9))
    repeated = [
        np.stack([x[:, h // group] for h in range(n_kv_head * group)], axis=1) for x in (k, v)
    ]
    close(y, OPS[name](q, *repeated, mask=pair[0], q_slots=range(9)), times=4)
    for h in range(n_kv_head * group):
        one = slice(h // group, h // group + 1)
        close(
            y[:, h : h + 1],
            OPS[name](q[:, h : h + 1], k[:, one], v[:, one], mask=pair[0], q_slots=range(9)),
            times=4,
        )


@every_op
def test_repeated_is_not_tiled(name):
    q, k, v = (np.random.default_rng(0).standard_normal((heads, 5, 3)) for heads in (4, 2, 2))
    tiled = OPS[name](q, np.concatenate([k, k]), np.concatenate([v, v]))
    assert np.abs(OPS[name](q, k, v) - tiled).max() > 0.1


def test_one_head_of_keys_serves_all_queries():
    """Multi-query attention: the heads differ by their queries only."""
    q, k, v = (np.random.default_rng(1).standard_normal((heads, 5, 3)) for heads in (4, 1, 1))
    together = attention_weights(q.reshape(1, 20, 3), k).reshape(4, 5, 5)
    close(attention_weights(q, k), together)
    close(attention(q, k, v), together @ v, times=4)


# ------------------------------------------------------------------------------------------------------------------- pooled heads


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), seeds)
def test_pooling_is_the_mean_of_the_heads_of_each_group(n_group, size, d_head, seed):
    n_kv_head = n_group * size
    weight = np.random.default_rng(seed).standard_normal((n_kv_head * d_head, 5))
    heads = [weight[h * d_head : (h + 1) * d_head] for h in range(n_kv_head)]
    desired = np.concatenate([sum(heads[g * size : (g + 1) * size]) / size for g in range(n_group)])
    close(mean_pool_kv_heads(weight, n_kv_head, n_group), desired)
    close(mean_pool_kv_heads(weight[:, 0], n_kv_head, n_group), desired[:, 0])


@given(st.sampled_from(list(FLOATS.values())), seeds)
def test_as_many_groups_as_heads_is_the_weight_itself(dtype, seed):
    weight = np.random.default_rng(seed).standard_normal((8, 5)).astype(dtype)
    close(mean_pool_kv_heads(weight, 4, 4), weight, times=0)


@given(st.sampled_from([(4, 2), (4, 1), (2, 1), (8, 4), (8, 2), (8, 1)]), seeds)
def test_pooling_in_two_steps_is_pooling_in_one(groups, seed):
    weight = np.random.default_rng(seed).standard_normal((8 * 3, 5))
    first, second = groups
    close(
        mean_pool_kv_heads(mean_pool_kv_heads(weight, 8, first), first, second),
        mean_pool_kv_heads(weight, 8, second),
    )


def test_heads_that_are_alike_pool_to_the_same_attention():
    """Where the heads of a group hold one matrix, the checkpoint with fewer of them computes the
    same.
    """
    rng = np.random.default_rng(0)
    x, w_q = rng.standard_normal((1, 7, 12)), rng.standard_normal((24, 12))
    w_k, w_v = (
        np.repeat(rng.standard_normal((2, 1, 3, 12)), 4, axis=1).reshape(24, 12) for _ in range(2)
    )
    q, k, v = (split_heads(linear(x, w), 8) for w in (w_q, w_k, w_v))
    pooled = (split_heads(linear(x, mean_pool_kv_heads(w, 8, 2)), 2) for w in (w_k, w_v))
    close(merge_heads(attention(q, *pooled)), merge_heads(attention(q, k, v)), times=4)


def test_a_16_bit_weight_is_averaged_in_float32_and_rounded_once():
    weight = np.array([2048.0, 1.0, 1.0, 1.0], dtype=np.float16)[
        :, None
    ]  # 2048 + 1 is 2048 in float16
    close(mean_pool_kv_heads(weight, 4, 1), np.array([[512.75]]), dtype=np.float16, times=0.5)
    assert mean_pool_kv_heads(weight, 4, 1)[0, 0] == np.float16(512.75)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 3), "n_group must divide n_kv_head = 4, got 3"),
        ((4, 0), "n_group must divide n_kv_head = 4, got 0"),
        ((4, -2), "n_group must divide"),
        ((4, 8), "n_group must divide"),
        ((3, 1), "a multiple of n_kv_head = 3, got 8"),
        ((0, 1), "a multiple of n_kv_head = 0, got 8"),
    ],
)
def test_groups_that_do_not_divide_raise(arguments, message):
    with pytest.raises(NpllmValueError, match=message):
        mean_pool_kv_heads(np.ones((8, 5)), *arguments)


# ------------------------------------------------------------------------------------------------------- bytes of keys and values


def kv_bytes_per_token(n_layer, n_kv_head, d_head, itemsize):
    return n_layer * 2 * n_kv_head * d_head * itemsize


@given(
    st.integers(1, 3),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 8),
    st.sampled_from(["float16", "float32", "float64"]),
    st.integers(1, 2),
)
def test_the_arrays_of_a_cache_cost_what_the_formula_says(
    n_layer, n_kv_head, d_head, dtype, n_batch
):
    cache, n_slots = KVCache(n_batch, n_layer, 64), 64
    x = np.ones((n_batch, n_kv_head, n_slots, d_head), dtype)
    seen = [cache.append(layer, x, x) for layer in range(n_layer)]
    expected = (
        n_batch * n_slots * kv_bytes_per_token(n_layer, n_kv_head, d_head, np.dtype(dtype).itemsize)
    )
    assert sum(k.nbytes + v.nbytes for k, v, _ in seen) == cache.n_bytes == expected


def test_each_choice_saves_its_share_in_a_model():
    """4 query heads of 8 channels over 2 layers in float32: MHA 512 bytes a token, GQA 256, MQA
    128.
    """
    sizes = {}
    for n_kv_head in (4, 2, 1):
        model = tiny.model(num_key_value_heads=n_kv_head)
        cache = model.new_cache()
        model(tiny.random_ids(1, 64), cache=cache)
        assert cache.n_bytes == 64 * kv_bytes_per_token(2, n_kv_head, 8, 4)
        sizes[n_kv_head] = cache.n_bytes // 64
    assert sizes == {4: 512, 2: 256, 1: 128}


@given(st.data(), st.sampled_from([1, 2, 4]))
def test_a_pooled_model_is_the_model_with_each_head_replaced_by_the_mean_of_its_group(
    data, n_group
):
    """The weights [4 heads] after pooling and repeating again: the same projections, seen through
    the grouped path.
    """
    rng = np.random.default_rng(data.draw(seeds))
    x, w = data.draw(normal((2, 6, 12), np.float64)), rng.standard_normal((3, 4 * 3, 12))
    q = split_heads(linear(x, w[0]), 4)
    grouped = [
        split_heads(linear(x, mean_pool_kv_heads(weight, 4, n_group)), n_group) for weight in w[1:]
    ]
    means = [
        np.repeat(
            weight.reshape(n_group, 4 // n_group, 3, 12).mean(axis=1), 4 // n_group, axis=0
        ).reshape(12, 12)
        for weight in w[1:]
    ]
    close(
        attention(q, *grouped),
        attention(q, *(split_heads(linear(x, weight), 4) for weight in means)),
        times=8,
    )
