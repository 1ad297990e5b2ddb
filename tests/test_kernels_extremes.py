"""Numbers and sizes at the edge, in every set: all exponents, infinity, NaN, eps = 0, axes of
length 0.
"""

import functools
import itertools
import math
import warnings

import numpy as np
import pytest
import test_kernels_layouts as layouts
from close import close
from composed import Composed, definitions

from npllm import NpllmError, kernels, ops
from npllm.cache import KVCache
from npllm.models.params import LayerParams
from npllm.ops import mask
from npllm.quantized.int8 import quantize

SETS = {
    name: set_ and Composed(set_)
    for name, set_ in (
        ("reference", ops.reference),
        ("blockwise", ops.blockwise),
        ("tiled", kernels.tiled_ops()),
        ("compiled", kernels.compiled_ops()),
    )
}
SMALLEST, SMALLEST_NORMAL, LARGEST = 2.0**-149, 2.0**-126, float(np.finfo(np.float32).max)
SPECIAL = np.array(
    [
        0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        LARGEST,
        -LARGEST,
        -3e38,
        SMALLEST,
        -SMALLEST,
        -87.3,
        -87.34,
        -88.73,
        -103.9,
        -104.1,
        -108.7,
        -110.1,
        88.72283,
        88.723,
    ],
    np.float32,
)

needs_numba = pytest.mark.skipif(SETS["compiled"] is None, reason="Numba is not installed")


@pytest.fixture(params=SETS)
def tested(request):
    """A set."""
    if SETS[request.param] is None:
        pytest.skip(kernels.why_not_compiled())
    return SETS[request.param]


def sweep(n):
    """float32 of every exponent and both signs, n of each, densely about 0, and the special ones; a
    multiple of 16.
    """
    bits = np.arange(512, dtype=np.uint32)[:, None] << 23 | np.random.default_rng(0).integers(
        0, 2**23, (512, n), np.uint32
    )
    x = np.concatenate(
        [SPECIAL, bits.ravel().view(np.float32), np.linspace(-120, 120, 512 * n, dtype=np.float32)]
    )
    x[np.isnan(x)] = np.nan  # a quiet one
    return np.concatenate([x, np.ones(-len(x) % 16, np.float32)])


def units(got, want):
    """|got - want| in units of the last place of float32 [...], NaN where either is; infinities and
    NaN must be in one place.
    """
    with np.errstate(all="ignore"):
        rounded = want.astype(np.float32)
        place = np.maximum(2.0 ** (np.frexp(np.abs(want))[1] - 24.0), SMALLEST)
        error = np.abs(got - want) / place
    assert np.array_equal(np.isnan(got), np.isnan(want))
    odd = np.isinf(got) | np.isinf(rounded)
    assert np.array_equal(got[odd], rounded[odd])
    return np.where(odd | np.isnan(want), 0, error)


def in_float64(formula, x):
    """A formula of one number, over an array, in float64."""
    with np.errstate(all="ignore"):
        return formula(x.astype(np.float64))


def exponentials(x):
    """e**x as the softmax of the compiled set computes it."""
    from npllm.kernels.cpu.softmax import exponentials

    y = x.copy()
    exponentials(y, np.float32(0))
    return y


@needs_numba
def test_the_exponential_over_all_exponents():
    x = sweep(300)
    want = in_float64(np.exp, x)
    small = want < SMALLEST_NORMAL
    got = exponentials(x)
    assert units(got[~small], want[~small]).max() <= 1  # 0.91 over 3 million numbers
    assert (got[small] == 0).all()  # a weight that no sum with the largest, 1, can show


def gates(o, x, length):
    """silu(x), computed as swiglu of the set, in rows of some length."""
    rows = np.concatenate([x, np.ones(-len(x) % length, np.float32)]).reshape(-1, length)
    return o.swiglu(rows, np.ones_like(rows)).reshape(-1)[: len(x)]


