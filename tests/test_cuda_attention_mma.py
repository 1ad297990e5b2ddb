"""Attention of many queries on the tensor cores: attention_mma.cu beside the definition.

Run on the CPU; the product of a warp, `mma_bf16`, is that of tests/cuda_shim.cpp, which is tested
here beside the layout that mma.cu states.  Of 3 parts the error is that of float32.  Of 1 part it
is that of attention on rounded queries, keys and values, whose weights are rounded as well.
"""

import guard
import kernel_shim
import ml_dtypes
import numpy as np
import pytest
from close import close
from guard import moved
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_shim import checking, needs_gxx
from seeds import draws
from strategies import seeds
from test_cuda_special import alike

from npllm import ops
from npllm.kernels import cuda
from npllm.kernels.cuda import gemm, launching
from npllm.kernels.cuda.attention import MMA_QUERIES, QUERIES, attention_in_parts
from npllm.ops.mask import bidirectional, causal, left_padding, lookback, sliding_window

pytestmark = [needs_gxx, pytest.mark.usefixtures("on_tensor_cores")]
slow = pytest.mark.slow
BF16 = ml_dtypes.bfloat16
FLOATS = (np.float32, BF16, np.float16)
# g++ takes seconds for each variant: the others are slow
VARIANTS = [
    pytest.param(d_head, dtype, n_parts, marks=[] if few else slow)
    for n_parts in (gemm.PARTS, 1)
    for dtype in FLOATS
    for d_head in cuda.HEADS
    for few in [(d_head, dtype) in ((64, np.float32), (96, BF16))]
]
every_variant = pytest.mark.parametrize(("d_head", "dtype", "n_parts"), VARIANTS)
EPSILON = 2.0**-24  # of a rounding to float32
SPECIAL = (np.nan, np.inf, -np.inf, np.float32(3.4e38), np.float32(-3e38))


def many(q, k, v, n_parts=gemm.PARTS, **options):
    """Attend on the tensor cores; see that the kernel ran, and behind it the one that mends."""
    kernel_shim.LAUNCHES.clear()
    y = attention_in_parts(n_parts, *moved((q, k, v)), **masked(options, moved))
    assert kernel_shim.LAUNCHES == ["attention_mma", "attention"]
    return y.get()


def plain(q, k, v, **options):
    """Attend by attention.cu alone, as on a device without tensor cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "has_tensor_cores", lambda: False)
        kernel_shim.LAUNCHES.clear()
        y = cuda.attention(*moved((q, k, v)), **masked(options, moved))
        assert kernel_shim.LAUNCHES == ["attention"]
        return y.get()


def masked(options, move=np.asarray):
    """Options with padding up to `start`, whose array is where `move` puts it."""
    options = dict(options)
    start = options.pop("start", None)
    if start is not None:
        options["mask"] &= left_padding(move(np.array(start, np.int64)))
    return options


def heads(seed, d_head, dtype, n_seq, n_ctx, n_head=2, n_kv_head=1, lead=(1,)):
    """Queries in float32, keys and values in the type of the cache."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((*lead, n_head, n_seq, d_head), np.float32)
    shape = (*lead, n_kv_head, n_ctx, d_head)
    k, v = (rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(2))
    return q, k, v


def wide(*arrays, rounded=False):
    """In float64; `rounded`: to bfloat16 before."""
    return [x.astype(BF16 if rounded else x.dtype).astype(np.float64) for x in arrays]


def sizes(q, k, v, scale=None, **options):
    """What errors are multiples of: scale * sum_c |q_c k_c|, the largest of all, and for each
    entry of the result sum_j w_j |v_j|.
    """
    q, k, v = wide(q, k, v)
    group = q.shape[-3] // k.shape[-3]
    scores = abs(q) @ np.swapaxes(np.repeat(abs(k), group, axis=-3), -1, -2)
    largest = scores.max() * (q.shape[-1] ** -0.5 if scale is None else scale)
    return largest, ops.attention(q, k, abs(v), scale=scale, **masked(options))


