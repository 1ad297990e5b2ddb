"""attention_io: the formulas beside counted loads, FlashAttention's choice of blocks, and the peak
memory of the schedules.
"""

import math

import numpy as np
import pytest
from close import close
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import compute_dtypes

from npllm.errors import NpllmValueError
from npllm.ops import attention_io, blockwise_attention
from npllm.ops.mask import sliding_window

sizes = st.integers(1, 40)


def counted(n, d, block, dtype, outer, n_head=1, n_kv_head=1, **options):
    """Bytes that a run tells of."""
    moved = []
    q, k, v = (np.ones((heads, n, d), dtype) for heads in (n_head, n_kv_head, n_kv_head))
    blockwise_attention(
        q, k, v, block_q=block[0], block_k=block[1], outer=outer, moved=moved.append, **options
    )
    return sum(moved)


@given(sizes, st.integers(1, 8), st.tuples(sizes, sizes), compute_dtypes)
def test_the_formulas_count_what_a_run_moves(n, d, block, dtype):
    io = attention_io(n, d, block=block, itemsize=dtype.itemsize)
    assert io["flash_1"] == counted(n, d, block, dtype, "keys")
    assert io["flash_2"] == counted(n, d, block, dtype, "queries")
    assert io["block"] == block


def naive_bytes(n, d, itemsize):
    """Algorithm 0 of the paper, step by step: load q, k, write s; load s, write w; load w, v, write
    y.
    """
    q = k = v = y = n * d
    s = w = n * n
    return ((q + k + s) + (s + w) + (w + v + y)) * itemsize


@given(sizes, sizes, st.sampled_from([2, 4, 8]))
def test_the_naive_count_reads_and_writes_both_tables(n, d, itemsize):
    assert attention_io(n, d, block=(1, 1), itemsize=itemsize)["naive"] == naive_bytes(
        n, d, itemsize
    )


@given(sizes, st.integers(1, 8), st.tuples(sizes, sizes))
def test_the_tiled_counts_follow_the_loops_of_the_papers(n, d, block):
    """Written out: what each iteration of the outer and of the inner loop loads and stores."""
    rows = [min(block[0], n - a) for a in range(0, n, block[0])]
    columns = [min(block[1], n - a) for a in range(0, n, block[1])]
    flash_1 = sum(
        2 * c * d + sum(2 * r * d + 2 * r + (r * d + 2 * r) for r in rows) for c in columns
    )  # k, v; q, o, l, m; o, l, m
    flash_2 = sum(
        r * d + sum(2 * c * d for c in columns) + r * d + r for r in rows
    )  # q; k, v; o, lse
    io = attention_io(n, d, block=block, itemsize=4)
    assert (io["flash_1"], io["flash_2"]) == (4 * flash_1, 4 * flash_2)


