"""Verdicts: within, wrong, not decidable, no gold; the model that explains an error, and where it
lives.
"""

import ml_dtypes
import numpy as np
import pytest
from budget_implementations import naive
from budget_inputs import INPUTS, plain
from hypothesis import given
from hypothesis import strategies as st

from npllm import ops
from npllm.testing import gold, verdict, where
from npllm.testing.budgets import Budget
from npllm.testing.location import describe_indices
from npllm.testing.within_budget import judge

F, H, B = np.float32, np.float16, ml_dtypes.bfloat16
every_op = pytest.mark.parametrize("op", INPUTS)


def case(op, seed=0):
    inputs = plain(op, np.random.default_rng(seed))
    return inputs, naive(op, inputs)


# ------------------------------------------------------------------------------------------ what is reported before any value


@every_op
@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda _: None, "got builtins.NoneType"),
        (lambda y: y.tolist(), "got builtins.list"),
        (lambda y: y[..., :-1], "must have shape"),
        (lambda y: y[None], "must have shape"),
        (lambda y: y.astype(np.int32), "got int32"),
    ],
)
def test_what_is_no_such_array_is_wrong(op, spoil, text):
    inputs, y = case(op)
    found = verdict(op, inputs, spoil(y))
    assert found.status == "wrong"
    assert text in found.message


@every_op
def test_another_dtype_than_asked_for_is_wrong(op):
    inputs, y = case(op)
    found = verdict(op, inputs, y.astype(np.float64), dtype="float32")
    assert (found.status, "must have dtype float32, got float64" in found.message) == (
        "wrong",
        True,
    )
    assert verdict(op, inputs, y, dtype="float32").status == "within"


@every_op
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_entry_that_is_not_finite_is_wrong_and_named(op, value):
    inputs, y = case(op)
    y.flat[17] = value
    found = verdict(op, inputs, y)
    assert found.status == "wrong"
    assert found.index == tuple(int(n) for n in np.unravel_index(17, y.shape))
    assert "in 1 of" in found.message
    assert str(list(found.index)) in found.message


def test_nan_never_passes_even_where_the_exact_answer_has_none_to_give():
    x = np.array([[1.0, np.nan]], F)
    assert verdict("add", {"x": x, "y": x}, x + x).status == "no gold"
    assert verdict("add", {"x": x, "y": x}, np.array([[np.nan, 2.0]], F)).status == "wrong"
    assert verdict("add", {"x": x, "y": x}, np.array([[3.0, np.nan]], F)).status == "wrong"


def test_infinities_that_the_exact_answer_has_too_are_right():
    x, y = np.array([[np.inf, -np.inf, 1.0]], F), np.array([[1.0, 2.0, 3.0]], F)
    assert verdict("add", {"x": x, "y": y}, x + y).status == "within"
    assert verdict("add", {"x": x, "y": y}, np.array([[np.inf, np.inf, 4.0]], F)).status == "wrong"


def test_an_overflow_of_the_output_dtype_is_right_and_a_saturation_is_not():
    x = np.array([[70000.0, -70000.0, 1.0]], F)
    inputs = {"x": x, "y": 0 * x}
    with np.errstate(over="ignore"):
        assert verdict("add", inputs, x.astype(H)).status == "within"
    assert verdict("add", inputs, np.array([[65504.0, -65504.0, 1.0]], H)).status == "wrong"


def test_an_infinity_is_right_only_where_an_answer_within_the_budget_overflows():
    """1e12 - 1e12 + a rotation: the sign of what is left is that of the roundings."""
    angle = np.float64(np.float32(1.0))
    x = np.array([[[[np.sin(angle), np.cos(angle)]]]]) * 1e18
    inputs = {"x": x.astype(F), "positions": np.array([1]), "d_rope": 2}
    exact = gold("rope", inputs)
    assert np.abs(exact[..., 0]) < 1e12
    for first in (np.inf, -np.inf):
        assert verdict("rope", inputs, np.array([[[[first, np.inf]]]], H)).status != "wrong"
        found = verdict("rope", inputs, np.array([[[[first, -np.inf]]]], H))
        assert found.status == "wrong" and found.index == (0, 0, 0, 1)
    small = {**inputs, "x": (x / 1e15).astype(F)}
    assert verdict("rope", small, np.array([[[[np.inf, 1000.0]]]], H)).status == "wrong"


# ------------------------------------------------------------------------------------------------------- errors and the budget


