"""Adapters: functions of other libraries as operations, and what is refused of what they return."""

import math

import ml_dtypes
import numpy as np
import pytest
import tiny
from budget_inputs import INPUTS
from budget_mistakes import attend
from close import close
from hypothesis import given
from hypothesis import strategies as st
from seeds import run_seed

import npllm
from npllm import ops, testing
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.ops import mask
from npllm.testing.layouts import Layout

F, H, B = np.float32, np.float16, np.dtype(ml_dtypes.bfloat16)
LAYOUTS = [
    "b h n d",
    "b n h d",
    "n b h d",
    "b n (h d)",
    "(b h) n d",
    "(b n) (h d)",
    "d n h b",
    "h n d",
    "n h d",
]


def arrays(rng, n_batch=2, n_head=4, n_kv_head=4, n_seq=5, n_ctx=9, d=8, dtype=F):
    return tuple(
        rng.standard_normal((n_batch, heads, n, d)).astype(dtype)
        for heads, n in ((n_head, n_seq), (n_kv_head, n_ctx), (n_kv_head, n_ctx))
    )


def rule(rng, n_batch=2, n_ctx=9):
    valid = np.ones((n_batch, n_ctx), bool)
    valid[-1, : rng.integers(0, 4)] = False
    return mask.causal() & mask.padding(valid)


def in_layout(layout, kind="bool"):
    """An attention that knows its own layout, by an independent path: every letter named."""
    pack = Layout(layout)

    def mine(q, k, v, mask, scale, bias=None, softcap=None):
        sizes = {"h": 4, "b": 2, "d": 8}
        q, k, v = (
            pack.unpack(x, (2, 4, n, 8) if pack.batched else (4, n, 8), "x")
            for x, n in ((q, 5), (k, 9), (v, 9))
        )
        assert sizes
        s = np.einsum("...nd,...md->...nm", q, k) * F(scale)
        s = s if softcap is None else F(softcap) * np.tanh(s / F(softcap))
        s = s if bias is None else s + bias
        seen = {"bool": lambda: mask, "inverted": lambda: ~mask, "additive": lambda: mask == 0}[
            kind
        ]()
        s = np.where(seen, s, F(-1e30))
        e = np.exp(s - s.max(-1, keepdims=True)) * seen
        return pack.pack((e / np.maximum(e.sum(-1, keepdims=True), F(1e-30))) @ v)

    return mine


# ---------------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["bool", "inverted", "additive"])
def test_every_layout_and_kind_of_mask_gives_the_same(layout, kind):
    rng = np.random.default_rng(0)
    q, k, v = arrays(rng)
    seen = rule(rng)
    adapted = testing.adapt(
        in_layout(layout, kind), "attention", library="numpy", layout=layout, mask=kind
    )
    close(adapted(q, k, v, mask=seen), ops.attention(q, k, v, mask=seen))
    close(
        adapted(q[0], k[0], v[0], mask=mask.causal())
        if not Layout(layout).batched
        else adapted(q, k, v, mask=mask.causal())[0],
        ops.attention(q[0], k[0], v[0], mask=mask.causal()),
    )


@given(st.permutations("bhnd"), st.integers(0, 3))
def test_packing_is_undone_by_unpacking(letters, cut):
    pattern = " ".join(letters[:cut]) + f" ({' '.join(letters[cut:])})"
    x = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    packed = Layout(pattern).pack(x)
    assert packed.ndim == cut + 1
    close(Layout(pattern).unpack(packed, x.shape, "x"), x, times=0)


def test_a_layout_means_what_einops_says():
    x = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert Layout("b n (h d)").pack(x)[1, 2, 1 * 5 + 3] == x[1, 1, 2, 3]
    assert Layout("(b h) n d").pack(x)[1 * 3 + 2, 0, 4] == x[1, 2, 0, 4]
    assert Layout("n b h d").pack(x)[3, 1, 2, 4] == x[1, 2, 3, 4]