@given(sizes, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_shared_key_and_value_heads_are_fetched_once(n, d, n_kv_head, group):
    block, n_head = (4, 5), n_kv_head * group
    visits = math.ceil(n / 4)
    got = counted(n, d, block, np.float64, "queries", n_head, n_kv_head)
    assert got == 8 * (n_head * (2 * n * d + n) + n_kv_head * visits * 2 * n * d)


@given(st.integers(1, 60), st.integers(1, 20), st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_skipped_blocks_are_not_fetched(n, w, block):
    """The schedule of FlashAttention-2 under a window: keys and values of the blocks that the
    window touches, and no others.
    """
    keys = 0
    for a in range(0, n, block[0]):
        b = min(a + block[0], n) - 1
        first, last = (
            max(0, a - w + 1) // block[1] * block[1],
            min(n, (b // block[1] + 1) * block[1]),
        )
        keys += last - first
    assert counted(n, 3, block, np.float32, "queries", mask=sliding_window(w)) == 4 * (
        2 * n * 3 + n + 2 * keys * 3
    )


@given(st.integers(1, 4096), st.integers(1, 128), st.integers(1, 10**6), st.sampled_from([2, 4, 8]))
def test_blocks_that_fit_the_fast_memory_are_those_of_the_paper(n, d, sram, itemsize):
    """Algorithm 1, line 1: B_c = ceil(M / 4d), B_r = min(B_c, d), M the numbers that fit; k, v, q
    and y blocks then do fit.
    """
    b_c = math.ceil(sram / itemsize / (4 * d))
    io = attention_io(n, d, sram=sram, itemsize=itemsize)
    assert io["block"] == (min(b_c, d), b_c)
    assert io == attention_io(n, d, block=io["block"], itemsize=itemsize)


def test_the_gain_is_that_of_the_paper():
    """Theorem 2: n**2 * d**2 / sram in place of n**2, so that half the fast memory is twice the
    bytes.
    """
    io, half = attention_io(8192, 64, sram=200_000), attention_io(8192, 64, sram=100_000)
    assert io["flash_1"] < io["naive"] / 3 and io["flash_2"] < io["naive"] / 1.9
    assert 1.9 < half["flash_1"] / io["flash_1"] < 2 and half["naive"] == io["naive"]
    assert half == attention_io(8192, 64), "100 KB by default"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0, "d": 4, "block": (1, 1)}, "must be at least 1, got 0, 4"),
        ({"n": 4, "d": 0, "block": (1, 1)}, "at least 1, got 4, 0"),
        ({"n": 4, "d": 0, "sram": 100}, "at least 1"),
        ({"n": 4, "d": 4, "sram": 100, "itemsize": 0}, "at least 1"),
        ({"n": 4, "d": 4, "block": (0, 1)}, "at least 1"),
        ({"n": 4, "d": 4, "block": (1, 0)}, "at least 1"),
        ({"n": 4, "d": 4, "sram": 0}, "at least 1"),
        ({"n": 4, "d": 4, "sram": -8}, "at least 1"),
    ],
)
def test_sizes_that_count_nothing_raise(arguments, message):
    with pytest.raises(NpllmValueError, match=message):
        attention_io(**arguments)


# --------------------------------------------------------------------------------------------------------------------- peak memory


@pytest.mark.parametrize("outer", ["queries", "keys"])
@pytest.mark.parametrize(
    ("n", "block_q", "block_k", "share"),
    [(8192, 128, 256, 100), pytest.param(32768, 256, 1024, 300, marks=pytest.mark.slow)],
)
def test_peak_memory_is_that_of_the_sums_and_a_few_tiles(
    traced_peak_once, n, block_q, block_k, share, outer
):
    """A small share of the table of scores.  Sums and results: at most 3 times n * (d + 2); a tile:
    4 of floats, 2 of slots.
    """
    d = 8
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, n, d)).astype(np.float32)
    peak = traced_peak_once(
        lambda: blockwise_attention(
            q, k, v, mask=sliding_window(1024), block_q=block_q, block_k=block_k, outer=outer
        )
    )
    bound = 3 * 4 * n * (d + 2) + (4 * 4 + 2 * 8) * block_q * block_k
    assert 4 * n * d <= peak < bound < 4 * n * n / share


@pytest.mark.slow
def test_peak_memory_grows_with_the_length_and_not_with_its_square(traced_peak_once):
    peaks = []
    for n in (4096, 8192, 16384):
        x = np.ones((1, n, 4), np.float32)
        peaks.append(
            traced_peak_once(
                lambda x=x: blockwise_attention(
                    x, x, x, mask=sliding_window(64), block_q=128, block_k=128
                )
            )
        )
    assert peaks[1] < 2.1 * peaks[0] and peaks[2] < 2.1 * peaks[1]


@pytest.fixture
def traced_peak_once():
    """Largest number of bytes held while a function runs, once."""
    import tracemalloc

    def peak(function):
        tracemalloc.start()
        try:
            function()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    return peak


@given(st.integers(1, 50), st.integers(1, 50))
@settings(max_examples=10)
def test_counting_changes_no_number(n, block):
    q, k, v = np.random.default_rng(n).standard_normal((3, 2, n, 3))
    for outer in ("queries", "keys"):
        with_count = blockwise_attention(
            q, k, v, block_q=block, block_k=block, outer=outer, moved=lambda _: None
        )
        close(
            with_count,
            blockwise_attention(q, k, v, block_q=block, block_k=block, outer=outer),
            times=0,
        )