def test_all_of_the_budget_is_allowed_and_more_is_not():
    """Half a unit in the last place, the largest error of one rounding; then one unit."""
    x, y = np.array([[1.0]], F), np.array([[2.0**-24]], F)
    assert verdict("add", {"x": x, "y": y}, np.array([[1.0]], F)).status == "within"
    off = verdict("add", {"x": x, "y": 0 * y}, np.array([[1.0 + 2.0**-23]], F))
    assert (off.status, off.used) == ("wrong", 2.0)
    value = np.array([1.0])
    for error, status in ((2.0**-24, "within"), (np.nextafter(2.0**-24, 1), "wrong")):
        assert (
            judge(np.array([error]), value, Budget(*np.full((2, 1), 2.0**-24), value))[0] == status
        )


@every_op
def test_correct_code_is_within_and_explained_by_float32(op):
    inputs, y = case(op)
    found = verdict(op, inputs, y)
    assert (found.status, found.model, found.where) == ("within", "float32 accumulation", "nowhere")
    assert found.used <= 1


@every_op
@pytest.mark.parametrize("dtype", [H, B])
def test_an_output_in_few_bits_has_a_budget_of_few_bits(op, dtype):
    inputs, y = case(op)
    found = verdict(op, inputs, y.astype(dtype))
    assert found.status == "within"
    assert found.used > 0.5
    off = y.astype(dtype)
    off.flat[5] *= dtype(1.1)
    assert verdict(op, inputs, off).status == "wrong"


def test_cancellation_is_not_decidable():
    """Condition 1e9: the sum of +a ... -a is rounding and nothing else."""
    a = np.random.default_rng(0).standard_normal((4, 200)).astype(F)
    x = np.concatenate([a, -a], axis=1)
    x[:, 0] += F(1e-6)
    inputs = {"x": x, "weight": np.ones((3, 400), F)}
    for y in (naive("linear", inputs), np.zeros((4, 3), F)):
        found = verdict("linear", inputs, y)
        assert found.status == "not decidable"
        assert found.condition > 1e6
        assert "cancel" in found.message
    assert verdict("linear", inputs, np.ones((4, 3), F)).status == "wrong"


def test_a_sum_longer_than_its_arithmetic_can_count_is_not_decidable():
    x = np.random.default_rng(0).random((2, 600)).astype(F)
    assert (
        verdict("linear", {"x": x, "weight": x}, x @ x.T, accumulate="bfloat16").status
        == "not decidable"
    )


def test_a_row_whose_squares_overflow_is_not_decidable():
    x = np.full((2, 8), 1e20, F)
    assert (
        verdict(
            "rms_norm", {"x": x, "weight": np.ones(8, F), "eps": 1e-5}, np.zeros((2, 8), F)
        ).status
        == "not decidable"
    )


def test_zeros_in_zeros_out_is_within():
    for op in ("linear", "rms_norm", "swiglu", "gelu", "add", "embed", "rope"):
        inputs, _ = case(op)
        inputs = {
            name: np.zeros_like(x) if getattr(x, "dtype", None) == F else x
            for name, x in inputs.items()
        }
        y = naive(op, inputs)
        assert verdict(op, inputs, y).status == "within", op
        y.flat[0] = 1e-3
        assert verdict(op, inputs, y).status == "wrong", op


# ----------------------------------------------------------------------------------------------- which arithmetic explains it


def sum_in(dtype):
    def total(p):
        s = np.zeros(p.shape[:-1], dtype)
        for n in range(p.shape[-1]):
            s = (s + p[..., n].astype(dtype)).astype(dtype)
        return s.astype(F)

    return total


def two_roundings():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((8, 256)).astype(B), rng.standard_normal(256).astype(B)
    wide = x.astype(F)
    normal = (wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + F(1e-5))).astype(B)
    return (
        "rms_norm",
        {"x": x, "weight": w, "eps": 1e-5},
        (normal.astype(F) * w.astype(F)).astype(B),
    )


def tf32():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((16, 3072)).astype(F), rng.standard_normal((16, 3072)).astype(F)
    cut = [(t.view(np.uint32) & np.uint32(0xFFFFE000)).view(F) for t in (x, w)]
    return "linear", {"x": x, "weight": w}, cut[0] @ cut[1].T


def half_accumulation():
    rng = np.random.default_rng(0)
    inputs = {
        "x": rng.standard_normal((16, 240)).astype(F),
        "weight": rng.standard_normal((16, 240)).astype(F),
    }
    inputs = {name: t.astype(H).astype(F) for name, t in inputs.items()}
    return "linear", inputs, naive("linear", inputs, sum_in(H))


def bfloat16_probabilities():
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal((1, 2, 64, 16)).astype(B).astype(F) for name in "qkv"}
    s = np.einsum("bhnd,bhmd->bhnm", inputs["q"], inputs["k"]) / F(4)
    s = np.where(np.tril(np.ones((64, 64), bool)), s, -np.inf)
    e = np.exp(s - s.max(-1, keepdims=True))
    p = (e / e.sum(-1, keepdims=True)).astype(B).astype(F)
    return "attention", inputs, p @ inputs["v"]