def check(call, n_parts, times=4):
    """Compare with the definition in float64: 3 parts within the budget of attention.cu.

    1 part, beside the definition of rounded inputs: a weight that is rounded moves by 2**-8 of
    itself, and a mean by 2**-8 of sum_j w_j |v_j|.  Products are exact; their float32 sums move a
    score by a few units of the last place, for which 2**-16 of its size is ample.
    """
    (q, k, v), options = call
    got = many(q, k, v, n_parts, **options)
    want = ops.attention(*wide(q, k, v, rounded=n_parts == 1), **masked(options))
    if n_parts == gemm.PARTS:
        return close(got, want, dtype="float32", times=times)
    largest, size = sizes(*wide(q, k, v, rounded=True), **options)
    assert np.isfinite(got).all()
    assert (abs(got - want) <= (2.0**-8 + 2.0**-16 * (1 + largest)) * size + 1e-30).all()


# --------------------------------------------------------------------- the product of a warp

PRODUCT = """
extern "C" __global__ void product(const unsigned* a, const unsigned* b, float* d, unsigned n) {
    float sum[4];
    for (int e = 0; e < 4; ++e) sum[e] = d[threadIdx.x * 4 + e];
    for (unsigned i = 0; i < n; ++i) {
        unsigned left[4], right[2], at = i * blockDim.x + threadIdx.x;
        for (int w = 0; w < 4; ++w) left[w] = a[at * 4 + w];
        for (int w = 0; w < 2; ++w) right[w] = b[at * 2 + w];
        mma_bf16(sum, left, right);
    }
    for (int e = 0; e < 4; ++e) d[threadIdx.x * 4 + e] = sum[e];
}
"""


def product_text():
    """A kernel that does nothing but `mma_bf16`, n times."""
    whole = cuda.source("attention_mma")
    return whole[: whole.index("// Attention block by block")] + PRODUCT


def fragments(n=3, n_warps=2, seed=0):
    """Factors a [n, n_warps, 16, 16], b [n, n_warps, 16, 8] and d [n_warps, 16, 8], and each as the
    lanes have it by the table at the head of mma.cu: row, then column, of the first of a pair.
    """
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal((n, n_warps, 16, m)).astype(BF16) for m in (16, 8))
    d = rng.standard_normal((n_warps, 16, 8), np.float32)
    g, t = np.arange(32) // 4, np.arange(32) % 4
    of_a = [(g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)]
    of_b = [(2 * t, g), (2 * t + 8, g)]
    words_a = np.stack([words(a[..., r, c], a[..., r, c + 1]) for r, c in of_a], axis=-1)
    words_b = np.stack([words(b[..., r, c], b[..., r + 1, c]) for r, c in of_b], axis=-1)
    of_d = [(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)]
    lanes = words_a, words_b, lanes_of(d, of_d)
    return (a, b, d), tuple(map(np.ascontiguousarray, lanes)), of_d


def words(low, high):
    """Two bfloat16 numbers in 32 bits, the first in the low half."""
    return low.view(np.uint16) | high.view(np.uint16).astype(np.uint32) << 16


def lanes_of(d, places):
    """The entries of d that each lane has."""
    return np.stack([d[..., r, c] for r, c in places], axis=-1)


def check_product(launch):
    """Launch `product` on two warps with factors of their own; each addition may truncate."""
    (a, b, d), lanes, of_d = fragments()
    got = launch(*lanes)
    a, b, d = wide(a, b, d)
    want = lanes_of(d + (a @ b).sum(axis=0), of_d)
    size = lanes_of(abs(d) + (abs(a) @ abs(b)).sum(axis=0), of_d)
    assert got.shape == want.shape
    assert (abs(got - want) <= (16 * len(a) + 1) * 2 * EPSILON * size).all()


@pytest.mark.parametrize("seed", [None, pytest.param(1, marks=slow), pytest.param(2, marks=slow)])
def test_the_product_of_a_warp_is_laid_out_as_its_source_says(seed):
    def launch(a, b, d):
        there = moved(d)
        arguments = *moved((a, b)), there, np.uint32(len(a))
        kernel_shim.launch("product", (), 1, 64, *arguments, text=product_text())
        return there.get()

    if seed is None:
        check_product(launch)
    else:
        with checking(seed):
            check_product(launch)


# ------------------------------------------------------------------------ beside the definition


