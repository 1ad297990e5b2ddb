"""Compiled attention on products of bfloat16 beside its definition: rounded inputs in float64.

The kernel rounds the weights too, and sums in float32: the budget is that of the CUDA kernel's.
"""

import ml_dtypes
import numpy as np
import pytest
from close import close
from hypothesis import given, settings
from hypothesis import strategies as st
from seeds import draws
from strategies import seeds
from tiny import model, random_ids

import npllm
from npllm import kernels, ops
from npllm.ops import Step
from npllm.ops.mask import causal, documents, left_padding, sliding_window
from npllm.ops.rounded import rounded_attention, rounded_ops

if kernels.compiled_ops() is None:
    pytest.skip("the compiled kernels need Numba", allow_module_level=True)
import numba

from npllm.kernels.cpu import rounded_attention as kernel
from npllm.kernels.cpu.dot_products import forced_form, has_instruction, has_tiles
from npllm.kernels.cpu.rounded_tiles import TILE_ROWS, bfloat16_tile
from npllm.kernels.cpu.simd_addresses import call_address

BF16 = ml_dtypes.bfloat16
FORMS = (
    ["plain"] + ["instruction"] * has_instruction("bfloat16") + ["tiles"] * has_tiles("bfloat16")
)
SET = kernels.choose_ops("fast", activations="bfloat16")


class Columns:
    """A cache that has room for the new tokens behind the past ones."""

    def __init__(self, keys, values, first=0):
        self.keys, self.values, self.first = keys.copy(), values.copy(), first

    def reserve_slots(self, _layer, _k, _v):
        return self.keys, self.values, range(self.first, self.first + self.keys.shape[-2])


def heads(seed, d_head, n_seq, n_past=0, n_head=2, n_kv_head=1, n_batch=1):
    rng = np.random.default_rng(seed)
    n_ctx = n_past + n_seq
    shapes = [(n_head, n_seq)] + [(n_kv_head, n_ctx)] * 2
    return [rng.standard_normal((n_batch, *shape, d_head), np.float32) for shape in shapes]


def attend(q, k, v, mask, run=None, first=0):
    """Run the slot of the set on what q, k and v are the result of, without a rotation; `first`:
    the slot of the first key.
    """
    n_seq, n_head, n_kv_head = q.shape[-2], q.shape[-3], k.shape[-3]
    new = [q, k[..., -n_seq:, :], v[..., -n_seq:, :]]
    qkv = np.concatenate([ops.merge_heads(x) for x in new], axis=-1)
    cos, sin = np.ones((n_seq, 2), np.float32), np.zeros((n_seq, 2), np.float32)
    k, v = k.copy(), v.copy()
    k[..., -n_seq:, :], v[..., -n_seq:, :] = np.nan, np.nan
    step = Step(cos, sin, n_head, n_kv_head, 1e-5, (mask,), Columns(k, v, first))
    y = (run or SET.rope_attention)(qkv, step)
    return np.swapaxes(y.reshape(*y.shape[:2], n_head, -1), 1, 2)


def wide(*arrays):
    return [x.astype(BF16).astype(np.float64) for x in arrays]


def gold(q, k, v, mask):
    return ops.attention(*wide(q, k, v), mask=mask)


def check(got, q, k, v, mask):
    """A weight that is rounded moves by 2**-9 of itself, a sum of float32 by a little."""
    q, k, v = wide(q, k, v)
    group = q.shape[-3] // k.shape[-3]
    scores = abs(q) @ np.swapaxes(np.repeat(abs(k), group, axis=-3), -1, -2)
    largest = scores.max() * q.shape[-1] ** -0.5
    size = ops.attention(q, k, abs(v), mask=mask)
    error = abs(got - ops.attention(q, k, v, mask=mask))
    assert got.dtype == np.float32 and np.isfinite(got).all()
    assert (error <= (2.0**-8 + 2.0**-16 * (1 + largest)) * size + 1e-30).all()