@pytest.mark.parametrize("pattern", ["b h n", "b h n d d", "b h n x", "", "b b h n d"])
def test_a_pattern_that_is_no_layout_raises(pattern):
    with pytest.raises(NpllmValueError, match="must name each of b, h, n, d once"):
        testing.adapt(len, "attention", library="numpy", layout=pattern)


def test_more_axes_before_the_heads_are_one_batch():
    rng = np.random.default_rng(0)
    q, k, v = (x.reshape(2, 1, *x.shape[1:]) for x in arrays(rng))
    adapted = testing.adapt(in_layout("b n h d"), "attention", library="numpy", layout="b n h d")
    close(adapted(q, k, v, mask=mask.causal()), ops.attention(q, k, v, mask=mask.causal()))


# ------------------------------------------------------------------------------------------------------------ what comes in


def seeing(q, k, v, mask, scale):
    """The definition, for a table."""
    return ops.attention(q, k, v, mask=mask, scale=scale)


def test_read_only_strided_and_reversed_arrays_are_taken():
    rng = np.random.default_rng(0)
    q, k, v = (np.repeat(x, 2, axis=-1)[..., ::2] for x in arrays(rng))
    q.flags.writeable = False
    k = k[:, ::-1][:, ::-1]
    for library in ("numpy", "dlpack"):
        close(
            testing.adapt(seeing, "attention", library=library)(q, k, v, mask=mask.causal()),
            ops.attention(q, k, v, mask=mask.causal()),
            times=0,
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_inputs_are_rounded_to_the_dtype_asked_for(dtype):
    rng, seen = np.random.default_rng(0), []

    def spy(q, k, v, mask, scale):
        seen.extend(str(x.dtype) for x in (q, k, v))
        return seeing(q, k, v, mask, scale)

    y = testing.adapt(spy, "attention", library="numpy", dtype=dtype)(
        *arrays(rng), mask=mask.causal()
    )
    assert seen == [dtype] * 3
    assert y.dtype == F


def test_an_additive_mask_contains_the_bias():
    rng = np.random.default_rng(0)
    q, k, v = arrays(rng)
    bias = rng.standard_normal((5, 9)).astype(F)

    def mine(q, k, v, mask):
        s = q @ np.swapaxes(k, -1, -2) / F(math.sqrt(8)) + mask
        e = np.exp(s - s.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True) @ v

    close(
        testing.adapt(mine, "attention", library="numpy", mask="additive")(
            q, k, v, mask=mask.causal(), bias=bias
        ),
        ops.attention(q, k, v, mask=mask.causal(), bias=bias),
    )


def test_slots_reach_the_rule():
    rng = np.random.default_rng(0)
    q, k, v = arrays(rng)
    slots = {"q_slots": np.array([3, 4, 5, 6, 7]), "k_slots": np.arange(9)}
    close(
        testing.adapt(seeing, "attention", library="numpy")(q, k, v, mask=mask.causal(), **slots),
        ops.attention(q, k, v, mask=mask.causal(), **slots),
        times=0,
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"softcap": 2.0}, r"was asked for softcap = 2.0, but its signature names none of softcap"),
        ({"bias": np.zeros((5, 9), F)}, r"was asked for bias = \[5, 9\]"),
        ({"return_lse": True}, "return_lse"),
    ],
)
def test_an_option_that_the_function_does_not_take_raises(options, text):
    adapted = testing.adapt(seeing, "attention", library="numpy")
    with pytest.raises(NpllmTypeError, match=text):
        adapted(*arrays(np.random.default_rng(0)), **options)


def test_a_function_without_a_mask_must_say_so():
    def blind(q, k, v):
        return ops.attention(q, k, v, mask=mask.causal())

    q, k, v = arrays(np.random.default_rng(0))
    with pytest.raises(NpllmTypeError, match='mask="none" says that it makes its own'):
        testing.adapt(blind, "attention", library="numpy")(q, k, v, mask=mask.causal())
    close(
        testing.adapt(blind, "attention", library="numpy", mask="none")(
            q, k, v, mask=mask.causal()
        ),
        ops.attention(q, k, v, mask=mask.causal()),
        times=0,
    )


