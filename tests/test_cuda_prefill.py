"""Prefill on CUDA: what prefill.py fuses for many rows, and whole models on the tensor cores.

Run on the CPU (tests/kernel_shim.py), cuBLAS by its stand-in, whose sums are float64.
"""

from dataclasses import replace
from types import SimpleNamespace

import guard
import kernel_shim
import ml_dtypes
import numpy as np
import pytest
import tiny
from close import close
from composed import definitions
from guard import moved
from kernel_shim import needs_gxx, ran
from seeds import draws

import npllm
from npllm import ops
from npllm.kernels import choose_ops, cuda
from npllm.kernels.cuda import gemm, prefill
from npllm.kernels.cuda.attention import attention_in_parts
from npllm.ops import Step
from npllm.ops.mask import causal

pytestmark = [needs_gxx, pytest.mark.usefixtures("on_tensor_cores")]
slow = pytest.mark.slow
BF16 = ml_dtypes.bfloat16
LEADS = [(70,), (2, 40)]
every_lead = pytest.mark.parametrize("lead", LEADS)
ROUNDED = 2.0**-8  # of each number that is rounded to bfloat16
SLACK = 2.0**-18  # for float32, in units of the same size: a norm, an exponential, few sums


def drawn(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32).astype(dtype)


def layer(d_model=48, d_ff=40, biased=True, dtype=BF16):
    """Weights of the second half of a layer, of an odd number of gated channels if d_ff is odd."""
    return SimpleNamespace(
        post_attention_layernorm=drawn(d_model, dtype=dtype),
        gate_up_proj=drawn(2 * d_ff, d_model, dtype=dtype),
        down_proj=drawn(d_model, d_ff, dtype=dtype),
        gate_up_bias=drawn(2 * d_ff, seed=1, dtype=dtype) if biased else None,
        down_bias=drawn(d_model, seed=2, dtype=dtype) if biased else None,
    )


def there(params):
    return SimpleNamespace(**moved(vars(params)))


def step(eps=1e-5):
    return Step(None, None, 1, 1, eps)


def wide(x):
    return None if x is None else x.astype(np.float64)


def within(got, want, bound, shape):
    """Compare entry by entry with a float64 result."""
    got = got.get()
    assert got.dtype == np.float32 and got.shape == shape
    assert np.isfinite(got).all()
    assert (abs(got - want) <= bound).all(), (abs(got - want) / bound).max()


def rounding(n_parts):
    """What is left out of a number in n parts, as a fraction of it."""
    return SLACK if n_parts == gemm.PARTS else ROUNDED + SLACK


every_count = pytest.mark.parametrize("n_parts", [gemm.PARTS, 1])
every_bias = pytest.mark.parametrize("biased", [True, False])


@every_count
@every_bias
@every_lead
def test_norm_linear(lead, biased, n_parts):
    x, gain, weight = drawn(*lead, 300), drawn(300, dtype=BF16), drawn(21, 300, dtype=BF16)
    bias = drawn(21, dtype=BF16) if biased else None
    guard.OPERATIONS.clear()
    call = (x, gain, 1e-5, weight, bias)
    got = ran(lambda: prefill.norm_linear(*moved(call), n_parts=n_parts), "rms_norm")
    assert guard.OPERATIONS["gemm"] == n_parts
    normed = ops.rms_norm(wide(x), wide(gain), 1e-5)
    want = ops.linear(normed, wide(weight), wide(bias))
    size = abs(normed) @ abs(wide(weight)).T + abs(want)
    within(got, want, rounding(n_parts) * size, (*lead, 21))


@every_count
@every_bias
@every_lead
def test_linear_add(lead, biased, n_parts):
    """The residual stream is another array afterwards, and as it was."""
    x, weight, residual = drawn(*lead, 48), drawn(21, 48, dtype=BF16), drawn(*lead, 21)
    bias = drawn(21, dtype=BF16) if biased else None
    stream = moved(residual)
    call = (moved(x), moved(weight), stream, moved(bias))
    guard.OPERATIONS.clear()
    got = ran(lambda: prefill.linear_add(*call, n_parts=n_parts), "split")
    assert guard.OPERATIONS["gemm"] == n_parts
    assert stream.get().tobytes() == residual.tobytes()
    want = definitions.linear_add(wide(x), wide(weight), wide(residual), wide(bias))
    size = abs(wide(x)) @ abs(wide(weight)).T + abs(wide(residual)) + abs(want)
    within(got, want, rounding(n_parts) * size, (*lead, 21))