@st.composite
def calls(draw):
    """Sizes around panels of 64 queries, tasks of 512, and blocks of 96 keys."""
    group, n_kv_head = draw(st.sampled_from([(1, 1), (2, 1), (3, 2), (1, 2)]))
    n_seq = draw(st.sampled_from([17, 18, 63, 64, 65, 97, 130, 513]))
    n_past = draw(st.sampled_from([0, 1, 6, 95, 96, 97, 200]))
    n_batch, d_head = draw(st.sampled_from([1, 2])), draw(st.sampled_from([16, 48, 64, 80, 96]))
    arrays = heads(draw(seeds), d_head, n_seq, n_past, group * n_kv_head, n_kv_head, n_batch)
    mask = draw(st.sampled_from([None, causal(), sliding_window(1), sliding_window(70)]))
    if mask is not None and draw(st.booleans()):
        slots = st.integers(-2, n_past + n_seq + 1)
        start = draw(st.lists(slots, min_size=n_batch, max_size=n_batch))
        mask = mask & left_padding(np.array(start))
    return (*arrays, mask)


@given(calls())
@settings(max_examples=draws(40, 300), deadline=None)
def test_attention_of_many_queries(call):
    found = {}
    for form in FORMS:
        with forced_form(form):
            found[form] = attend(*call)
        check(found[form], *call)
    if "instruction" in found:
        assert (found["instruction"] == found["plain"]).all()


def test_the_kernel_is_the_one_that_runs(monkeypatch):
    taken, launch = [], kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda f, *a: (taken.append(f), launch(f, *a))[1])
    call = *heads(0, 64, 40), causal() & left_padding(np.array([3]))
    with forced_form("plain"):
        attend(*call)
    assert taken == [kernel.attend_all]


def test_queries_keys_values_and_weights_are_rounded():
    q, k, v = heads(4, 64, 70, 30)
    with forced_form("plain"):
        got = attend(q, k, v, causal())
    for n in range(3):
        rounded = [x.astype(np.float64 if i == n else BF16) for i, x in enumerate((q, k, v))]
        want = ops.attention(*(x.astype(np.float64) for x in rounded), mask=causal())
        assert abs(got - want).max() > 2.0**-10 * abs(want).max()
    want = gold(q, k, v, causal())
    assert 2.0**-13 < abs(got - want).max() / abs(want).max() < 2.0**-8


def test_one_visible_key_gives_its_value_rounded():
    q, k, v = heads(2, 96, 130, 7, 1)
    with forced_form("plain"):
        got = attend(q, k, v, sliding_window(1))
    np.testing.assert_array_equal(got, v[..., 7:, :].astype(BF16).astype(np.float32))


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, 3.4e38])
@pytest.mark.parametrize("n", range(3))
def test_nan_and_infinities_are_the_definition_s(n, special):
    """Beside rows that do not see them; 3.4e38 is infinite in bfloat16."""
    q, k, v = heads(3, 64, 130, n_head=1)
    (q, k, v)[n][0, 0, 100, 5] = special
    with np.errstate(all="ignore"), forced_form("plain"):
        got, want = attend(q, k, v, causal())[0, 0], gold(q, k, v, causal())[0, 0]
    sees = np.arange(130) >= 100 if n else np.arange(130) == 100
    assert (np.isnan(got) == np.isnan(want))[sees].all()
    assert (np.isinf(got) == np.isinf(want))[sees].all()
    fine = ~sees if n < 2 else np.arange(130) < 64  # 0 times a hidden infinity is NaN in a block
    assert np.isfinite(got[fine]).all()


def test_rows_without_a_key_are_zero():
    q, k, v = heads(5, 32, 40, n_batch=2)
    with forced_form("plain"):
        got = attend(q, k, v, causal() & left_padding(np.array([40, 25])))
    assert not got[0].any() and not got[1, :, :25].any() and got[1, :, 25:].all()