def gates_inside(n_rows):
    """silu(x) as it is computed inside the fusions of the compiled set: of a few rows, and of
    panels; x in the bias of gate.
    """

    def silu(x):
        y = [
            SETS["compiled"].norm_swiglu(
                np.ones((n_rows, 64), np.float32),
                np.zeros(64, np.float32),
                1e-5,
                np.zeros((2 * len(part), 64), np.float32),
                np.concatenate([part, np.ones_like(part)]),
            )
            for part in np.array_split(x, 2)
        ]
        assert all(np.array_equal(part[:1].repeat(n_rows, 0), part, equal_nan=True) for part in y)
        return np.concatenate([part[-1] for part in y])

    return silu


FAR_BELOW = 64  # units where e**x is no normal number: 64 of the smallest float32 there are 9e-44


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "silu", ["silu", "reference", "tiled", "compiled", "compiled, 1 row", "compiled, 13 rows"]
)
def test_silu_over_all_exponents(silu):
    if "compiled" in silu and SETS["compiled"] is None:
        pytest.skip(kernels.why_not_compiled())
    inside = {
        "silu": ops.silu,
        "compiled, 1 row": gates_inside(1),
        "compiled, 13 rows": gates_inside(13),
    }
    x = sweep(20)
    got = inside[silu](x) if silu in inside else gates(SETS[silu], x, 33)
    want = in_float64(lambda x: x / (1 + np.exp(-x)), x)
    error = units(got, want)
    far = (x < -87) & ("row" not in silu)
    assert error[~far].max() <= 4
    assert error[far].max(initial=0) <= FAR_BELOW
    below = (got == 0) & (x != 0)
    assert np.array_equal(np.signbit(got[below]), np.signbit(x[below]))


@pytest.mark.filterwarnings("error")
def test_a_gate_far_below_zero_gives_zero(tested):
    gate = np.full((2, 16), -3e38, np.float32)
    assert (tested.swiglu(gate, np.ones_like(gate)) == 0).all()
    for n in (1, 13):
        weight = np.concatenate(
            [np.full((16, 64), -3e38 / 64, np.float32), np.full((16, 64), 1 / 64, np.float32)]
        )
        ones = np.ones((n, 64), np.float32)
        assert (np.abs(tested.norm_swiglu(ones, ones[0], 0.0, weight)) < 1e-30).all()


@pytest.mark.filterwarnings("error")
def test_gelu_over_all_exponents(tested):
    x = sweep(20)
    want = np.array([n * math.erfc(n * -math.sqrt(0.5)) / 2 for n in x.astype(np.float64).tolist()])
    assert units(tested.gelu(x), want).max() <= 1


def test_the_tanh_form_of_gelu_over_all_exponents(tested):
    x = sweep(20)
    turn = in_float64(lambda x: math.sqrt(2 / math.pi) * (x + 0.044715 * x**3), x)
    want = in_float64(lambda x: x / (1 + np.exp(-2 * turn)), x)
    # float32 rounds the argument of exp, up to 104, seven times: it is off by up to 104 * 7 / 2
    # units
    assert units(tested.gelu(x, "tanh"), want).max() <= 364


def test_erfc_is_that_of_the_c_library():
    x = np.concatenate(
        [np.linspace(-28, 28, 4001), [0.0, np.inf, -np.inf, 0.46875, 4.0, 1e-300, 1e300]]
    )
    want = np.array([math.erfc(n) for n in x])
    normal = want > 1e-307
    assert np.abs(ops.erfc(x)[normal] / want[normal] - 1).max() < 2e-13
    close(ops.erfc(x), want)
    assert np.isnan(ops.erfc(np.array([np.nan]))).all()


def test_softmax_of_scores_of_every_size(tested):
    scores = np.array([[0, -1, -50, -86, -95, -3e38, 3e38, 1e30, -1e-38]], np.float32)
    for top in (0.0, 90.0, 3e38):
        k = np.minimum(scores, np.float32(top))[
            0, :, None
        ]  # with q = 1, v = identity: the weights themselves
        y = tested.attention(
            np.ones((1, 1, 1), np.float32), k[None], np.eye(9, dtype=np.float32)[None], scale=1.0
        )
        e = np.exp(k.astype(np.float64)[:, 0] - k.max())
        close(y[0, 0], e / e.sum(), dtype="float32")