@every_count
@every_bias
@every_lead
@pytest.mark.parametrize("d_ff", [40, pytest.param(1100, marks=slow)])
def test_mlp_block(d_ff, lead, biased, n_parts):
    """Errors of gate and up move the gated rows, |silu'| < 1.1, which are rounded in turn."""
    x, params = drawn(*lead, 48), layer(d_ff=d_ff, biased=biased)
    stream = moved(x)
    guard.OPERATIONS.clear()
    call = (stream, there(params), step(), n_parts)
    got = ran(lambda: prefill.mlp_block(*call), "rms_norm", "swiglu")
    assert guard.OPERATIONS["gemm"] == 2 * n_parts
    assert stream.get().tobytes() == x.tobytes()
    exact = SimpleNamespace(**{name: wide(value) for name, value in vars(params).items()})
    normed = ops.rms_norm(wide(x), exact.post_attention_layernorm, 1e-5)
    both = ops.linear(normed, exact.gate_up_proj, exact.gate_up_bias)
    moved_by = rounding(n_parts) * (abs(normed) @ abs(exact.gate_up_proj).T + abs(both))
    (gate, up), (of_gate, of_up) = (np.split(part, 2, axis=-1) for part in (both, moved_by))
    h = ops.swiglu(gate, up)
    of_h = 1.1 * of_gate * (abs(up) + of_up) + abs(ops.silu(gate)) * of_up
    of_h += rounding(n_parts) * (abs(h) + of_h)
    want = wide(x) + ops.linear(h, exact.down_proj, exact.down_bias)
    bound = of_h @ abs(exact.down_proj).T + SLACK * (abs(h) @ abs(exact.down_proj).T + abs(want))
    within(got, want, bound, x.shape)
    if n_parts == gemm.PARTS:
        block = definitions.mlp_block(
            x, *list(vars(params).values())[:1], 1e-5, *weights_of(params)
        )
        close(got, moved(block), times=4)


def weights_of(params):
    return params.gate_up_proj, params.down_proj, params.gate_up_bias, params.down_bias


def test_one_part_is_rounded():
    """And three are not: the error of one is that of bfloat16, not less."""
    x, gain, weight = drawn(70, 300), drawn(300, dtype=BF16), drawn(21, 300, dtype=BF16)
    params = layer(biased=False)
    calls = [
        (prefill.norm_linear, (x, gain, 1e-5, weight)),
        (prefill.linear_add, (x, weight, drawn(70, 21))),
    ]
    for function, call in calls:
        three, one = (function(*moved(call), n_parts=n).get() for n in (gemm.PARTS, 1))
        assert 2.0**-12 < abs(three - one).max() / abs(three).max() < 2.0**-7
    three, one = (
        prefill.mlp_block(moved(drawn(70, 48)), there(params), step(), n).get()
        for n in (gemm.PARTS, 1)
    )
    assert 2.0**-12 < abs(three - one).max() / abs(three).max() < 2.0**-7


@every_count
def test_views_and_a_gain_of_another_type(n_parts):
    """Columns of a longer array, and a gain in float32 beside a bfloat16 weight."""
    x, weight, gain = drawn(70, 96), drawn(21, 48, dtype=BF16), drawn(48)
    view, residual = moved(x)[:, 48:], moved(drawn(21, 70))
    columns, rows = x[:, 48:].copy(), guard.xp.matrix_transpose(residual)
    got = prefill.norm_linear(view, moved(gain), 1e-5, moved(weight), n_parts=n_parts)
    want = prefill.norm_linear(*moved((columns, gain)), 1e-5, moved(weight), n_parts=n_parts)
    assert got.get().tobytes() == want.get().tobytes()
    got = prefill.linear_add(view, moved(weight), rows, n_parts=n_parts)
    want = prefill.linear_add(*moved((columns, weight, rows.get())), n_parts=n_parts)
    assert got.get().tobytes() == want.get().tobytes()


# ----------------------------------------------------------------------------- few rows, other types


@pytest.mark.parametrize("n_rows", [1, 16, 17, 64])
def test_few_rows_take_the_kernels_of_few_rows(n_rows):
    """Up to 64, and up to 16 where more are rounded; the second half of a layer has none."""
    x, gain, weight = moved((drawn(n_rows, 48), drawn(48, dtype=BF16), drawn(42, 48, dtype=BF16)))
    residual, rounded = moved(drawn(n_rows, 42)), choose_ops("cuda", "cupy", "bfloat16")
    block, one_part = (x, there(layer()), step()), n_rows > 16
    for set_, many in ((cuda.CUDA, False), (rounded, one_part)):
        few = [] if many else ["linear"]
        norm, add, half = (
            (["rms_norm"], ["split"], ["rms_norm", "swiglu"]) if many else (few, few, [])
        )
        ran(lambda set_=set_: set_.norm_linear(x, gain, 1e-5, weight), *norm)
        ran(lambda set_=set_: set_.linear_add(x, weight, residual), *add)
        ran(lambda set_=set_: set_.mlp_block(*block), *half)
        ran(lambda set_=set_: set_.norm_swiglu(x, gain, 1e-5, weight), *few)
        assert (set_.mlp_block(*block) is NotImplemented) != many