def test_matrix_units_are_given_whole_tiles(monkeypatch):
    """96 rows and 16 words at a time: zeros behind those that are needed change no bit."""
    six = bfloat16_tile(False, 64).address

    def tall(codes: int, row_bytes: int, n_words: int, x: int, scales: int, y: int) -> None:
        for r in range(0, 96, TILE_ROWS):
            call_address(six, (codes + r * row_bytes, row_bytes, n_words, x, scales, y + r * 256))

    tile, found = numba.cfunc(bfloat16_tile(False, 64)._sig)(tall), []
    for d_head, n_seq in [(64, 70), (80, 101), (96, 130), (112, 17)]:
        call = *heads(6, d_head, n_seq, 5), causal()
        with forced_form("plain"):
            plain = attend(*call)
            rounding = kernel.bfloat16_function().address
            with monkeypatch.context() as patch:
                patch.setattr(kernel, "form", lambda _, b=rounding: (tile.address, b, 96, 16))
                found.append((attend(*call) == plain).all())
    assert all(found)


@pytest.mark.parametrize("d_head", [24, 64])
def test_other_masks_and_widths_are_rounded_too(d_head):
    q, k, v = heads(7, d_head, 40)
    labels = np.repeat(np.arange(4), 10)[None]
    for mask in (causal() & documents(labels), causal() if d_head == 24 else None):
        with forced_form("plain"):
            got = attend(q, k, v, mask)
        check(got, q, k, v, mask)
        assert abs(got - attend(q, k, v, mask, kernels.compiled_ops().rope_attention)).max() > 1e-4


def test_without_a_fast_product_of_bfloat16_attention_is_float32_s():
    call = *heads(8, 64, 40), causal()
    with forced_form("float32"):
        got = attend(*call)
    assert (got == attend(*call, kernels.compiled_ops().rope_attention)).all()


def test_up_to_sixteen_tokens_are_not_rounded():
    plain = kernels.compiled_ops()
    call = *heads(9, 64, 16, 20), causal()
    assert (attend(*call) == attend(*call, plain.rope_attention)).all()
    q, k, v, mask = call
    assert (SET.attention(q, k, v, mask=mask) == plain.attention(q, k, v, mask=mask)).all()


def test_the_definition_rounds_its_operands_of_17_tokens_and_more():
    q, k, v = heads(10, 24, 17, 5)
    rounded = [x.astype(BF16).astype(np.float32) for x in (q, k, v)]
    for same in (rounded_attention, rounded_ops(ops.reference, "bfloat16").attention):
        assert (same(q, k, v, mask=causal()) == ops.attention(*rounded, mask=causal())).all()
        few = [q[..., 1:, :], k, v]
        assert (same(*few, mask=causal()) == ops.attention(*few, mask=causal())).all()
    double = [x.astype(np.float64) for x in (q, k, v)]
    assert (rounded_attention(*double) == ops.attention(*double)).all()
    assert rounded_ops(ops.reference, "int8").attention is ops.attention
    stored = [q, k.astype(BF16), v.astype(BF16)]
    close(rounded_attention(*stored), ops.attention(*rounded), times=0)


def test_a_model_of_either_set_rounds_attention():
    ids = random_ids(2, 40)
    m = model(hidden_size=128, intermediate_size=128, num_attention_heads=2, dtype="bfloat16")
    both = [
        npllm.Model(m.config, m.params, ops=kernels.choose_ops(name, activations="bfloat16"))(ids)
        for name in ("fast", "reference")
    ]
    close(both[0], both[1], times=2.0**13)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [7, 64, 100, 300])
@pytest.mark.parametrize("cut", [17, 96, 101, 193])
def test_a_prompt_in_pieces_has_the_bits_of_one_reading(window, cut, form):
    """Whichever keys were dropped before those that the second piece sees."""
    q, k, v = heads(0, 48, 250, n_head=2)
    mask, dropped = sliding_window(window), max(0, cut - window + 1)
    with forced_form(form):
        want = attend(q, k, v, mask)
        first = attend(*(x[..., :cut, :] for x in (q, k, v)), mask)
        kept = (x[..., dropped:, :] for x in (k, v))
        second = attend(q[..., cut:, :], *kept, mask, first=dropped)
    np.testing.assert_array_equal(np.concatenate([first, second], axis=-2), want)
