"""Every kernel against the definition whose place it takes, in both sets: values, signatures,
errors, and what it hands back.
"""

import gc
import inspect
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import oracles
import pytest
from close import close
from composed import Composed, definitions
from hypothesis import given
from hypothesis import strategies as st
from tiny import model, random_ids

from npllm import NpllmError, kernels, ops, threads
from npllm.cache import KVCache
from npllm.kernels.cpu import tiled_attention
from npllm.models.params import LayerParams
from npllm.ops import mask
from npllm.quantized.int8 import quantize

STORED = (ml_dtypes.bfloat16, np.float16, np.float32)
EPS = 1e-5
SETS = {
    name: set_ and Composed(set_)
    for name, set_ in (("tiled", kernels.tiled_ops()), ("compiled", kernels.compiled_ops()))
}
NAMES = [name for name in ops.Ops.names() if name not in ops.SLOTS]

needs_numba = pytest.mark.skipif(SETS["compiled"] is None, reason="Numba is not installed")


@pytest.fixture(params=SETS)
def fast(request):
    """One of the fast sets."""
    if SETS[request.param] is None:
        pytest.skip(kernels.why_not_compiled())
    return SETS[request.param]


def each_set(test):
    """Run a Hypothesis test on every set there is."""
    return pytest.mark.parametrize("fast", [s for s in SETS.values() if s], ids=lambda s: s.name)(
        test
    )


def normal(shape, seed, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def cancelled(x, weight, desired):
    """How much larger the partial sums are than the largest result, at least 1.

    The rounding errors of a sum are in proportion to its partial sums, of the size of
    sqrt(sum_j (x_j w_j)^2), not to its result: one product of 58 numbers may cancel to a hundredth.
    """
    wide = np.abs(weight.astype(np.float64))
    partial = np.sqrt(np.abs(x.astype(np.float64)) ** 2 @ (wide**2).T)
    return max(1.0, partial.max() / max(np.abs(desired).max(), 1e-300))


def read_only(x):
    """As the weights of a checkpoint are: Numba compiles for arrays that may be written to anew."""
    x.flags.writeable = False
    return x


def weight_of(d_out, d_in, seed, dtype, divisor=1):
    return read_only(normal((d_out, d_in), seed, dtype) / dtype(divisor))


def gain_of(d, seed, dtype=np.float32):
    """Also a bias."""
    return read_only(normal(d, seed, dtype))


SIZES = {
    "n": st.sampled_from([1, 2, 4, 5, 16, 17, 40]),
    "d_in": st.integers(1, 80),
    "d_out": st.integers(1, 40),
    "dtype": st.sampled_from(STORED),
    "seed": st.integers(0, 99),
}


def same_cache(n_layer, mine, theirs, times=1):
    """Compare what two caches keep of every layer."""
    for layer in range(n_layer):
        (*held, slots), (*expected, their_slots) = mine.kept(layer), theirs.kept(layer)
        assert slots == their_slots
        for x, y in zip(held, expected, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                close(x, y, times=times)


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_has_the_signature_of_its_definition(fast, name):
    definition = ops.blockwise_attention if name == "attention" else getattr(ops, name)
    mine = inspect.signature(getattr(fast, name)).parameters
    theirs = inspect.signature(definition).parameters
    theirs = {
        key: value
        for key, value in theirs.items()
        if key not in ("block_q", "block_k", "outer", "moved")
    }
    assert [(p.name, p.default, p.kind) for p in mine.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]


@each_set
@given(**SIZES)
def test_linear(fast, n, d_in, d_out, dtype, seed):
    x, weight, bias = (
        normal((2, n, d_in), seed),
        weight_of(d_out, d_in, seed + 1, dtype),
        gain_of(d_out, seed + 2, dtype),
    )
    for desired, got in (
        (oracles.linear(x, weight), fast.linear(x, weight)),
        (oracles.linear(x, weight, bias), fast.linear(x, weight, bias)),
    ):
        close(got, desired, dtype="float32", times=cancelled(x, weight, desired))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", STORED)
def test_weights_that_may_be_written_to(fast, dtype):
    for n in (1, 20):
        x, gain, weight = normal((n, 40), 0), normal(40, 1, dtype), normal((24, 40), 2, dtype)
        close(fast.linear(x, weight), oracles.linear(x, weight), dtype="float32")
        close(
            fast.norm_linear(x, gain, EPS, weight),
            oracles.linear(oracles.rms_norm(x, gain, EPS), weight),
            dtype="float32",
        )


@each_set
@given(**SIZES)
def test_norm_linear(fast, n, d_in, d_out, dtype, seed):
    x, gain, weight = (
        normal((n, d_in), seed),
        gain_of(d_in, seed + 3, dtype),
        weight_of(d_out, d_in, seed + 1, dtype),
    )
    close(
        fast.norm_linear(x, gain, EPS, weight),
        oracles.linear(oracles.rms_norm(x, gain, EPS), weight),
        dtype="float32",
    )


@each_set
@given(**SIZES)
def test_norm_swiglu(fast, n, d_in, d_out, dtype, seed):
    x, gain, weight = (
        normal((1, n, d_in), seed),
        gain_of(d_in, seed + 3, dtype),
        weight_of(2 * d_out, d_in, seed + 1, dtype),
    )
    bias = gain_of(2 * d_out, seed + 4, dtype) if seed % 2 else None
    rows = oracles.rms_norm(x, gain, EPS)
    both, y = oracles.linear(rows, weight, bias), fast.norm_swiglu(x, gain, EPS, weight, bias)
    wrong = np.abs(y - oracles.swiglu(both[..., :d_out], both[..., d_out:]))
    if bias is not None:  # as one channel more
        rows, weight = (
            np.concatenate([rows, np.ones_like(rows[..., :1])], -1),
            np.concatenate([weight, bias[:, None]], -1),
        )
    assert y.dtype == np.float32 and (wrong <= oracles.gated_bound(rows, weight)).all()


@each_set
@given(**SIZES)
def test_linear_add(fast, n, d_in, d_out, dtype, seed):
    x, residual, weight = (
        normal((n, d_in), seed),
        normal((n, d_out), seed + 3),
        weight_of(d_out, d_in, seed + 1, dtype),
    )
    before, bias = residual.copy(), gain_of(d_out, seed + 4, dtype)
    for desired, got in (
        (residual + oracles.linear(x, weight), fast.linear_add(x, weight, residual)),
        (residual + oracles.linear(x, weight, bias), fast.linear_add(x, weight, residual, bias)),
    ):
        close(got, desired, dtype="float32", times=cancelled(x, weight, desired))
    close(residual, before, times=0)


@each_set
@given(
    n=st.integers(1, 70),
    d=st.integers(1, 3000),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-4, 1, 1e4]),
)
def test_rows(fast, n, d, seed, scale):
    x, gain = (normal((n, d), seed) * scale).astype(np.float32), gain_of(d, seed + 1)
    close(
        fast.rms_norm(x, gain, EPS), ops.rms_norm(x.astype(np.float64), gain, EPS), dtype="float32"
    )
    close(
        fast.swiglu(x, x[::-1]),
        ops.swiglu(x.astype(np.float64), x[::-1].astype(np.float64)),
        dtype="float32",
    )