@pytest.mark.parametrize(
    ("made", "model", "options"),
    [
        (two_roundings, "float32 accumulation, two roundings", {"roundings": 2}),
        (tf32, "float32 accumulation, TF32 products", {"operands": "tf32"}),
        (half_accumulation, "float16 accumulation", {"accumulate": "float16"}),
        (
            bfloat16_probabilities,
            "float32 accumulation, bfloat16 probabilities",
            {"probabilities": "bfloat16"},
        ),
    ],
)
def test_the_strictest_model_that_explains_an_error_is_named(made, model, options):
    op, inputs, y = made()
    found = verdict(op, inputs, y)
    assert (found.status, found.model) == ("wrong", model)
    assert found.used > 1
    assert model in found.message
    asked = verdict(op, inputs, y, **options)
    assert (asked.status, asked.model) == ("within", model)
    assert asked.used <= 1


def test_a_better_arithmetic_than_asked_for_is_named():
    inputs, y = case("linear")
    found = verdict("linear", inputs, y, accumulate="float16")
    assert (found.status, found.model) == ("within", "float32 accumulation")


@every_op
def test_no_model_explains_garbage(op):
    inputs, y = case(op)
    garbage = np.random.default_rng(1).standard_normal(y.shape).astype(F) * np.abs(y).mean()
    found = verdict(op, inputs, garbage)
    assert (found.status, found.model) == ("wrong", None)
    assert found.where.startswith("everywhere")


# ------------------------------------------------------------------------------------------------------------ where it is wrong


def test_attention_names_the_rows_that_went_wrong():
    rng = np.random.default_rng(0)
    n_seq, n_ctx = 6, 20
    q, k, v = (rng.standard_normal((2, 4, n, 8)).astype(F) for n in (n_seq, n_ctx, n_ctx))
    valid = np.ones((2, n_ctx), bool)
    valid[1, :14] = False
    inputs = {"q": q, "k": k, "v": v, "valid": valid}
    y = naive("attention", inputs)
    assert verdict("attention", inputs, y).status == "within"
    cached = y.copy()
    cached[0] += F(0.1)
    assert (
        "sequences with a cache" in verdict("attention", inputs, cached).where
        or "without padding" in verdict("attention", inputs, cached).where
    )
    head = y.copy()
    head[:, 2] += F(0.1)
    assert "n_head 2" in verdict("attention", inputs, head).where
    padded = y.copy()
    padded[1] = 0
    assert "sequences with padding" in verdict("attention", inputs, padded).where


def test_attention_names_rows_that_see_no_key():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 5, 4)).astype(F) for _ in "qkv")
    inputs = {"q": q, "k": k, "v": v, "valid": np.array([[False, False, True, True, True]])}
    y = naive("attention", inputs)
    y[:, :, :2] = v.mean(axis=2, keepdims=True)
    found = verdict("attention", inputs, y)
    assert found.status == "wrong"
    assert "rows that see no key" in found.where


@pytest.mark.parametrize(
    ("indices", "n", "text"),
    [
        ([3], 8, "3"),
        ([7], 8, "7: the last 1"),
        ([96, 97, 98], 99, "96 ... 98: the last, incomplete tile of 32"),
        (range(64, 100), 100, "64 ... 99: the last, incomplete tile of 64"),
        (range(10, 16), 16, "10 ... 15: the last 6"),
        (range(2, 5), 16, "2 ... 4"),
        (range(1, 40, 4), 40, "1, 5, ...: every 4th"),
        ([i for i in range(128) if i % 32 >= 28], 128, "28 ... 31 of every tile of 32"),
        ([0, 1, 7, 12], 20, "0, 1, 7, 12"),
    ],
)
def test_indices_are_described(indices, n, text):
    assert describe_indices(np.array(indices), n) == text


@given(st.integers(0, 3), st.integers(0, 8))
def test_one_wrong_head_is_named(head, row):
    wrong = np.zeros((2, 4, 9, 3), bool)
    wrong[:, head] = True
    assert (
        where(wrong, "attention")
        == f"n_head {head}{': the last 1' if head == 3 else ''} (54 of 216 entries)"
    )
    wrong[:] = False
    wrong[:, :, row] = True
    assert where(wrong, "rope").startswith(f"n_seq {row}")


def test_everything_and_nothing():
    assert where(np.ones((3, 4), bool), "linear") == "everywhere"
    assert where(np.zeros((3, 4), bool), "linear") == "nowhere"
    assert where(np.eye(8, dtype=bool), "linear").startswith("scattered")