# ------------------------------------------------------------------------------------------------------------- what comes back


@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (lambda _: None, NpllmTypeError, "must return an array of numpy, got builtins.NoneType"),
        (lambda y: y.tolist(), NpllmTypeError, "got builtins.list"),
        (
            lambda y: y.astype(np.float64),
            NpllmTypeError,
            "must return float32, the dtype it was given, got float64",
        ),
        (
            lambda y: y[..., :-1],
            NpllmValueError,
            r'must return "b h n d" = \[2, 4, 5, 8\], got \[2, 4, 5, 7\]',
        ),
        (
            lambda y: np.where(y == y.flat[3], F(np.nan), y),
            NpllmValueError,
            r"returned NaN in 1 of 320 entries, first at \[0, 0, 0, 3\]",
        ),
    ],
)
def test_what_is_no_result_of_attention_raises(spoil, error, text):
    adapted = testing.adapt(
        lambda q, k, v, mask: spoil(ops.attention(q, k, v, mask=mask)), "attention", library="numpy"
    )
    with pytest.raises(error, match=text):
        adapted(*arrays(np.random.default_rng(0)), mask=mask.causal())


def test_nan_of_the_inputs_is_handed_on():
    q, k, v = arrays(np.random.default_rng(0))
    q[0, 0, 0, 0] = np.nan
    y = testing.adapt(seeing, "attention", library="numpy")(q, k, v, mask=mask.causal())
    assert np.isnan(y[0, 0, 0]).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"library": "tensorflow"}, "library must be one of numpy, torch"),
        ({"mask": "triangle"}, "mask must be one of bool"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"op": "conv"}, "op must be one of attention"),
    ],
)
def test_what_is_no_adapter_raises(options, text):
    with pytest.raises(NpllmValueError, match=text):
        testing.adapt(seeing, **{"op": "attention", "library": "numpy", **options})


ROW_OPS = {
    "linear": lambda rng: (
        rng.standard_normal((3, 8)),
        rng.standard_normal((4, 8)),
        rng.standard_normal(4),
    ),
    "rms_norm": lambda rng: (rng.standard_normal((3, 8)), rng.standard_normal(8), 1e-5),
    "layer_norm": lambda rng: (
        rng.standard_normal((3, 8)),
        rng.standard_normal(8),
        rng.standard_normal(8),
        1e-5,
    ),
    "apply_rope": lambda rng: (
        rng.standard_normal((2, 3, 5, 8)),
        rng.standard_normal((5, 6)),
        rng.standard_normal((5, 6)),
    ),
    "swiglu": lambda rng: (rng.standard_normal((3, 8)), rng.standard_normal((3, 8))),
    "gelu": lambda rng: (rng.standard_normal((3, 8)),),
    "silu": lambda rng: (rng.standard_normal((3, 8)),),
    "softmax": lambda rng: (rng.standard_normal((3, 8)),),
    "add": lambda rng: (rng.standard_normal((3, 8)), rng.standard_normal((3, 8))),
    "embed": lambda rng: (rng.integers(0, 7, (2, 3)), rng.standard_normal((7, 4))),
}


def row_arguments(op, dtype=F):
    return [
        x.astype(dtype) if getattr(x, "dtype", None) == np.float64 else x
        for x in ROW_OPS[op](np.random.default_rng(0))
    ]


@pytest.mark.parametrize("library", ["numpy", "dlpack", "array_api_strict"])
@pytest.mark.parametrize("op", ROW_OPS)
def test_every_operation_is_adapted_in_the_libraries_at_hand(op, library):
    if library == "array_api_strict":
        pytest.importorskip("array_api_strict")
    arguments = row_arguments(op)
    close(
        testing.adapt(getattr(ops, op), op, library=library)(*arguments),
        getattr(ops, op)(*arguments),
    )