@each_set
@given(
    shape=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    scale=st.sampled_from([1e-4, 1, 100]),
    approximate=st.sampled_from(["none", "tanh"]),
    seed=st.integers(0, 99),
)
def test_gelu(fast, shape, scale, approximate, seed):
    x = (normal(shape, seed) * scale).astype(np.float32)
    other = np.moveaxis(x, 0, -1)  # not contiguous
    for a in (x, other):
        close(fast.gelu(a, approximate), ops.gelu(a, approximate), times=0.1)


@each_set
def test_swiglu_where_the_exponential_would_overflow(fast):
    gate = np.array([[-1e4, -200.0, -90.0, -88.0, 0.0, 90.0, 1e4, 3e38] * 4], np.float32)
    for n in (1, 20):
        eye = np.eye(32, dtype=np.float32)
        x = np.repeat(gate, n, axis=0)
        close(fast.swiglu(x, np.ones_like(x)), ops.swiglu(x, np.ones_like(x)))
        small = x[:, :7] / 1e4
        both = np.concatenate([eye[:7, :7], eye[:7, :7] * 0 + 1], axis=0)
        close(
            fast.norm_swiglu(small, np.full(7, 1e4, np.float32), EPS, both),
            definitions.norm_swiglu(
                small.astype(np.float64), np.full(7, 1e4), EPS, both.astype(np.float64)
            ),
            dtype="float32",
        )


@each_set
@given(**SIZES, biased=st.booleans())
def test_mlp_block(fast, n, d_in, d_out, dtype, seed, biased):
    x, gain, before = (
        normal((2, n, d_in), seed),
        gain_of(d_in, seed + 3, dtype),
        normal((2, n, d_in), seed),
    )
    both, down = (
        weight_of(2 * d_out, d_in, seed + 1, dtype, 8),
        weight_of(d_in, d_out, seed + 2, dtype, 8),
    )
    biases = (
        (gain_of(2 * d_out, seed + 4, dtype), gain_of(d_in, seed + 5, dtype))
        if biased
        else (None, None)
    )
    wide = [None if a is None else a.astype(np.float64) for a in (x, gain, both, down, *biases)]
    got = fast.mlp_block(x, gain, EPS, both, down, *biases)
    assert got.dtype == np.float32 and (x == before).all()
    close(got, definitions.mlp_block(wide[0], wide[1], EPS, *wide[2:]), times=4, dtype="float32")


# --------------------------------------------------------------------------------------------------------------- attention

RULES = {
    "none": None,
    "causal": mask.causal(),
    "window": mask.sliding_window(5),
    "nothing": ~mask.causal() & mask.causal(),
    "function": lambda i, j: (i + j) % 3 > 0,
}


@each_set
@given(
    rule=st.sampled_from(sorted(RULES)),
    n_kv=st.integers(1, 3),
    group=st.integers(1, 3),
    n_seq=st.integers(1, 20),
    n_more=st.integers(0, 20),
    d=st.integers(1, 40),
    d_value=st.integers(1, 20),
    seed=st.integers(0, 99),
    n_batch=st.integers(1, 2),
)
def test_attention(fast, rule, n_kv, group, n_seq, n_more, d, d_value, seed, n_batch):
    q, k = (
        normal((n_batch, n_kv * group, n_seq, d), seed),
        normal((n_batch, n_kv, n_seq + n_more, d), seed + 1),
    )
    v = normal((n_batch, n_kv, n_seq + n_more, d_value), seed + 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled_attention, "BLOCK_Q", 6)
        patch.setattr(tiled_attention, "BLOCK_K", 7)
        y, lse = fast.attention(q, k, v, mask=RULES[rule], return_lse=True)
    want, want_lse = ops.attention(
        *(x.astype(np.float64) for x in (q, k, v)), mask=RULES[rule], return_lse=True
    )
    cancelled = np.abs(v).max() / np.abs(want).max(initial=1e-30)  # a mean of values, which cancel
    close(y, want, dtype="float32", times=max(1.0, cancelled))
    close(lse, want_lse, dtype="float32")