@st.composite
def calls(draw):
    """Attention of sizes around the tiles: 16 queries a warp, 128 a block, 16 or 32 keys."""
    d_head, dtype = draw(st.sampled_from([(64, np.float32), (96, BF16)][: draws(1, 2)]))
    group, n_kv_head = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (3, 2)]))
    edge = draw(st.sampled_from([2, QUERIES, QUERIES + 1, 33, MMA_QUERIES - 1, MMA_QUERIES]))
    n_seq = edge + draw(st.integers(0, 1))
    extra = draw(st.sampled_from([0, 1, 15, 16, 17, 31, 32, 33]))
    n_ctx = draw(st.sampled_from([1, 15, 16, 17, 31, 32, 33, n_seq, n_seq + extra]))
    lead = draw(st.sampled_from([(), (1,), (2,)]))
    arrays = heads(draw(seeds), d_head, dtype, n_seq, n_ctx, group * n_kv_head, n_kv_head, lead)
    masks = [None, causal(), bidirectional(), causal() & lookback(3), sliding_window(17)]
    options = {"mask": draw(st.sampled_from(masks))}
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.02, 1.0]))
    k_slot = draw(st.sampled_from([0, 0, 5]))
    if k_slot or draw(st.booleans()):
        first = k_slot + draw(st.sampled_from([n_ctx - n_seq, -3, 0, 40]))
        options |= {
            "q_slots": range(first, first + n_seq),
            "k_slots": range(k_slot, k_slot + n_ctx),
        }
    if options["mask"] is not None and lead and draw(st.booleans()):
        slots = st.integers(-2, k_slot + n_ctx + 1)
        options["start"] = draw(st.lists(slots, min_size=lead[0], max_size=lead[0]))
    return arrays, options


@pytest.mark.parametrize("n_parts", [gemm.PARTS, 1])
@given(calls())
@settings(max_examples=draws(25, 150))
def test_attention(n_parts, call):
    check(call, n_parts)


@pytest.mark.parametrize("window", [None, 3 * QUERIES, 40])
@pytest.mark.parametrize(
    "shift", [pytest.param(n, marks=[] if n in (1, 14, 30) else slow) for n in range(34)]
)
def test_the_last_key_of_a_block_and_the_first_of_a_window(shift, window):
    """Wherever the limits of a band lie in a tile of keys; with queries of a second block."""
    mask = causal() if window is None else sliding_window(window)
    n_seq = MMA_QUERIES + 2
    check((heads(shift, 64, np.float32, n_seq, n_seq + shift, 1), {"mask": mask}), gemm.PARTS)


@every_variant
def test_every_variant(d_head, dtype, n_parts):
    call = heads(0, d_head, dtype, 37, 70, 4, 2, (2,)), {"mask": causal()}
    check(call, n_parts)


@pytest.mark.parametrize("n_parts", [gemm.PARTS, 1])
@pytest.mark.parametrize("columns", [(3, 40), (8, 5)])
def test_keys_and_values_as_columns_of_a_longer_array(columns, n_parts):
    """What lies before and behind them is NaN, and is not looked at."""
    before, behind = columns
    q, k, v = heads(1, 64, np.float32, 20, 35, 4, 2, (2,))
    around = [(0, 0), (0, 0), (before, behind), (0, 0)]
    there = [moved(np.pad(x, around, constant_values=np.nan))[:, :, before:-behind] for x in (k, v)]
    got = attention_in_parts(n_parts, moved(q), *there, mask=causal())
    assert got.get().tobytes() == many(q, k, v, n_parts, mask=causal()).tobytes()
    assert np.isfinite(got.get()).all()


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(BF16, marks=slow)])
def test_rows_that_no_load_of_16_bytes_fits_are_copied(dtype, monkeypatch):
    """Channels of wider rows, and values whose channels are apart."""
    q, k, v = heads(11, 64, dtype, 20, 35)
    wider = moved(np.pad(k, [(0, 0), (0, 0), (0, 0), (1, 2)], constant_values=np.nan))
    turned = guard.xp.matrix_transpose(moved(np.swapaxes(v, -1, -2).copy()))
    launch, places = launching.launch, []

    def watching(kernel, definitions, n_blocks, n_threads, q, k, v, *rest):
        places.extend(x.data.ptr for x in (k, v))
        places.extend(n for x in (k, v) for n in x.strides[:-1])
        launch(kernel, definitions, n_blocks, n_threads, q, k, v, *rest)

    want = many(q, k, v, mask=causal())
    monkeypatch.setattr(launching, "launch", watching)
    got = cuda.attention(moved(q), wider[..., 1:-2], turned, mask=causal())
    assert got.get().tobytes() == want.tobytes()
    assert places and not any(place % launching.ALIGNMENT for place in places)