@pytest.mark.parametrize("n_seq", [1, 5, 40])
@pytest.mark.parametrize(
    "rule", [mask.causal(), lambda i, j: (j <= i) & (j >= 0)], ids=["band", "function"]
)
def test_nan_in_a_key_reaches_every_query_that_sees_it(tested, n_seq, rule):
    y = rows_with_nan(tested, n_seq, rule, slice(16, 32))  # a key of both heads
    assert np.isfinite(y[:, :20]).all() and np.isnan(y[:, 20:]).all()


@pytest.mark.parametrize("n_seq", [1, 5, 40])
@pytest.mark.parametrize(
    "rule", [mask.causal(), lambda i, j: (j <= i) & (j >= 0)], ids=["band", "function"]
)
def test_nan_in_a_query_stays_in_its_row(tested, n_seq, rule):
    y = rows_with_nan(tested, n_seq, rule, slice(0, 16))
    assert np.isnan(y[:, 20]).all() and np.isfinite(np.delete(y, 20, axis=1)).all()


def rows_with_nan(tested, n_seq, rule, where):
    """Attention of 40 tokens, n_seq of them after the others, of which one has NaN somewhere."""
    qkv = np.random.default_rng(0).standard_normal((1, 40, 6 * 8), dtype=np.float32)
    qkv[0, 20, where] = np.nan
    cache, tables = KVCache(1, 1, 64), np.ones((2, 40, 8), np.float32)
    parts = [slice(0, 40 - n_seq), slice(40 - n_seq, 40)]
    rows = [
        tested.rope_attention(qkv[:, at], *tables[:, at], 2, 2, mask=rule, cache=cache)
        for at in parts
        if at.start < at.stop
        and not cache.advance(*np.zeros((2, 1, at.start - cache.n_ctx), int), None, None)
    ]
    return np.concatenate(rows, axis=1)


# --------------------------------------------------------------------------------------------------------- a row of zeros, eps = 0

D_MODEL, D_FF, N_HEAD, N_KV, D_HEAD = 64, 64, 2, 2, 32


def weights(dtype=np.float32):
    rng = np.random.default_rng(0)
    sizes = [
        (D_MODEL,),
        ((N_HEAD + 2 * N_KV) * D_HEAD, D_MODEL),
        (D_MODEL, N_HEAD * D_HEAD),
        (D_MODEL,),
        (2 * D_FF, D_MODEL),
        (D_MODEL, D_FF),
    ]
    drawn = [rng.standard_normal(size, dtype=np.float32) for size in sizes]
    return LayerParams(
        *(
            quantize(w)
            if dtype == "int8" and w.ndim == 2
            else w
            if dtype == "int8"
            else w.astype(dtype)
            for w in drawn
        )
    )


def normed(o, x, w):
    """Every op that normalises rows x [1, n, d_model] with eps = 0."""
    tables = np.ones((2, x.shape[1], D_HEAD), np.float32)
    gain = w.input_layernorm
    yield o.rms_norm(x, gain, 0.0)
    yield o.layer_norm(x, gain, gain, 0.0)
    yield o.norm_linear(x, gain, 0.0, w.qkv_proj)
    yield o.norm_swiglu(x, gain, 0.0, w.gate_up_proj)
    yield o.mlp_block(x, gain, 0.0, w.gate_up_proj, w.down_proj)
    for cache in (None, KVCache(1, 2, 512)):
        heads = (*tables, N_HEAD, N_KV)
        yield o.attention_block(
            x, gain, 0.0, w.qkv_proj, w.o_proj, *heads, mask=mask.causal(), cache=cache
        )
        yield o.decoder_layers(
            x, (w, w), 0.0, *heads, masks=[mask.causal()] * 2, cache=cache and KVCache(1, 2, 512)
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, "int8"], ids=str)
@pytest.mark.parametrize("n", [1, 2, 13, 300])
@pytest.mark.parametrize("x_dtype", [np.float32, np.float64], ids=str)
def test_a_row_of_zeros_with_eps_0_is_nan_and_nothing_is_raised(tested, n, dtype, x_dtype):
    x, w = np.zeros((1, n, D_MODEL), x_dtype), weights(dtype)
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        for y in normed(tested, x, w):
            assert y.dtype == x_dtype and np.isnan(y).all()