def other_calls():
    """Calls of many rows that prefill.py is not made for: what differs, and the call."""
    x, gain, weight, residual = drawn(70, 48), drawn(48), drawn(21, 48, dtype=BF16), drawn(70, 21)
    odd = layer()
    odd.down_proj = odd.down_proj[:, :-1]
    return {
        "a weight in float32": lambda: cuda.norm_linear(
            *moved((x, gain)), 1e-5, moved(drawn(21, 48))
        ),
        "a weight in float16": lambda: cuda.linear_add(
            moved(x), moved(weight.astype(np.float16)), moved(residual)
        ),
        "rows in float64": lambda: cuda.norm_linear(
            *moved((wide(x), wide(gain))), 1e-5, moved(weight)
        ),
        "a residual in float64": lambda: cuda.linear_add(*moved((x, weight, wide(residual)))),
        "a residual of one row": lambda: cuda.linear_add(*moved((x, weight, residual[:1]))),
        "a gain of another length": lambda: cuda.norm_linear(
            *moved((x, gain[1:])), 1e-5, moved(weight)
        ),
        "a bias of another length": lambda: cuda.norm_linear(
            *moved((x, gain)), 1e-5, *moved((weight, drawn(1)))
        ),
        "a layer in float32": lambda: cuda.mlp_block(
            moved(x), there(layer(dtype=np.float32)), step()
        ),
        "a layer of rows in float64": lambda: cuda.mlp_block(
            moved(wide(x)), there(layer()), step()
        ),
        "a layer whose halves do not fit": lambda: cuda.mlp_block(moved(x), there(odd), step()),
    }


@pytest.mark.parametrize("name", other_calls())
def test_other_types_and_shapes_run_operation_by_operation(name):
    assert ran(other_calls()[name]) is NotImplemented


def test_a_device_without_tensor_cores_runs_operation_by_operation(monkeypatch):
    monkeypatch.setattr(gemm, "library", lambda: None)
    x, gain, weight = moved((drawn(70, 48), drawn(48), drawn(21, 48, dtype=BF16)))
    assert cuda.norm_linear(x, gain, 1e-5, weight) is NotImplemented
    assert cuda.linear_add(x, weight, moved(drawn(70, 21))) is NotImplemented
    assert cuda.mlp_block(x, there(layer()), step()) is NotImplemented


# ------------------------------------------------------------------------------------ whole models

LAYER = ("rms_norm", "rope_append", "attention_mma", "attention", "split", "rms_norm", "swiglu")