@pytest.mark.parametrize("op", ROW_OPS)
def test_a_result_of_another_shape_raises(op):
    arguments = row_arguments(op)
    with pytest.raises(NpllmValueError, match="must return"):
        testing.adapt(lambda *_: np.zeros((1, 1), F), op, library="numpy")(*arguments)


# -------------------------------------------------------------------------------------------------------------- live: torch, JAX


def torch_functions():
    torch = pytest.importorskip("torch", reason="live: needs torch")
    functional = torch.nn.functional
    return {
        "linear": functional.linear,
        "rms_norm": lambda x, w, eps: functional.rms_norm(x, w.shape, w, eps),
        "layer_norm": lambda x, w, b, eps: functional.layer_norm(x, w.shape, w, b, eps),
        "gelu": functional.gelu,
        "silu": functional.silu,
        "softmax": lambda x: functional.softmax(x, dim=-1),
        "swiglu": lambda gate, up: functional.silu(gate) * up,
        "embed": functional.embedding,
        "add": torch.add,
    }


@pytest.mark.live
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "op", ["linear", "rms_norm", "layer_norm", "gelu", "silu", "softmax", "swiglu", "embed", "add"]
)
def test_torch_functions_are_operations(op, dtype):
    arguments = row_arguments(op, dtype)
    close(
        testing.adapt(torch_functions()[op], op, library="torch")(*arguments),
        getattr(ops, op)(*arguments),
    )


@pytest.mark.live
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_torch_attention_is_within_its_budget(dtype, kind):
    """In 16 bits torch rounds its probabilities, so that is what is asked for."""
    torch = pytest.importorskip("torch", reason="live: needs torch")
    adapted = testing.adapt(
        torch.nn.functional.scaled_dot_product_attention, "attention", library="torch", mask=kind
    )
    rng = np.random.default_rng(0)
    q, k, v = (x.astype(B if dtype == "bfloat16" else dtype) for x in arrays(rng))
    inputs = {"q": q, "k": k, "v": v, "valid": np.arange(9) >= np.array([[0], [3]])}
    y = adapted(q, k, v, mask=mask.causal() & mask.padding(inputs["valid"]))
    assert y.dtype == q.dtype
    options = {} if dtype == "float32" else {"probabilities": dtype}
    found = testing.verdict("attention", inputs, y, **options)
    assert found.status == "within", str(found)


@pytest.mark.live
@pytest.mark.parametrize(
    "op", ["linear", "rms_norm", "layer_norm", "swiglu", "gelu", "softmax", "add"]
)
def test_torch_is_within_the_budget_on_nasty_inputs(op):
    """A two-pass variance and float32 sums, in whatever order torch adds."""
    torch = pytest.importorskip("torch", reason="live: needs torch")
    functional = torch.nn.functional
    call = {
        "linear": functional.linear,
        "rms_norm": lambda x, weight, eps: functional.rms_norm(x, weight.shape, weight, eps),
        "layer_norm": lambda x, weight, bias, eps: functional.layer_norm(
            x, weight.shape, weight, bias, eps
        ),
        "swiglu": lambda gate_up: (
            functional.silu(gate_up.chunk(2, -1)[0]) * gate_up.chunk(2, -1)[1]
        ),
        "gelu": lambda x, approximate: functional.gelu(x, approximate=approximate),
        "softmax": lambda x: functional.softmax(x, dim=-1),
        "add": lambda x, y: x + y,
    }[op]
    rng = np.random.default_rng(run_seed())
    for _ in range(200):
        inputs = INPUTS[op](rng)
        given_ = {
            name: torch.from_numpy(x.copy()) if hasattr(x, "shape") else x
            for name, x in inputs.items()
        }
        with np.errstate(all="ignore"):
            found = testing.verdict(op, inputs, call(**given_))
        assert found.status in ("within", "not decidable", "no gold"), f"{inputs}: {found}"