@every_variant
def test_one_visible_key_gives_its_value(d_head, dtype, n_parts):
    """The weight is 1: three parts are the value itself, to the last bit, and one is bfloat16."""
    q, k, v = heads(2, d_head, dtype, 40, 40)
    got = many(q, k, v, n_parts, mask=sliding_window(1))
    want = (v if n_parts == gemm.PARTS else v.astype(BF16)).astype(np.float32)
    assert (got == want).all() and got.shape == (1, 2, 40, d_head)


def logistic(seed=3):
    """Keys 0 and 1 with values 0 and 1, so that each query gives 1 / (1 + exp(-s)) of the second
    key's score s; one channel of a query is not 0, so that s is one product.  Returns q, k, v and s.
    """
    rng = np.random.default_rng(seed)
    q, k = np.zeros((1, 1, 64, 64), np.float32), np.zeros((1, 1, 2, 64), np.float32)
    k[..., 1, :] = rng.uniform(1, 2, 64)
    q[0, 0, np.arange(64), np.arange(64)] = rng.uniform(0.5, 2, 64)
    v = np.broadcast_to(np.array([0.0, 1.0], np.float32)[:, None], k.shape).copy()
    return q, k, v, (q.astype(np.float64) @ k[0, 0, 1])[0, 0]


def error_of_scores(got, s):
    """|y - y'| in units of what float32 moves y = 1 / (1 + exp(-s)) by: of a product in 3 parts
    2**-23 at most is left out, and it is scaled twice; then 8 roundings of exponentials, sum, and
    quotient.
    """
    y = 1 / (1 + np.exp(-s))
    unit = y * (1 - y) * s * (2 + 4) * EPSILON + 8 * EPSILON * y
    return (abs(got[0, 0] - y[:, None]) / unit[:, None]).max()


def test_three_parts_have_the_scores_of_float32_and_one_has_not():
    q, k, v, s = logistic()
    assert error_of_scores(many(q, k, v, scale=1.0), s) <= 1
    assert error_of_scores(plain(q, k, v, scale=1.0), s) <= 1
    assert error_of_scores(many(q, k, v, 1, scale=1.0), s) > 1000


def test_one_part_rounds_queries_keys_values_and_weights():
    """The result moves by some 2**-10 for each, and rounded inputs leave the weights."""
    q, k, v = heads(4, 64, np.float32, 40, 70)
    got = many(q, k, v, 1, scale=0.5)
    for n in range(3):
        rounded = [x.astype(BF16) if i != n else x for i, x in enumerate((q, k, v))]
        want = ops.attention(*wide(*rounded), scale=0.5)
        assert abs(got - want).max() > 2.0**-10 * abs(want).max()
    want = ops.attention(*wide(q, k, v, rounded=True), scale=0.5)
    assert 2.0**-13 < abs(got - want).max() / abs(want).max() < 2.0**-8


@pytest.mark.parametrize("n_parts", [gemm.PARTS, 1])
def test_a_sequence_has_the_same_bits_alone_and_beside_longer_ones(n_parts):
    """Padded on the left: tiles of keys begin at its first key, wherever its queries lie."""
    n_ctx, lengths = 150, [150, 131, 70, 17, 2]
    q, k, v = heads(5, 64, np.float32, n_ctx, n_ctx, lead=(len(lengths),))
    start = [n_ctx - n for n in lengths]
    beside = many(q, k, v, n_parts, mask=causal(), start=start)
    for row, first in enumerate(start):
        one = (x[row : row + 1, :, first:] for x in (q, k, v))
        assert many(*one, n_parts, mask=causal())[0].tobytes() == beside[row, :, first:].tobytes()
        assert not beside[row, :, :first].any()


# ------------------------------------------------------------------------- NaN, infinities, nothing


def tiles_of(y):
    """Rows in the tiles of a warp: the bytes of each, head by head."""
    flat = y.reshape(-1, *y.shape[-2:])
    return [
        head[at : at + QUERIES].tobytes() for head in flat for at in range(0, len(head), QUERIES)
    ]