def pair(set_=cuda.CUDA, dtype=BF16, **changes):
    """A tiny model of the definitions, and the same on the device; heads of 64 channels."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    longest = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
    base = tiny.model(dtype=dtype, ops=ops.reference, **sizes | longest | changes)
    return base, npllm.Model(base.config, moved(base.params), ops=set_)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 20}], ids=str)
def test_a_prefill_on_the_tensor_cores(changes):
    """Logits of the last token, of a padded batch too; then a decode step on the same cache."""
    base, model = pair(**changes)
    ids = tiny.random_ids(1, 70)
    last = ("rms_norm", "linear")
    got = ran(lambda: model(ids, logits_to_keep=1), *LAYER * 2, *last)
    close(got, moved(base(ids, logits_to_keep=1)), times=40)
    ids, mask = tiny.random_ids(2, 41), np.ones((2, 41), int)
    mask[0, :9] = 0
    caches = [one.new_cache(2) for one in (base, model)]
    want, got = (
        one(ids[:, :40], attention_mask=mask[:, :40], cache=cache, logits_to_keep=1)
        for one, cache in zip((base, model), caches, strict=True)
    )
    close(got, moved(want), times=40)
    want, got = (
        one(ids[:, 40:], attention_mask=mask, cache=cache)
        for one, cache in zip((base, model), caches, strict=True)
    )
    close(got, moved(want), times=40)


def test_a_prefill_with_rounded_activations():
    """Beside products and attention of rounded inputs: what is left are weights of attention, and
    numbers next to the boundary between two of bfloat16.  Half of what rounding moves is ample.
    """
    set_, parts = choose_ops("cuda", "cupy", "bfloat16"), []
    base, model = pair(set_)
    ids = tiny.random_ids(1, 70)

    def noted(kernel, definitions, *arguments):
        parts.append((kernel, dict(definitions).get("PARTS")))
        kernel_shim.launch(kernel, definitions, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda.launching, "launch", noted)
        got = ran(lambda: model(ids), *LAYER * 2, "rms_norm", "split").get()
    counted = {kernel: n for kernel, n in parts[: len(LAYER)] if n is not None}
    assert counted == {"rms_norm": 1, "attention_mma": 1, "split": 1, "swiglu": 1}
    linear = choose_ops("reference", "numpy", "bfloat16").replace(attention=ops.attention)
    sets = ops.reference, linear, linear.replace(attention=rounded_attention)
    exact, products, both = (npllm.Model(base.config, base.params, ops=one)(ids) for one in sets)
    assert rms(got - both) < 0.5 * min(rms(both - exact), rms(got - products))


def rms(x):
    return float(np.sqrt(np.mean(x**2)))


def rounded_attention(q, k, v, **options):
    """Of queries, keys and values in bfloat16."""
    return ops.attention(*(x.astype(BF16).astype(x.dtype) for x in (q, k, v)), **options)


def fed(model, ids, **options):
    cache = model.new_cache(len(ids))
    return model(ids, cache=cache, **options), cache


@pytest.mark.parametrize("window", [50, pytest.param(None, marks=slow)])
def test_a_prompt_longer_than_a_chunk(window):
    """In one piece, in chunks of 128 and of 70: logits and cache within budget."""
    _, model = pair(sliding_window=window)
    ids = tiny.random_ids(1, 200)
    want, whole = fed(model, ids)
    for size in (128, 70):
        chunked = model.on(replace(model.ops, prefill_chunk=size))
        kernel_shim.LAUNCHES.clear()
        got, cache = fed(chunked, ids)
        assert kernel_shim.LAUNCHES.count("attention_mma") == 2 * -(-200 // size)
        close(got, want, times=40)
        for one, other in zip(cache.state.layers, whole.state.layers, strict=True):
            first = max(one[2], other[2])  # a window forgets what lies before it
            for x, y in zip(one[:2], other[:2], strict=True):
                kept = (z[:, :, first - n : 200 - n] for z, n in ((x, one[2]), (y, other[2])))
                close(*kept, times=40)


@slow
def test_a_prompt_longer_than_the_chunks_of_the_set():
    """2,048 tokens and some more, beside chunks of 512; a layer of one head."""
    _, model = pair(num_hidden_layers=1, hidden_size=64, num_attention_heads=1)
    assert model.prefill_chunk == cuda.CUDA.prefill_chunk == 2048
    ids, n = tiny.random_ids(1, 2048 + 70), []
    for size in (2048, 512):
        kernel_shim.LAUNCHES.clear()
        n.append(fed(model.on(replace(model.ops, prefill_chunk=size)), ids, logits_to_keep=30)[0])
        assert kernel_shim.LAUNCHES.count("attention_mma") == -(-ids.shape[1] // size)
    close(*n, times=40)


def test_taps_and_replaced_operations_run_in_a_long_prefill():
    base, model = pair()
    ids, seen, calls = tiny.random_ids(1, 70), {}, []

    def tap(name, x):
        seen[name] = x
        return x

    want = base(ids)
    close(model(ids, tap=tap), moved(want), times=40)
    assert "model.layers.1.mlp.down_proj" in " ".join(seen) and len(seen) > 20
    close(model.on(model.ops.without_slots())(ids), moved(want), times=40)

    def swiglu(gate, up):
        calls.append(gate.shape)
        return ops.swiglu(gate, up)

    kernel_shim.LAUNCHES.clear()
    close(model.with_ops(swiglu=swiglu)(ids), moved(want), times=40)
    assert calls == [(1, 70, 40)] * 2 and "swiglu" not in kernel_shim.LAUNCHES


@pytest.mark.parametrize("dtype", [np.float16, np.float32][: draws(1, 2)])
def test_other_weights_have_the_same_attention(dtype):
    base, model = pair(dtype=dtype)
    ids = tiny.random_ids(1, 70)
    close(model(ids, logits_to_keep=1), moved(base(ids, logits_to_keep=1)), times=40)
    assert kernel_shim.LAUNCHES.count("attention_mma") >= 2


def test_attention_of_the_rounded_set_is_that_of_its_fused_kernel():
    """1 part from 17 tokens on, those of all sequences counted; operation by operation as well."""
    rounded = choose_ops("cuda", "cupy", "bfloat16")
    for lead, n_seq, n_parts in (
        ((1,), 16, 3),
        ((1,), 17, 1),
        ((2,), 9, 1),
        ((), 8, 3),
        ((), 18, 1),
    ):
        q, k, v = moved(tuple(drawn(*lead, n, n_seq, 64) for n in (2, 1, 1)))
        got = rounded.attention(q, k, v, mask=causal())
        want = attention_in_parts(n_parts, q, k, v, mask=causal())
        assert got.get().tobytes() == want.get().tobytes()
        other = attention_in_parts(4 - n_parts, q, k, v, mask=causal())
        assert got.get().tobytes() != other.get().tobytes()
    one = rounded.attention(q[..., -1:, :], k, v)
    assert one.get().tobytes() == cuda.attention(q[..., -1:, :], k, v).get().tobytes()