# --------------------------------------------------------------------------------------------------------- hidden keys, and size


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_what_hidden_keys_hold_changes_no_verdict(value):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 2, n, 8)).astype(F) for n in (4, 12, 12))
    valid = np.arange(12) >= np.array([[3], [7]])
    y = ops.attention(q, k, v, mask=ops.mask.causal() & ops.mask.padding(valid))
    hidden = ~valid[:, None, :, None]
    for spoiled in ((np.where(hidden, F(value), k), v), (k, np.where(hidden, F(value), v))):
        inputs = {"q": q, "k": spoiled[0], "v": spoiled[1], "valid": valid}
        assert verdict("attention", inputs, y).status == "within"


def test_projections_are_judged_as_three_arrays_or_as_one():
    inputs, y = case("qkv_projection")
    q, k, v = y[:, :4], y[:, 4:6], y[:, 6:]
    assert verdict("qkv_projection", inputs, (q, k, v)).status == "within"
    assert verdict("qkv_projection", inputs, (q, v, k)).status == "wrong"
    assert verdict("qkv_projection", inputs, (q, k)).status == "wrong"


def test_a_verdict_reads_as_a_report():
    inputs, y = case("linear")
    y[:, 48:] = 0
    lines = str(verdict("linear", inputs, y)).splitlines()
    assert lines[0].startswith("wrong: got 0, exact")
    assert lines[1].startswith("share of the budget")
    assert lines[2] == "over budget: d_out 48 ... 63: the last 16 (96 of 384 entries)"
    assert lines[3] == "explained by: no arithmetic model"


@pytest.mark.slow
def test_two_thousand_tokens_are_judged_in_thirty_seconds():
    import time

    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal((1, 32, 2000, 96)).astype(F) for name in "qkv"}
    y = ops.blockwise_attention(inputs["q"], inputs["k"], inputs["v"], mask=ops.mask.causal())
    start = time.process_time()
    assert verdict("attention", inputs, y).status == "within"
    assert time.process_time() - start < 60  # of all cores


def test_a_large_attention_is_explained_by_its_worst_heads(monkeypatch):
    """The same model is named, whether all heads are looked at or four."""
    from npllm.testing import arithmetic_models

    op, inputs, _ = bfloat16_probabilities()
    rng = np.random.default_rng(1)
    inputs = {
        name: np.concatenate([x, rng.standard_normal((1, 4, 64, 16)).astype(F)], axis=1)
        for name, x in inputs.items()
    }
    inputs |= {
        "valid": np.arange(64)[None] >= 3,
        "bias": rng.standard_normal((6, 64, 64)).astype(F),
    }
    s = np.einsum("bhnd,bhmd->bhnm", inputs["q"], inputs["k"]) / F(4) + inputs["bias"]
    s = np.where(np.tril(np.ones((64, 64), bool)) & inputs["valid"], s, F(-1e30))
    e = np.exp(s - s.max(-1, keepdims=True)) * (s > F(-1e29))
    y = (e / np.maximum(e.sum(-1, keepdims=True), F(1e-30))).astype(B).astype(F) @ inputs["v"]
    whole = verdict(op, inputs, y)
    monkeypatch.setattr(arithmetic_models, "LARGE", 0)
    assert (verdict(op, inputs, y).model, whole.model) == (
        "float32 accumulation, bfloat16 probabilities",
    ) * 2


def test_factors_in_float64_do_not_make_a_rotation_float64():
    inputs = {
        **plain("rope", np.random.default_rng(0)),
        "factors": 1 + np.random.default_rng(0).random(4),
    }
    found = verdict("rope", inputs, naive("rope", inputs))
    assert (found.status, found.model) == ("within", "float32 accumulation")


def test_an_empty_output_is_within():
    x = np.ones((0, 4), F)
    assert verdict("add", {"x": x, "y": x}, x).status == "within"


@pytest.mark.parametrize("lead", [(), (2,), (1, 2)])
def test_attention_may_have_any_number_of_batch_axes(lead):
    rng = np.random.default_rng(0)
    shapes = {"q": (4, 5, 8), "k": (2, 9, 8), "v": (2, 9, 8)}
    inputs = {name: rng.standard_normal((*lead, *s)).astype(F) for name, s in shapes.items()}
    y = ops.attention(*inputs.values(), mask=ops.mask.causal())
    assert verdict("attention", inputs, y).status == "within"
    y[..., 3, :, :] *= F(1.01)
    found = verdict("attention", inputs, y)
    assert (found.status, "n_head 3" in found.where) == ("wrong", True)