@pytest.mark.parametrize("n_parts", [gemm.PARTS, 1])
@given(st.data())
@settings(max_examples=draws(10, 80))
def test_nan_infinities_and_the_largest_numbers_give_what_the_other_kernel_gives(n_parts, data):
    """In queries, keys or values, seen by some rows and hidden from others.  A tile with a result
    that is not finite has the bits of attention.cu; a head and sequence that none of them is in,
    the bits that it has without them.
    """
    q, k, v = heads(data.draw(seeds), 64, np.float32, 40, 50, 2, 2, (2,))
    options = {"mask": data.draw(st.sampled_from([causal(), sliding_window(20)]))}
    options["start"] = data.draw(st.sampled_from([[0, 30], [5, 50]]))
    clean, hit = many(q, k, v, n_parts, **options), np.zeros((2, 2), bool)
    for _ in range(data.draw(st.integers(1, 2))):
        x = data.draw(st.sampled_from([q, k, v]))
        place = [data.draw(st.integers(0, n - 1)) for n in x.shape]
        x[tuple(place)] = data.draw(st.sampled_from(SPECIAL))
        hit[place[0], place[1]] = True
    with np.errstate(all="ignore"):
        got, want = many(q, k, v, n_parts, **options), plain(q, k, v, **options)
    alike(got, want, times=20 if n_parts == gemm.PARTS else 2.0**12)
    finite = np.isfinite(want).all(axis=-1)
    for one, other, fine in zip(
        tiles_of(got), tiles_of(want), tiles_of(finite[..., None]), strict=True
    ):
        assert one == other or all(fine)
    assert got[~hit].tobytes() == clean[~hit].tobytes()


@pytest.mark.parametrize("n_parts", [gemm.PARTS, 1])
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", ["k", "v"])
def test_a_hidden_key_counts_for_nothing_whatever_it_holds(name, special, n_parts):
    """Before the first slot of a row, outside a window, after the query, at the end of the keys."""
    q, k, v = heads(6, 64, np.float32, 64, 150, lead=(2,))
    first, n_seq, window, start = 70, 64, 30, [75, 100]
    slots = {"q_slots": range(first, first + n_seq), "k_slots": range(150)}
    options = {"mask": sliding_window(window), "start": start, **slots}
    clean, other = many(q, k, v, n_parts, **options), plain(q, k, v, **options)
    for b in range(2):
        hidden = [*range(max(start[b], first - window + 1)), *range(first + n_seq, 150)]
        {"k": k, "v": v}[name][b, :, hidden] = special
    with np.errstate(all="ignore"):
        got = many(q, k, v, n_parts, **options)
    assert np.isfinite(got).all() and got.any()
    for one, *either in zip(tiles_of(got), tiles_of(clean), tiles_of(other), strict=True):
        assert one in either[: 1 if name == "k" else 2]  # 0 times a hidden value may be NaN


