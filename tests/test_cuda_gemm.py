"""Products of many rows as three products of bfloat16 parts: the split, the calls of cuBLAS, error.

The split runs on the CPU (tests/kernel_shim.py), and cuBLAS is a stand-in that follows the
documentation of its gemmEx, on the memory that it is given.
"""

import guard
import ml_dtypes
import numpy as np
import pytest
import tiny
from close import close
from guard import moved
from kernel_shim import checking, needs_gxx, ran

import npllm
from npllm import ops
from npllm.kernels import choose_ops, cuda
from npllm.kernels.cuda import gemm, launching

pytestmark = [needs_gxx, pytest.mark.usefixtures("on_the_stand_in_apart")]
BF16 = ml_dtypes.bfloat16


def parts_of(x, n_parts=3):
    """What split.cu makes of x, [n_parts, n]."""
    parts = guard.xp.empty((n_parts, len(x)), dtype=BF16)
    n_blocks = -(-len(x) // 256)
    variant = (("PARTS", n_parts),)
    launching.launch("split", variant, n_blocks, 256, moved(x), parts, np.int64(len(x)))
    return parts.get().astype(np.float32)


def any_floats(n, seed=0):
    """Float32 numbers of any bits above 2**-100: below, a part may be subnormal, which is zero."""
    x = np.random.default_rng(seed).integers(0, 2**32, n, dtype=np.uint32).view(np.float32)
    with np.errstate(invalid="ignore"):
        return x[np.isfinite(x) & (abs(x) > 2.0**-100)]


def test_three_parts_are_the_number_itself():
    """Up to the largest float32, which rounding to bfloat16 would make infinite."""
    x = np.append(any_floats(5000), [np.finfo(np.float32).max, 1.0, -0.0]).astype(np.float32)
    first, second, third = parts_of(x)
    assert ((first.astype(np.float64) + second + third).astype(np.float32) == x).all()
    assert np.isfinite(first).all() and (third != 0).mean() > 0.9
    special = np.array([np.nan, np.inf, -np.inf], np.float32)
    special[0] = np.uint32(0x7F800001).view(np.float32)  # a NaN that begins as infinity does
    parts = parts_of(special)
    assert np.isnan(parts[0, 0]) and (parts[0, 1:] == special[1:]).all() and not parts[1:].any()


def test_one_part_is_rounded_to_nearest():
    x = any_floats(5000, 1)
    with np.errstate(over="ignore"):
        assert (parts_of(x, 1)[0] == x.astype(BF16).astype(np.float32)).all()


def test_the_split_is_clean_under_the_checker():
    x = any_floats(700, 2)
    want = parts_of(x)
    with checking(1):
        assert parts_of(x).tobytes() == want.tobytes()


def inputs(n_rows=65, d_in=48, d_out=13):
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal((n_rows, d_in)), rng.standard_normal((d_out, d_in))
    return x.astype(np.float32), weight.astype(BF16), rng.standard_normal(d_out).astype(BF16)


def test_a_product_has_the_error_of_float32():
    """Beside float64, in units of the sum of magnitudes: three roundings with three parts, as the
    stand-in rounds only what it stores; two parts leave 2**-16 of x, one 2**-8, and sums less.
    """
    x, weight, _ = inputs()
    wide = weight.astype(np.float64)
    want, size = x @ wide.T, abs(x) @ abs(wide.T)

    def error(y):
        return (abs(y.get().astype(np.float64) - want) / size).max()

    there = moved((x, weight))
    assert error(ran(lambda: cuda.linear(*there), "split")) <= 3 * 2.0**-24
    assert 2.0**-13 < error(gemm.product(*there, n_parts=1)) <= 2.0**-9
    close(cuda.linear(*there), moved(ops.linear(x, weight)), times=4)
    assert (
        npllm.testing.verdict(
            "linear", {"x": x, "weight": weight}, cuda.linear(*there).get()
        ).status
        == "within"
    )


def test_without_its_last_part_a_product_is_seen_to_be_worse(monkeypatch):
    x, weight, _ = inputs()
    add, wide = gemm.add_product, weight.astype(np.float64)

    def dropping(part, weight, y, *, is_first):
        part = guard.xp.zeros(part.shape, dtype=BF16) if is_first else part
        add(part, weight, y, is_first=is_first)

    monkeypatch.setattr(gemm, "add_product", dropping)
    got = cuda.linear(*moved((x, weight))).get()
    assert (abs(got - x @ wide.T) / (abs(x) @ abs(wide.T))).max() > 3 * 2.0**-24


@pytest.mark.parametrize("lead", [(), (2,), (5, 2)])
def test_shapes_bias_and_views(lead):
    """Rows of any leading axes, columns of a longer array, a bias, and an odd number of outputs."""
    x, weight, bias = inputs(n_rows=130)
    x = x.reshape(*lead, -1, 48)
    view = moved(np.concatenate([x, x], axis=-1))[..., 48:]
    got = ran(lambda: cuda.linear(view, *moved((weight, bias))), "split")
    close(got, moved(ops.linear(x, weight, bias)), times=4)


def test_a_weight_that_is_not_in_one_piece():
    """Columns of a longer array: cuBLAS is told that rows are d_in entries apart."""
    x, weight, bias = inputs()
    view = moved(np.concatenate([weight, weight + BF16(1)], axis=1))[:, 24:72]
    columns = np.concatenate([weight, weight + BF16(1)], axis=1)[:, 24:72]
    got = ran(lambda: cuda.linear(moved(x), view, moved(bias)), "split")
    close(got, moved(ops.linear(x, columns, bias)), times=4)


def test_infinities_and_nan_give_what_the_definition_gives():
    x, weight, _ = inputs()
    x[0, 5], x[1, 7], x[2, :2] = np.inf, np.nan, (np.inf, -np.inf)
    with np.errstate(all="ignore"):
        want, got = ops.linear(x, weight), cuda.linear(*moved((x, weight))).get()
    assert (np.isnan(got) == np.isnan(want)).all()
    close(np.nan_to_num(got), np.nan_to_num(want), times=4)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_other_weights_and_older_devices_take_the_definition(dtype, monkeypatch):
    x, weight, _ = inputs()
    guard.OPERATIONS.clear()
    ran(lambda: cuda.linear(moved(x), moved(weight.astype(np.float32).astype(dtype))))
    monkeypatch.setattr(gemm, "library", lambda: None)
    close(ran(lambda: cuda.linear(*moved((x, weight)))), moved(ops.linear(x, weight)), times=4)
    assert guard.OPERATIONS["gemm"] == 0


def test_a_prefill_with_and_without_rounded_activations():
    """Long prompts of bfloat16 weights: float32 logits, and those of the definition in bfloat16,
    but for attention, which is float32's without tensor cores.
    """
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    base = tiny.model(dtype=BF16, ops=ops.reference, max_position_embeddings=128, **sizes)
    params, ids = moved(base.params), tiny.random_ids(1, 70)
    model = npllm.Model(base.config, params, ops=cuda.cuda_ops())
    guard.OPERATIONS.clear()
    close(model(ids, logits_to_keep=1), moved(base(ids, logits_to_keep=1)), times=40)
    assert guard.OPERATIONS["gemm"] == 3 * 2 * 4
    set_ = choose_ops("cuda", "cupy", "bfloat16")
    rounded = npllm.Model(base.config, params, ops=set_)
    guard.OPERATIONS.clear()
    got = rounded(ids, logits_to_keep=1)
    assert guard.OPERATIONS["gemm"] == 2 * 4
    assert set_.decode_step is cuda.CUDA.decode_step and set_.activations == "bfloat16"
    products = choose_ops("reference", "numpy", "bfloat16").replace(attention=ops.attention)
    exact, theirs = (
        npllm.Model(base.config, base.params, ops=one)(ids, logits_to_keep=1)
        for one in (ops.reference, products)
    )
    assert abs(got.get() - theirs).max() < abs(theirs - exact).max() / 100
    for n in (3, 20):  # few rows are not rounded
        x, weight, bias = inputs(n)
        want = choose_ops("blockwise", "numpy", "bfloat16").linear(x, weight, bias)
        close(set_.linear(*moved((x, weight, bias))), moved(want), times=4)