@pytest.mark.live
@pytest.mark.parametrize("dtype", [F, B])
def test_jax_attention_is_within_its_budget(dtype):
    """JAX gives a row without keys the mean of the values, so no row is without keys here."""
    jax = pytest.importorskip("jax", reason="live: needs jax")
    adapted = testing.adapt(
        jax.nn.dot_product_attention, "attention", library="jax", layout="b n h d"
    )
    q, k, v = (x[..., ::-1] for x in arrays(np.random.default_rng(0), dtype=dtype))
    inputs = {"q": q, "k": k, "v": v, "window": 4}
    options = {} if dtype == F else {"probabilities": "bfloat16"}
    found = testing.verdict(
        "attention", inputs, adapted(q, k, v, mask=mask.sliding_window(4)), **options
    )
    assert found.status == "within", str(found)


@pytest.mark.live
def test_jax_makes_no_float32_of_float64_silently():
    jax = pytest.importorskip("jax", reason="live: needs jax")
    if jax.config.jax_enable_x64:
        pytest.skip("jax_enable_x64 is on")
    with pytest.raises(NpllmTypeError, match="JAX made float32 of float64"):
        testing.adapt(jax.numpy.add, "add", library="jax")(np.ones((2, 2)), np.ones((2, 2)))


@pytest.mark.live
def test_a_tensor_from_a_numpy_function_raises():
    torch = pytest.importorskip("torch", reason="live: needs torch")
    x = np.ones((2, 2), F)
    with pytest.raises(NpllmTypeError, match=r"must return an array of numpy, got torch\.Tensor"):
        testing.adapt(lambda x, y: torch.from_numpy(x + y), "add", library="numpy")(x, x)
    with pytest.raises(NpllmTypeError, match=r"must return an array of torch, got numpy\.ndarray"):
        testing.adapt(lambda x, y: (x + y).numpy(), "add", library="torch")(x, x)


# ---------------------------------------------------------------------------------------------- masks as tables, models with ops


@pytest.mark.parametrize(
    "slots",
    [{}, {"q_slots": range(2, 5)}, {"q_slots": np.array([0, 4, 2]), "k_slots": np.arange(6)[::-1]}],
)
def test_a_rule_is_written_out_as_attention_evaluates_it(slots):
    rng = np.random.default_rng(0)
    q, k, v = arrays(rng, n_seq=3, n_ctx=6)
    for one in (
        mask.causal(),
        mask.sliding_window(2),
        mask.causal() & mask.padding(np.ones((2, 6), bool)),
        lambda i, j: j <= i,
    ):
        table = mask.to_bool(one, 3, 6, **slots)
        assert table.dtype == bool
        assert table.shape[-2:] == (3, 6)
        close(
            ops.attention(q, k, v, mask=table), ops.attention(q, k, v, mask=one, **slots), times=0
        )
    assert mask.to_bool(mask.causal(), 2, 4).tolist() == [[True, True, True, False], [True] * 4]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            (np.ones((2, 2), bool), 2, 2),
            "rule must be a Rule of npllm.ops.mask or a function of slots, got ndarray",
        ),
        ((mask.causal(), 2, 2, np.arange(3)), r"q_slots must be \[n_seq\] = \[2\], got \[3\]"),
        ((mask.causal(), 2, 2, None, np.ones(2)), r"k_slots must be integers"),
    ],
)
def test_what_is_no_rule_and_no_slots_raises(arguments, text):
    with pytest.raises((NpllmTypeError, NpllmValueError), match=text):
        mask.to_bool(*arguments)


@pytest.fixture(scope="module")
def model():
    return npllm.Model(*(lambda m: (m.config, m.params))(tiny.model()))  # on the fast set