def flags(q, k, v, **options):
    """What attention_mma.cu leaves in `failed`, where there was something else before."""
    seen, launch = [], launching.launch

    def watching(kernel, definitions, *arguments):
        if kernel == "attention_mma":
            (failed,) = (x for x in arguments if getattr(x, "dtype", None) == np.int32)
            failed.set(np.full(failed.shape, 7, np.int32))
            launch(kernel, definitions, *arguments)
            seen.append(failed.get())
        else:
            launch(kernel, definitions, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "launch", watching)
        many(q, k, v, **options)
    (found,) = seen
    return found.reshape(*q.shape[:-2], -(-q.shape[-2] // QUERIES))


@pytest.mark.parametrize("n_seq", [2, QUERIES, MMA_QUERIES, MMA_QUERIES + 2])
def test_only_tiles_with_something_that_is_not_finite_are_computed_again(n_seq):
    q, k, v = heads(7, 64, np.float32, n_seq, n_seq, 2, 2)
    assert not flags(q, k, v, mask=causal()).any()
    q[0, 1, n_seq - 1, 5] = np.nan
    found = flags(q, k, v, mask=causal())
    assert found[0, 1, -1] == 1 == found.sum()


@pytest.mark.parametrize("n_parts", [gemm.PARTS, 1])
def test_a_row_without_keys_gives_zero(n_parts):
    """Queries before the first key, beside others that see some; and padding up to the end."""
    q, k, v = heads(8, 64, np.float32, 40, 40, lead=(2,))
    got = many(q, k, v, n_parts, mask=causal(), q_slots=range(-20, 20), k_slots=range(40))
    assert not got[:, :, :20].any() and (abs(got[:, :, 20:]).max(axis=-1) > 0).all()
    got = many(q, k, v, n_parts, mask=causal(), start=[40, 39])
    assert not got[0].any() and not got[1, :, :39].any() and got[1, :, 39:].all()


@pytest.mark.parametrize("large", [np.inf, 2.5e38])
@pytest.mark.parametrize("n_parts", [gemm.PARTS, 1])
def test_scores_of_minus_infinity_alone_give_zero_and_the_lowest_scores_their_weights(
    n_parts, large
):
    q, k, v = heads(9, 64, np.float32, 18, 40, 4, 2, (2,))
    k[..., 0], q[..., 0] = -1, large
    with np.errstate(all="ignore"):
        got, want = (f(q, k, v, scale=1.0) for f in (lambda *a, **o: many(*a, n_parts, **o), plain))
    assert np.isfinite(got).all() and bool(got.any()) == (large != np.inf)
    alike(got, want, times=4 if n_parts == gemm.PARTS else 2.0**12)


# ---------------------------------------------------------------------------------- planted faults

FAULTS = {
    "products of the second order left out": (
        "int i = P - 1 - j; i >= 0",
        "int i = P - 2 - j; i >= 0",
    ),
    "the second word of a key": ("{row[0], row[4]}", "{row[0], row[2]}"),
    "the other rows of queries": (
        "w % 2 * 8;\n                int channel",
        "w / 2 * 8;\n                int channel",
    ),
    "values of the next pair of keys": (
        "S::KEYS / 16; ++step) {\n            unsigned weights",
        "S::KEYS / 16; step += 2) {\n            unsigned weights",
    ),
    "weights of the other keys": (
        "s[step * 2 + w / 2] + w % 2 * 2",
        "s[step * 2 + w % 2] + w / 2 * 2",
    ),
    "no decay of the sums": ("a[c][2 * h] *= decay;", ""),
    "keys after the query": ("low <= distance &&", "low - 1 <= distance &&"),
    "one key too few of a window": ("distance < high;", "distance < high - 1;"),
    "the maximum of two lanes": (
        "most[h] = fmaxf(most[h], __shfl_xor_sync(ALL_LANES, most[h], 2));",
        "",
    ),
    "no flag": ("failed[row / ROWS] = bad", "failed[row / ROWS] = 0"),
    "no flag for a score that is not finite": ("score += score - score;", ""),
    "padding that is looked at": ("start ? (int)(start[b] - k_slot) : 0", "0"),
    "the first head of keys": ("kv = h / (n_head / n_kv_head)", "kv = 0"),
}


def special_values():
    """One after another in tiles of their own; scores of -2.5e38 overflow in base 2."""
    q, k, v = heads(10, 64, np.float32, 40, 60)
    k[0, 0, 50, 3], v[0, 0, 20, 5] = np.nan, np.inf
    with np.errstate(all="ignore"):
        alike(many(q, k, v, mask=causal()), plain(q, k, v, mask=causal()))
    test_scores_of_minus_infinity_alone_give_zero_and_the_lowest_scores_their_weights(3, 2.5e38)


def everything():
    """The checks above on one width, in short."""
    for seed, options in enumerate(
        [{"mask": causal(), "start": [0, 20]}, {"mask": sliding_window(9)}]
    ):
        check((heads(seed, 64, np.float32, 45, 70, 4, 2, (2,)), options), gemm.PARTS)
    test_three_parts_have_the_scores_of_float32_and_one_has_not()
    special_values()


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow) for name in FAULTS])
def test_a_wrong_kernel_fails(name, monkeypatch):
    everything()
    text, replacement = FAULTS[name]
    source = cuda.source("attention_mma")
    assert text in source, f"the source has no {text!r}"
    edited = source.replace(text, replacement)

    def launch(kernel, *arguments):
        kernel_shim.launch(kernel, *arguments, text=edited if kernel == "attention_mma" else None)

    monkeypatch.setattr(launching, "launch", launch)
    with pytest.raises(AssertionError):
        everything()