@each_set
def test_phases_are_float64(fast):
    """In float32 they are off by 1e-4 at these positions."""
    inv_freq, at = ops.rope_frequencies(64), np.arange(3000, 4096)
    want = ops.rope_tables(at, inv_freq.astype(np.float64), 1.2)
    for got, right in zip(fast.rope_tables(at, inv_freq, 1.2), want, strict=True):
        close(got, right, dtype="float32", times=0.05)


@each_set
@given(
    n_kv=st.integers(1, 3),
    group=st.integers(1, 3),
    d_half=st.integers(1, 20),
    d_pass=st.integers(0, 3),
    n_batch=st.integers(1, 3),
    steps=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    window=st.sampled_from([None, 3, 6]),
    by_row=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rope_attention_and_the_cache_it_leaves(
    fast, n_kv, group, d_half, d_pass, n_batch, steps, window, by_row, padded, seed
):
    n_head, d_head, n_all = n_kv * group, 2 * d_half + d_pass, sum(steps)
    caches = [KVCache(n_batch, 1, 64, window) for _ in range(2)]
    valid = np.random.default_rng(seed).random((n_batch, n_all)) > (0.4 if padded else -1)
    done = 0
    for n in steps:
        qkv = normal((n_batch, n, (n_head + 2 * n_kv) * d_head), seed + done)
        positions = np.arange(done, done + n) + (np.arange(n_batch)[:, None] if by_row else 0)
        cos, sin = ops.rope_tables(positions, ops.rope_frequencies(2 * d_half), 1.2)
        rule = mask.causal() if window is None else mask.sliding_window(window)
        rule = rule & mask.padding(valid[:, : done + n]) if padded else rule
        got, want = (
            o.rope_attention(qkv, cos, sin, n_head, n_kv, mask=rule, cache=c)
            for o, c in zip((fast, definitions), caches, strict=True)
        )
        close(got, want)
        for c in caches:
            c.advance(
                np.zeros((n_batch, n), int), positions, valid[:, : done + n], np.zeros(n_batch, int)
            )
        done += n
    same_cache(1, *caches)


@each_set
@given(
    n_kv=st.integers(1, 3),
    group=st.integers(1, 3),
    d_half=st.integers(1, 20),
    n_batch=st.sampled_from([1, 2, 5, 13]),
    steps=st.lists(st.sampled_from([1, 1, 1, 1, 2, 7]), min_size=2, max_size=5),
    window=st.sampled_from([None, 3]),
    by_row=st.booleans(),
    padded=st.booleans(),
    dtype=st.sampled_from(STORED),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attention_block_and_the_cache_it_leaves(
    fast, n_kv, group, d_half, n_batch, steps, window, by_row, padded, dtype, biased, seed
):
    n_head, d_head, d_model, n_all = n_kv * group, 2 * d_half, 2 * (seed % 20) + 2, sum(steps)
    qkv_weight = weight_of((n_head + 2 * n_kv) * d_head, d_model, seed + 1, dtype)
    gain, o_weight = (
        gain_of(d_model, seed + 2, dtype),
        weight_of(d_model, n_head * d_head, seed + 3, dtype),
    )
    biases = (
        (gain_of(len(qkv_weight), seed + 4, dtype), gain_of(d_model, seed + 5, dtype))
        if biased
        else (None, None)
    )
    caches, done = [KVCache(n_batch, 3, 64, window) for _ in range(2)], 0
    valid = np.random.default_rng(seed).random((n_batch, n_all)) > (0.4 if padded else -1)
    rule = mask.causal() if window is None else mask.sliding_window(window)
    for n in steps:
        x, before = (
            normal((n_batch, n, d_model), seed + done),
            normal((n_batch, n, d_model), seed + done),
        )
        positions = np.arange(done, done + n) + (np.arange(n_batch)[:, None] if by_row else 0)
        tables = ops.rope_tables(positions, ops.rope_frequencies(2 * d_half))
        seen = rule & mask.padding(valid[:, : done + n]) if padded else rule
        got, want = (
            o.attention_block(
                x,
                gain,
                EPS,
                qkv_weight,
                o_weight,
                *tables,
                n_head,
                n_kv,
                *biases,
                mask=seen,
                cache=c,
                layer=2,
            )
            for o, c in zip((fast, definitions), caches, strict=True)
        )
        close(got, want, times=4)
        assert (x == before).all()
        for c in caches:
            c.advance(
                np.zeros((n_batch, n), int), positions, valid[:, : done + n], np.zeros(n_batch, int)
            )
        done += n
    assert [caches[0].kept(layer)[0] is None for layer in range(3)] == [True, True, False]
    same_cache(3, *caches, times=4)


# ------------------------------------------------------------------------------------------------------------- all layers

HEADS = (4, 2)  # n_head, n_kv_head; d_head is 8, d_model 24, d_ff 40


def a_layer(seed, dtype=np.float32, biased=False):
    """A layer's weights; dtype "int8": in 8 bits, d_model and d_ff 64."""
    d_model, d_ff, stored = (64, 64, np.float32) if dtype == "int8" else (24, 40, dtype)
    sizes = [
        (d_model,),
        (64, d_model),
        (d_model, 32),
        (d_model,),
        (2 * d_ff, d_model),
        (d_model, d_ff),
    ]
    if dtype == "int8":
        sizes[1:3] = (128, d_model), (d_model, 64)
    weights = [
        normal(size, seed + n, stored) / stored(1 if len(size) == 1 else 6)
        for n, size in enumerate(sizes)
    ]
    weights = [
        quantize(w) if dtype == "int8" and w.ndim == 2 else read_only(w.astype(stored))
        for w in weights
    ]
    biases = (
        [gain_of(weights[n].shape[0], seed + n, stored) for n in (1, 2, 4, 5)]
        if biased
        else [None] * 4
    )
    return LayerParams(*weights, *biases)


def through(o, layers, cache, n_seq=1, seed=0, masks="causal", layer=0):
    """Send tokens of every sequence of a cache through layers, and count them as seen."""
    n_batch, d_model = cache.n_batch, len(layers[0].input_layernorm)
    slots = np.arange(cache.n_ctx, cache.n_ctx + n_seq)
    cos, sin = ops.rope_tables(slots, ops.rope_frequencies(8))
    masks = [mask.causal()] * len(layers) if masks == "causal" else masks
    x, before = normal((n_batch, n_seq, d_model), seed), normal((n_batch, n_seq, d_model), seed)
    y = o.decoder_layers(x, layers, EPS, cos, sin, *HEADS, masks=masks, cache=cache, layer=layer)
    assert (x == before).all()
    cache.advance(
        np.zeros((n_batch, n_seq), int),
        slots,
        np.ones((n_batch, slots[-1] + 1), bool),
        np.zeros(n_batch, int),
    )
    return y


@pytest.fixture
def steps_of_all_layers(monkeypatch):
    """Calls of the one kernel for all layers: a list of their numbers of layers."""
    from npllm.kernels.cpu import compiled

    calls, kernel = [], compiled.layers_step
    monkeypatch.setattr(
        compiled,
        "layers_step",
        lambda x, first, table, *rest: (calls.append(len(table)), kernel(x, first, table, *rest)),
    )
    whole = compiled.logits_step

    def step(*arguments):
        calls.append(len(arguments[3][1]))  # the table
        return whole(*arguments)

    monkeypatch.setattr(compiled, "logits_step", step)
    return calls


@each_set
@given(
    n_layer=st.integers(1, 4),
    n_batch=st.sampled_from([1, 2, 5, 13]),
    steps=st.lists(st.sampled_from([1, 1, 1, 2, 7, 70]), min_size=2, max_size=5),
    window=st.sampled_from([None, 3]),
    dtype=st.sampled_from([*STORED, "int8"]),
    biased=st.booleans(),
    place=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_decoder_layers_and_the_cache_they_leave(
    fast, n_layer, n_batch, steps, window, dtype, biased, place, seed
):
    layers = tuple(a_layer(seed + 10 * n, dtype, biased) for n in range(n_layer))
    masks = [mask.causal() if window is None else mask.sliding_window(window)] * n_layer
    caches = [KVCache(n_batch, 6, 400, window) for _ in range(2)]
    for n in steps:
        got, want = (
            through(o, layers, c, n, seed + n, masks, place)
            for o, c in zip((fast, definitions), caches, strict=True)
        )
        close(got, want, times=8)
    same_cache(6, *caches, times=8)


@needs_numba
def test_one_token_takes_one_kernel_where_the_layers_are_alike(steps_of_all_layers):
    fast, layers, rule = SETS["compiled"], tuple(a_layer(10 * n) for n in range(3)), mask.causal()
    halves = tuple(a_layer(10 * n, ml_dtypes.bfloat16) for n in range(3))
    other = layers[1]._replace(down_proj=read_only(layers[1].down_proj.astype(np.float16)))
    wide = layers[1]._replace(
        gate_up_proj=weight_of(60, 24, 0, np.float32), down_proj=weight_of(24, 30, 1, np.float32)
    )
    strided = layers[1]._replace(o_proj=read_only(np.asfortranarray(layers[1].o_proj)))
    biased = layers[1]._replace(qkv_bias=gain_of(64, 5))
    odd = [rule, mask.sliding_window(2), rule]
    cases = [
        (layers, [rule] * 3, 3),
        (layers, None, 3),
        (list(layers), [rule] * 3, 0),
        (layers, odd, 0),
        (layers, [mask.causal() for _ in range(3)], 0),
    ]
    cases += [
        ((layers[0], changed, layers[2]), [rule] * 3, 0)
        for changed in (other, wide, strided, biased)
    ]
    cases += [
        (halves, [rule] * 3, 3),
        (
            (
                *halves[:2],
                halves[2]._replace(o_proj=read_only(halves[2].o_proj.astype(np.float16))),
            ),
            [rule] * 3,
            0,
        ),
    ]
    for own, masks, n in cases:
        caches = KVCache(2, 3, 64), KVCache(2, 3, 64)
        for n_seq in (4, 1):
            steps_of_all_layers.clear()
            got, want = (
                through(o, own, c, n_seq, masks=masks)
                for o, c in zip((fast, definitions), caches, strict=True)
            )
            close(got, want, times=8)
        assert steps_of_all_layers == ([n] if n else [])


@needs_numba
def test_a_cache_that_sees_other_layers_reads_their_weights(steps_of_all_layers):
    fast, cache, plain = SETS["compiled"], KVCache(1, 2, 64), KVCache(1, 2, 64)
    first = tuple(a_layer(10 * n) for n in range(2))
    for step, layers in enumerate(
        (first, first, tuple(a_layer(10 * n + 1) for n in range(2)), first, (first[1], first[0]))
    ):
        close(
            through(fast, layers, cache, seed=step),
            through(definitions, layers, plain, seed=step),
            times=8,
        )
    assert steps_of_all_layers == [2] * 5


@needs_numba
def test_layers_whose_caches_have_grown_apart_go_one_by_one(steps_of_all_layers):
    fast, layers = SETS["compiled"], tuple(a_layer(10 * n) for n in range(2))
    cache, plain = KVCache(1, 2, 400), KVCache(1, 2, 400)
    for c in (cache, plain):
        through(definitions, layers, c, 10)
    room = np.empty((1, 2, 100, 8), np.float32)
    cache.reserve_slots(
        0, room, room
    )  # as a pass of a hundred tokens does that fails in its second layer
    close(through(fast, layers, cache), through(definitions, layers, plain), times=8)
    assert steps_of_all_layers == []


@needs_numba
def test_a_weight_that_was_taken_out_of_its_layer_is_not_read_any_more(steps_of_all_layers):
    fast, cache, plain = SETS["compiled"], KVCache(1, 2, 64), KVCache(1, 2, 64)
    layers = tuple(
        SimpleNamespace(**a_layer(10 * n)._asdict()) for n in range(2)
    )  # may change, unlike LayerParams
    for step in range(2):
        close(
            through(fast, layers, cache, seed=step),
            through(definitions, layers, plain, seed=step),
            times=8,
        )
        layers[1].down_proj = a_layer(50).down_proj
    assert steps_of_all_layers == []


def by_head(i, j):
    """A rule that differs by head: head h sees every (h+1)-th key."""
    return (j <= i) & ((i - j) % (np.arange(4)[:, None, None] + 1) == 0)


@pytest.mark.parametrize(
    "rule",
    [
        by_head,
        lambda i, j: by_head(i, j)[None],
        lambda i, j: (j <= i).astype(int),
        lambda *_: np.True_,
        lambda _, j: np.array([0, 1, 2])[:, None, None, None] < j + 1,
    ],
    ids=range(5),
)
def test_rules_of_every_shape_while_decoding(fast, rule):
    layers, caches = (
        tuple(a_layer(10 * n) for n in range(2)),
        (KVCache(3, 2, 64), KVCache(3, 2, 64)),
    )
    for n_seq in (4, 1, 1):
        got, want = (
            through(o, layers, c, n_seq, masks=[rule] * 2)
            for o, c in zip((fast, definitions), caches, strict=True)
        )
        close(got, want, times=8)
        got, want = (
            o.attention_block(
                normal((3, 1, 24), 1),
                *layers[0][:1],
                EPS,
                *layers[0][1:3],
                *np.ones((2, 1, 8), np.float32),
                *HEADS,
                mask=rule,
                cache=c,
            )
            for o, c in zip((fast, definitions), caches, strict=True)
        )
        close(got, want, times=8)


def test_a_cache_in_float64(fast):
    layers, caches = (a_layer(0),), (KVCache(1, 1, 64), KVCache(1, 1, 64))
    for cache in caches:
        past = normal((1, 2, 3, 8), 1, np.float64)
        cache.append(0, past, past)
        cache.advance(np.zeros((1, 3), int), np.arange(3), np.ones((1, 3), bool), np.zeros(1, int))
    for n_seq in (1, 2):
        got, want = (
            through(o, layers, c, n_seq) for o, c in zip((fast, definitions), caches, strict=True)
        )
        close(got, want, times=8)


@needs_numba
def test_weights_are_given_up_with_the_cache():
    layers, cache = tuple(a_layer(10 * n) for n in range(2)), KVCache(1, 2, 64)
    through(SETS["compiled"], layers, cache)
    weight = weakref.ref(layers[1].down_proj)
    del layers, cache
    gc.collect()
    assert weight() is None


@needs_numba
def test_a_model_looks_at_all_of_its_weights_once_for_a_cache(steps_of_all_layers, monkeypatch):
    from npllm.kernels.cpu import compiled

    looks, arrays_of = [], compiled.arrays_of
    monkeypatch.setattr(
        compiled, "arrays_of", lambda layer: (looks.append(layer), arrays_of(layer))[1]
    )
    m, ids = model(ops=SETS["compiled"].ops), random_ids(1, 9)
    cache = m.new_cache()
    for stop in range(5, 10):
        m(ids[:, stop - 1 if stop > 5 else 0 : stop], cache=cache)
    assert steps_of_all_layers == [2] * 5 and len(looks) == 2, "both layers once"


# -------------------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize(
    "changes",
    [{}, {"sliding_window": 4}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True}],
)
@pytest.mark.parametrize("dtype", STORED)
def test_a_model_gives_the_logits_of_the_definitions(fast, changes, dtype):
    ids = random_ids(2, 23)
    m, plain = (model(ops=o.ops, dtype=dtype, **changes) for o in (fast, definitions))
    close(m(ids), plain(ids), times=4)
    cache, other = m.new_cache(2), plain.new_cache(2)
    for part in (ids[:, :1], ids[:, 1:19], ids[:, 19:20], ids[:, 20:]):
        close(m(part, cache=cache), plain(part, cache=other), times=4)


@needs_numba
@pytest.mark.parametrize("dtype", STORED)
def test_on_a_processor_without_fma_many_rows_go_to_blas(monkeypatch, dtype):
    from npllm.kernels.cpu import gemm, rope_attention

    monkeypatch.setattr(gemm, "panel_columns", lambda: 0)
    monkeypatch.setattr(gemm, "product", lambda *_: pytest.fail("the panels were used"))
    monkeypatch.setattr(
        rope_attention, "attend_many", lambda *_: pytest.fail("the panels were used")
    )
    ids, m = random_ids(2, 23), model(ops=SETS["compiled"].ops, dtype=dtype)
    close(m(ids, cache=m.new_cache(2)), model(ops=ops.reference, dtype=dtype)(ids), times=4)


@needs_numba
@pytest.mark.parametrize("columns", [16, 64])
@pytest.mark.parametrize(
    ("n", "d_in", "d_out"), [(17, 1, 1), (70, 600, 101), (130, 513, 200), (64, 256, 96)]
)
@pytest.mark.parametrize("dtype", STORED)
def test_the_product_of_many_rows_in_panels_of_either_width(
    monkeypatch, columns, n, d_in, d_out, dtype
):
    from npllm.kernels.cpu import compiled, gemm

    monkeypatch.setattr(gemm, "panel_columns", lambda: columns)
    x, weight, gain, stream = (
        normal((n, d_in), 0),
        weight_of(d_out, d_in, 1, dtype),
        gain_of(d_in, 2, dtype),
        normal((n, d_out), 3),
    )
    wide = [a.astype(np.float64) for a in (x, weight, gain, stream)]
    close(compiled.linear(x, weight), ops.linear(*wide[:2]), dtype="float32")
    close(
        SETS["compiled"].norm_linear(x, gain, EPS, weight),
        definitions.norm_linear(wide[0], wide[2], EPS, wide[1]),
        dtype="float32",
    )
    close(
        SETS["compiled"].linear_add(x, weight, stream),
        definitions.linear_add(wide[0], wide[1], wide[3]),
        dtype="float32",
    )


@needs_numba
@pytest.mark.parametrize("columns", [16, 64])
@pytest.mark.parametrize("window", [None, 1, 50, 200])
@pytest.mark.parametrize(
    ("n_kv", "group", "n_seq", "n_past"),
    [(2, 1, 300, 0), (1, 3, 150, 130), (2, 2, 2, 97), (1, 1, 97, 700)],
)
def test_attention_of_many_queries_in_panels_of_either_width(
    monkeypatch, columns, window, n_kv, group, n_seq, n_past
):
    from npllm.kernels.cpu import gemm

    monkeypatch.setattr(gemm, "panel_columns", lambda: columns)
    n_head, n_all = n_kv * group, (n_kv * group + 2 * n_kv) * 10
    rule = mask.causal() if window is None else mask.sliding_window(window)
    cos, sin = ops.rope_tables(np.arange(n_past + n_seq), ops.rope_frequencies(8))
    qkv, caches = (
        normal((2, n_past + n_seq, n_all), 5),
        [KVCache(2, 1, 1024, window) for _ in range(2)],
    )
    for start, stop in ((0, n_past), (n_past, n_past + n_seq)):
        if start == stop:
            continue
        got, want = (
            o.rope_attention(
                qkv[:, start:stop],
                cos[start:stop],
                sin[start:stop],
                n_head,
                n_kv,
                mask=rule,
                cache=cache,
            )
            for o, cache in zip((SETS["compiled"], definitions), caches, strict=True)
        )
        close(got, want, times=2)
        for cache in caches:
            cache.advance(
                np.zeros((2, stop - start), int),
                np.arange(start, stop),
                np.ones((2, stop), bool),
                np.zeros(2, int),
            )
    plain = [
        o.rope_attention(qkv, cos, sin, n_head, n_kv, mask=rule)
        for o in (SETS["compiled"], definitions)
    ]
    close(*plain, times=2)


def test_float64_takes_the_definitions(fast):
    ids = random_ids(1, 20)
    close(
        model(ops=fast.ops, dtype=np.float64)(ids),
        model(ops=ops.blockwise, dtype=np.float64)(ids),
        times=0,
    )


def test_a_batch_gives_each_row_what_it_gets_alone(fast):
    m, ids = model(ops=fast.ops), random_ids(5, 9)
    cache = m.new_cache(5)
    m(ids[:, :8], cache=cache)
    together = m(ids[:, 8:], cache=cache)
    for row in range(5):
        close(together[row : row + 1], m(ids[row : row + 1])[:, 8:], times=2)


def test_nan_in_a_weight_reaches_the_logits(fast):
    m = model(ops=fast.ops)
    down_proj = m.params.layers[0].down_proj
    down_proj.flags.writeable = True
    down_proj[3, 5] = np.nan
    down_proj.flags.writeable = False
    for n in (1, 20):
        assert np.isnan(m(random_ids(1, n))).all()


def block(o, **changes):
    """Call `attention_block` with one token of two heads of four channels, some arguments changed."""
    arguments = {
        "x": np.ones((1, 1, 4), np.float32),
        "norm_weight": np.ones(4, np.float32),
        "eps": EPS,
        "qkv_weight": np.ones((16, 4), np.float32),
        "o_weight": np.ones((4, 8), np.float32),
        "cos": np.ones((1, 4), np.float32),
        "sin": np.ones((1, 4), np.float32),
        "n_head": 2,
        "n_kv_head": 1,
        "cache": KVCache(1, 1, 8),
    }
    return o.attention_block(**(arguments | changes))


def filled_by_others():
    """A cache that a model with heads of another size has used."""
    cache = KVCache(1, 1, 9)
    cache.append(0, *np.ones((2, 1, 2, 3, 4), np.float32))
    cache.advance(np.zeros((1, 3), int), np.arange(3), np.ones((1, 3), bool), np.zeros(1, int))
    return cache


@pytest.mark.parametrize(
    "call",
    [
        lambda o: o.linear(np.ones((2, 4), np.float32), np.ones((3, 5), np.float32)),
        lambda o: o.linear(np.ones((2, 4)), np.ones((3, 4), np.int32)),
        lambda o: o.linear(
            np.ones((2, 4), np.float32), np.ones((3, 4), np.float32), np.ones(4, np.float32)
        ),
        lambda o: o.norm_linear(
            np.ones((2, 4), np.float32), np.ones(5, np.float32), EPS, np.ones((3, 4), np.float32)
        ),
        lambda o: o.norm_swiglu(
            np.ones((2, 4), np.float32), np.ones(4, np.float32), EPS, np.ones((4, 5), np.float32)
        ),
        lambda o: o.linear_add(
            np.ones((2, 4), np.float32), np.ones((3, 4), np.float32), np.ones((2, 4), np.float32)
        ),
        lambda o: o.swiglu(np.ones((2, 4), np.float32), np.ones((2, 5), np.float32)),
        lambda o: o.gelu(np.ones((2, 4), np.float32), "erf"),
        lambda o: o.attention(*(np.ones((n, 2, 4), np.float32) for n in (3, 2, 2))),
        lambda o: o.rope_attention(
            np.ones((1, 1, 15), np.float32),
            *np.ones((2, 1, 4), np.float32),
            2,
            1,
            cache=KVCache(1, 1, 8),
        ),
        lambda o: o.rope_attention(
            np.ones((1, 2, 16), np.float32),
            *np.ones((2, 3, 4), np.float32),
            2,
            1,
            cache=KVCache(1, 1, 8),
        ),
        lambda o: o.rope_attention(
            np.ones((1, 9, 16), np.float32),
            *np.ones((2, 9, 4), np.float32),
            2,
            1,
            cache=KVCache(1, 1, 8),
        ),
        lambda o: o.mlp_block(
            *[np.ones(shape, np.float32) for shape in ((1, 4), (4,), (), (8, 4), (4, 6))]
        ),
        lambda o: o.mlp_block(
            *[np.ones(shape, np.float32) for shape in ((1, 4), (4,), (), (8, 4), (5, 4))]
        ),
        lambda o: o.mlp_block(
            *[np.ones(shape, np.float32) for shape in ((1, 4), (4,), (), (5, 4), (4, 2))]
        ),
        lambda o: block(o, o_weight=np.ones((4, 9), np.float32)),
        lambda o: block(o, o_weight=np.ones((5, 8), np.float32)),
        lambda o: block(o, qkv_weight=np.ones((15, 4), np.float32)),
        lambda o: block(o, qkv_weight="weight"),
        lambda o: block(o, cos=np.ones((1, 6), np.float32)),
        lambda o: block(o, cache=KVCache(1, 1, 0)),
        lambda o: block(o, x=np.ones((2, 1, 4), np.float32)),
        lambda o: through(o, (a_layer(0),), KVCache(1, 1, 0)),
        lambda o: through(o, (a_layer(0), a_layer(1)), KVCache(1, 2, 9), masks=[None]),
        lambda o: through(
            o,
            (a_layer(0), a_layer(1)._replace(o_proj=np.ones((24, 33), np.float32))),
            KVCache(1, 2, 9),
        ),
        lambda o: through(
            o,
            (a_layer(0), a_layer(1)._replace(down_proj=np.ones((23, 40), np.float32))),
            KVCache(1, 2, 9),
        ),
        lambda o: through(
            o, (a_layer(0)._replace(input_layernorm=np.ones(24, int)), a_layer(1)), KVCache(1, 2, 9)
        ),
        lambda o: through(
            o, (a_layer(0),), KVCache(2, 1, 9), masks=[lambda *_: np.ones((3, 1, 1, 1), bool)]
        ),
        lambda o: through(
            o, (a_layer(0),), KVCache(3, 1, 9), masks=[lambda *_: np.ones((2, 1, 1, 1), bool)]
        ),
        lambda o: through(o, (a_layer(0),), filled_by_others(), masks=[mask.causal()]),
        lambda o: block(o, n_kv_head=0),
    ],
    ids=range(31),
)
def test_errors_are_those_of_the_definition(fast, call):
    with pytest.raises(NpllmError) as mine:
        call(fast)
    with pytest.raises(NpllmError) as theirs:
        call(definitions)
    assert (type(mine.value), str(mine.value)) == (type(theirs.value), str(theirs.value))


def test_a_tensor_of_no_tokens_is_left_to_the_definition(fast):
    empty = np.ones((0, 4), np.float32)
    close(fast.linear(empty, np.ones((3, 4), np.float32)), np.ones((0, 3), np.float32))


# ------------------------------------------------------------------------------------------------------------------ threads


def test_a_model_serves_several_threads_at_once(fast):
    m, ids = model(ops=fast.ops), [random_ids(1, n) for n in (3, 40, 1, 25)]
    want, got = [m(x) for x in ids], {}
    workers = [
        threading.Thread(target=lambda n=n: got.update({n: [m(ids[n]) for _ in range(20)]}))
        for n in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    for n in range(4):
        assert len(got[n]) == 20
        for logits in got[n]:
            close(logits, want[n], times=1)


def test_blocks_all_run_and_blas_has_its_threads_back():
    before, seen = threads.blas_threads(), []
    threads.run_blocks(lambda block: seen.append((block, threads.blas_threads())), range(100))
    assert sorted(block for block, _ in seen) == list(range(100))
    assert {n for _, n in seen} == {1} and threads.blas_threads() == before


def test_an_interrupt_on_the_way_in_leaves_the_limit_usable():
    """A counter of callers stayed too high, and BLAS had all its threads under every block from
    then on.
    """
    code = threads.one_blas_thread.__wrapped__.__code__
    source, first = inspect.getsourcelines(code)
    on_the_way_in = [first + at for at, text in enumerate(source) if text.startswith(" " * 12)]
    assert len(on_the_way_in) >= 4
    before, tracing = threads.blas_threads(), sys.gettrace()
    for line in on_the_way_in[:4]:  # the mark, the question, the limit

        def trace(frame, event, _, line=line):
            if frame.f_code is code and event == "line" and frame.f_lineno == line:
                raise KeyboardInterrupt
            return trace

        with pytest.raises(KeyboardInterrupt):
            sys.settrace(trace)
            try:
                threads.run_blocks([].append, range(4))
            finally:
                sys.settrace(tracing)
        test_blocks_all_run_and_blas_has_its_threads_back()
        assert threads.blas_threads() == before


def test_an_error_in_a_block_is_raised_and_leaves_nothing_behind():
    before = threads.blas_threads()
    for at in range(8):
        with pytest.raises(ZeroDivisionError):
            threads.run_blocks(lambda block, at=at: 1 // (block - at), range(8))
    assert threads.blas_threads() == before


@pytest.mark.parametrize("n", [1, 5, 3 * 2**23])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_scratch_begins_at_a_cache_line(n, dtype):
    for shape in ((n,), (n, 1)):
        x = threads.scratch("test of lines", shape, dtype)
        assert x.__array_interface__["data"][0] % 64 == 0
        assert x.shape == shape and x.dtype == dtype and x.flags.c_contiguous


def test_scratch_of_one_thread_is_not_that_of_another():
    mine, other = threads.scratch("test", (3, 4), np.float32), []
    worker = threading.Thread(
        target=lambda: other.append(threads.scratch("test", (3, 4), np.float32))
    )
    worker.start()
    worker.join()
    assert not np.shares_memory(mine, other[0]) and np.shares_memory(
        mine, threads.scratch("test", (2, 2), np.float32)
    )


def test_a_large_buffer_does_not_outlive_its_use(monkeypatch):
    monkeypatch.setattr(threads, "KEPT", 64)
    small, large = (threads.scratch("test of size", (n,), np.float32) for n in (16, 17))
    assert large.shape == (17,) and not np.shares_memory(small, large)
    assert np.shares_memory(small, threads.scratch("test of size", (16,), np.float32))
    assert not np.shares_memory(large, threads.scratch("test of size", (17,), np.float32))


# --------------------------------------------------------------------------------------------------------------- exponential


@pytest.mark.skipif(SETS["compiled"] is None, reason="Numba is not installed")
def test_the_exponential_is_exact_to_two_units_in_the_last_place():
    from npllm.kernels.cpu.softmax import exponentials

    x = np.concatenate(
        [
            np.linspace(-87.3, 88, 200003),
            np.geomspace(1e-30, 1, 1000),
            -np.geomspace(1e-30, 1, 1000),
        ]
    ).astype(np.float32)
    x = x[: len(x) // 16 * 16]
    got = x.copy()
    exponentials(got, np.float32(0))
    want = np.exp(x.astype(np.float64))
    assert np.abs(got - want).max(where=np.isfinite(want), initial=0) > 0  # else it was not ours
    assert (np.abs(got / want - 1) < 2 * np.finfo(np.float32).eps).all()
    edge = np.array([-np.inf, -200, -87.4, -0.0, np.nan] * 16, np.float32)
    exponentials(edge, np.float32(0))
    assert (edge[:3] == 0).all() and edge[3] == 1 and np.isnan(edge[4])


KERNELS = """
from numba import prange
from npllm.kernels.cpu.launching import kernel

@kernel(parallel=True)
def inner(x):
    for i in prange(len(x)):
        x[i] += 1

@kernel()
def outer(x):
    inner(x)
"""


@pytest.mark.slow
@needs_numba
def test_code_from_the_cache_finds_its_threads_whichever_kernel_is_called_first(tmp_path):
    (tmp_path / "kernels_of_a_test.py").write_text(KERNELS, encoding="utf-8")
    for name in ("outer", "outer"):  # compile both, load only the one that calls the other
        script = f"import numpy, kernels_of_a_test as k; x = numpy.zeros(64); k.{name}(x); assert (x == 1).all()"
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        )
        assert done.returncode == 0, done.stderr


PREPARE = """
import inspect
import numpy as np
from numba.core.dispatcher import Dispatcher
from tiny import model, random_ids
from npllm import kernels
from npllm.model import Model
from npllm.quantized.int8 import quantize
from npllm.kernels import cpu

kernels.compiled_ops()

def compiled_so_far():
    return {name: len(x.signatures) for part in vars(cpu).values() if inspect.ismodule(part)
            for name, x in vars(part).items() if isinstance(x, Dispatcher)}

kernels.seconds_to_prepare(dtype, activations)
before, ops = compiled_so_far(), kernels.choose_ops(None, activations=activations)
if dtype == "int8":
    m = model(hidden_size=64, intermediate_size=64, dtype="bfloat16")
    packed = [type(x)(*(quantize(w.astype(np.float32)) if w is not None and w.ndim == 2 else w for w in x)) for x in m.params.layers]
    ends = {name: quantize(getattr(m.params, name).astype(np.float32)) for name in ("embed_tokens", "lm_head")}
    m = Model(m.config, m.params._replace(layers=tuple(packed), **ends), ops=ops)
else:
    m = model(ops=ops, dtype=dtype)
for x in (*m.params, *(x for layer in m.params.layers for x in layer)):
    if isinstance(x, np.ndarray):
        x.flags.writeable = False
cache = m.new_cache()
for n in (20, 1, 2, 1, 39, 1):  # at last the cache is full
    m(random_ids(1, n), cache=cache)
after = compiled_so_far()
assert after == before and sum(after.values()) > 5, {name: n for name, n in after.items() if n != before[name]}
"""


@needs_numba
@pytest.mark.parametrize(
    ("dtype", "activations"),
    [
        ("bfloat16", "float32"),
        pytest.param("float32", "float32", marks=pytest.mark.slow),
        pytest.param("int8", "int8", marks=pytest.mark.slow),
    ],
)
def test_once_prepared_a_model_compiles_nothing_more(dtype, activations):
    done = subprocess.run(
        [sys.executable, "-c", f"dtype = {dtype!r}; activations = {activations!r}" + PREPARE],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