def test_a_model_runs_the_operation_it_is_given(model):
    calls = []

    def mine(q, k, v, **options):
        calls.append(q.shape)
        return ops.attention(q, k, v, **options)

    ids = tiny.random_ids(2, 7)
    other = model.with_ops(attention=mine)
    close(other(ids), model(ids), times=20)
    assert len(calls) == model.config.num_hidden_layers
    cache = other.new_cache(2)
    for start in range(7):
        last = other(ids[:, start : start + 1], cache=cache)
    close(last, model(ids)[:, -1:], times=20)
    assert len(calls) == 8 * model.config.num_hidden_layers
    assert other.ops.linear is model.ops.linear
    assert other.mask is model.mask
    assert model.ops.attention is not other.ops.attention


def test_a_model_keeps_its_mask_and_tokenizer(model):
    windowed = model.with_mask(mask.sliding_window(3))
    ids = tiny.random_ids(1, 9)
    close(windowed.with_ops(attention=ops.attention)(ids), windowed(ids), times=20)


@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (
            lambda _: None,
            NpllmTypeError,
            "attention must return an array of numpy, got builtins.NoneType",
        ),
        (
            lambda y: y.astype(np.float64),
            NpllmTypeError,
            "attention must return float32, got float64",
        ),
        (
            lambda y: y[:, :1],
            NpllmValueError,
            r"attention must return the shape \[1, 4, 5, \d+\], got \[1, 1, 5, \d+\]",
        ),
    ],
)
def test_what_a_replaced_operation_returns_is_checked(model, spoil, error, text):
    other = model.with_ops(
        attention=lambda q, k, v, **options: spoil(ops.attention(q, k, v, **options))
    )
    with pytest.raises(error, match=text):
        other(tiny.random_ids(1, 5))


@pytest.mark.parametrize("op", ["linear", "rms_norm", "swiglu", "add", "apply_rope", "embed"])
def test_each_replaced_operation_is_checked_for_its_dtype(model, op):
    other = model.with_ops(
        **{op: lambda *args, **options: getattr(ops, op)(*args, **options).astype(np.float64)}
    )
    with pytest.raises(NpllmTypeError, match=f"{op} must return float32, got float64"):
        other(tiny.random_ids(1, 5))


def test_an_encoder_runs_the_operation_it_is_given():
    import test_encoder

    encoder, _ = test_encoder.make(dtype=np.float32)
    calls = []
    other = encoder.with_ops(
        gelu=lambda x, *rest, **options: calls.append(x.shape) or ops.gelu(x, *rest, **options)
    )
    close(other.embed(["the cats sat"]), encoder.embed(["the cats sat"]), times=20)
    assert len(calls) == encoder.config.num_hidden_layers
    with pytest.raises(NpllmTypeError, match="gelu must return float32, got float64"):
        encoder.with_ops(gelu=lambda x, *_: x.astype(np.float64)).embed(["the cats sat"])


def test_a_name_that_no_operation_has_raises(model):
    with pytest.raises(NpllmTypeError, match="no operation is called atention"):
        model.with_ops(atention=ops.attention)


def test_an_adapted_function_runs_in_a_model(model):
    adapted = testing.adapt(
        in_table, "attention", library="numpy", layout="b n h d", mask="inverted"
    )
    ids = tiny.random_ids(2, 6)
    close(model.with_ops(attention=adapted)(ids), model(ids), times=20)


def in_table(q, k, v, mask, scale):
    q, k, v = (np.swapaxes(x, 1, 2) for x in (q, k, v))
    return np.swapaxes(ops.attention(q, k, v, mask=~mask, scale=scale), 1, 2)


def test_mistakes_of_the_tests_are_mistakes():
    """The helper of the planted mistakes is right where nothing is changed."""
    rng = np.random.default_rng(0)
    q, k, v = arrays(rng)
    close(attend({"q": q, "k": k, "v": v}), ops.attention(q, k, v, mask=mask.causal()))