def test_a_row_of_zeros_with_eps_0_leaves_the_others_as_they_are(tested):
    x, w = np.random.default_rng(1).standard_normal((1, 20, D_MODEL), dtype=np.float32), weights()
    some = x.copy()
    some[:, 7] = 0
    for got, want in itertools.islice(
        zip(normed(tested, some, w), normed(tested, x, w), strict=True), 5
    ):
        assert np.isnan(got[:, 7]).all()
        close(np.delete(got, 7, axis=1), np.delete(want, 7, axis=1), times=4)


@pytest.mark.parametrize("dtype", [layouts.BFLOAT16, layouts.FLOAT32], ids=str)
@pytest.mark.parametrize("name", layouts.ARGUMENTS)
def test_nothing_is_raised_whatever_the_numbers_are(tested, name, dtype):
    """Infinity, NaN and the largest numbers stand in one argument after the other."""
    for shape in ((1, 1), (1, 13), (2, 40)):
        drawn = layouts.ARGUMENTS[name](layouts.Draw(*shape, dtype))
        arrays = [
            key
            for key, x in drawn.items()
            if isinstance(x, np.ndarray) and x.dtype.kind not in "iu"
        ]
        for at in arrays:
            spoilt = drawn[at].copy()
            spoilt.reshape(-1)[:: spoilt.size // 6 + 1] = np.array(
                [np.inf, LARGEST / 2, np.nan, -np.inf, 0, -LARGEST / 2], spoilt.dtype
            )[: len(range(0, spoilt.size, spoilt.size // 6 + 1))]
            with warnings.catch_warnings(), np.errstate(all="raise"):
                warnings.simplefilter("error")
                layouts.result(getattr(tested, name), drawn | {at: spoilt})


# ------------------------------------------------------------------------------------------------------------- axes of length 0


def ones(*shape):
    return np.ones(shape, np.float32)


def calls():
    """Calls of every op with axes of length 0 and others, as (name, arguments, options)."""
    for n, d, m in itertools.product((0, 1, 13), (0, 1, 4), (0, 1, 4)):
        for x in (ones(n, d), ones(2, n, d)):
            yield from _products(x, d, m)
            yield from _rows(x, d)
        yield "embed", (np.zeros((2, n), int), ones(m, d)), {}
        yield "embed", (np.zeros(n, int), quantize(ones(m, d))), {}
        yield "add_positions", (ones(2, n, d), np.arange(n), ones(13, d)), {}
        yield "rope_tables", (np.arange(n), ones(d)), {}
    for b, n, h, kv, d in itertools.product((0, 1, 2), (0, 1, 13), (0, 2), (0, 1), (0, 4)):
        yield from _attention(b, n, h, kv, d)


def _products(x, d, m):
    for weight in (ones(m, d), ones(m, d).astype(np.float16), quantize(ones(m, d))):
        yield "linear", (x, weight), {}
        yield "linear", (x, weight, ones(m)), {}
        yield "norm_linear", (x, ones(d), 1e-5, weight), {}
        yield "linear_add", (x, weight, ones(*x.shape[:-1], m)), {}
    for both, down in (
        (ones(2 * m, d), ones(d, m)),
        (quantize(ones(2 * m, d)), quantize(ones(d, m))),
    ):
        yield "norm_swiglu", (x, ones(d), 1e-5, both), {}
        yield "mlp_block", (x, ones(d), 1e-5, both, down), {}


def _rows(x, d):
    yield "rms_norm", (x, ones(d), 1e-5), {}
    yield "layer_norm", (x, ones(d), ones(d), 1e-5), {}
    for name in ("silu", "relu", "gelu"):
        yield name, (x,), {}
    yield "gelu", (x, "tanh"), {}
    yield "add", (x, x), {}
    yield "swiglu", (x, x), {}


def _attention(b, n, h, kv, d):
    tables = (ones(n, d), ones(n, d))
    yield "apply_rope", (ones(b, h, n, d), *tables), {}
    for n_ctx, d_value in itertools.product((0, n, n + 3), (0, d)):
        q, k, v = ones(b, h, n, d), ones(b, kv, n_ctx, d), ones(b, kv, n_ctx, d_value)
        yield "attention", (q, k, v), {}
        yield "attention", (q, k, v), {"mask": mask.causal(), "return_lse": True}
    for cached, rule in itertools.product((False, True), (None, mask.causal())):
        options = {"mask": rule, "cache": (lambda: KVCache(max(b, 1), 2, 64)) if cached else None}
        yield "rope_attention", (ones(b, n, (h + 2 * kv) * d), *tables, h, kv), options
        for d_model in (0, 4):
            qkv, out = ones((h + 2 * kv) * d, d_model), ones(d_model, h * d)
            yield (
                "attention_block",
                (ones(b, n, d_model), ones(d_model), 1e-5, qkv, out, *tables, h, kv),
                options,
            )
            layer = LayerParams(
                ones(d_model), qkv, out, ones(d_model), ones(2 * d, d_model), ones(d_model, d)
            )
            masks = {"masks": [rule, rule], "cache": options["cache"]}
            yield (
                "decoder_layers",
                (ones(b, n, d_model), (layer, layer), 1e-5, *tables, h, kv),
                masks,
            )


def outcome(o, name, arguments, options):
    """What an op returns, or its error."""
    options = {
        key: value() if key == "cache" and value else value for key, value in options.items()
    }
    try:
        y = getattr(o, name)(*arguments, **options)
    except NpllmError as error:
        return type(error), str(error)
    return y


@functools.cache
def wanted():
    """(call, what the definition gives) of all calls."""
    return [(call, outcome(definitions, *call)) for call in calls()]


@pytest.mark.filterwarnings("error")
def test_axes_of_length_0_are_as_in_the_definition_or_one_clear_error(tested):
    names, n_result = set(), 0
    for (name, arguments, options), want in wanted():
        names.add(name)
        is_error = isinstance(want, tuple) and isinstance(want[0], type)
        if getattr(tested, name) is getattr(definitions, name):
            n_result += not is_error
            continue
        got = outcome(tested, name, arguments, options)
        if is_error:
            assert got == want, (name, arguments)
            continue
        n_result += 1
        for mine, theirs in zip(
            *((y if isinstance(y, tuple) else (y,)) for y in (got, want)), strict=True
        ):
            finite = np.where(np.isneginf(theirs), 0, theirs)  # lse of no key
            close(np.where(np.isneginf(mine), 0, mine), finite, times=4)
    assert names == set(ops.Ops.names()) and n_result > 1000


@pytest.mark.parametrize("d_out", [0, 3])
def test_a_layer_without_inputs_gives_its_bias(tested, d_out):
    bias = np.arange(d_out, dtype=np.float32)
    close(
        tested.linear(ones(2, 5, 0), ones(d_out, 0), bias),
        np.broadcast_to(bias, (2, 5, d_out)).copy(),
        times=0,
    )
    close(
        tested.linear(ones(2, 5, 0), ones(d_out, 0)), np.zeros((2, 5, d_out), np.float32), times=0
    )


def test_a_head_without_channels_is_refused(tested):
    with pytest.raises(NpllmError, match="at least one channel, got d_head = 0"):
        tested.attention(ones(1, 2, 3, 0), ones(1, 2, 3, 0), ones(1, 2, 3, 4))
