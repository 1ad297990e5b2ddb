"""ops.emulate: Transformers' 16-bit arithmetic, bit for bit; and round_to, which it rests on."""

import inspect
import json
import os
import re
from pathlib import Path

import family
import numpy as np
import pytest
import tiny
from close import close
from hypothesis import given
from hypothesis import strategies as st

import npllm
from npllm import arrays, ops
from npllm.arrays import round_to
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.ops.emulate import POINTS

NUMPY = {"bfloat16": np.dtype(tiny.DTYPES["BF16"]), "float16": np.dtype("float16")}
GOLDENS = {
    path.stem.removeprefix("emulate_"): path
    for path in sorted((Path(__file__).parent / "golden").glob("emulate_*.npz"))
}
BFLOAT16 = [name for name in GOLDENS if name.startswith("bfloat16")]
N_PROMPT = 5  # tokens of the cached call and of the generation

# ------------------------------------------------------------------------------------------------------------------- round_to

SIGNIFICANT = {
    "bfloat16": (8, -126, 127),
    "float16": (11, -14, 15),
}  # bits, smallest and largest exponent of a normal number


def nearest(x, dtype):
    """The values of a 16-bit type nearest to float32 numbers, the even one of two, in exact
    arithmetic: in float64, where a quotient by a power of two and its rounding are exact.
    """
    bits, low, high = SIGNIFICANT[dtype]
    x = np.asarray(x, np.float64)
    exponent = np.maximum(np.frexp(x)[1] - 1, low)
    step = np.ldexp(1.0, exponent - bits + 1)
    y = np.rint(x / step) * step  # a half goes to even
    y = np.where(np.abs(y) < 2.0 ** (high + 1), y, np.copysign(np.inf, x))
    return np.where(np.isnan(x), x, y)


def same_bits(got, want):
    """Equal to the sign of a zero; NaN equals NaN."""
    __tracebackhide__ = True
    got, want = np.asarray(got), np.asarray(want, np.float32)
    assert got.dtype == np.float32 and got.shape == want.shape
    assert np.array_equal(np.isnan(got), np.isnan(want))
    number = ~np.isnan(want)
    np.testing.assert_array_equal(got.view(np.uint32)[number], want.view(np.uint32)[number])


@pytest.mark.parametrize("dtype", NUMPY)
def test_every_pattern_and_what_lies_between(dtype):
    """Every 16-bit value, the middle to its neighbour, and one float32 step to either side of that
    middle.
    """
    values = np.sort(np.arange(2**15, dtype=np.uint16).view(NUMPY[dtype]).astype(np.float32))
    values = values[np.isfinite(values)]
    middle = np.concatenate(
        [
            (values[:-1].astype(np.float64) + values[1:]) / 2,
            [values[-1] + (values[-1].astype(np.float64) - values[-2]) / 2],
        ]
    ).astype(np.float32)
    x = np.concatenate(
        [
            values,
            middle,
            np.nextafter(middle, np.float32(0)),
            np.nextafter(middle, np.float32(np.inf)),
        ]
    )
    x = np.concatenate([x, -x, np.float32([np.inf, -np.inf, np.nan])])
    same_bits(round_to(x, dtype), nearest(x, dtype))


@given(st.integers(0, 2**32 - 1), st.sampled_from(list(NUMPY)))
def test_any_float32(bits, dtype):
    x = np.array([bits], np.uint32).view(np.float32)
    same_bits(round_to(x, dtype), nearest(x, dtype))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1), st.sampled_from(list(NUMPY)))
def test_laws_of_rounding(x, dtype):
    """Twice is once; the order stays; the sign comes out."""
    x = np.sort(np.array(x, np.float32))
    y = round_to(x, dtype)
    same_bits(round_to(y, dtype), y)
    same_bits(round_to(-x, dtype), -y)
    assert np.all(y[:-1] <= y[1:])


def test_round_to_refuses_what_would_round_twice():
    with pytest.raises(NpllmTypeError, match="expected float32 to round to bfloat16, got float64"):
        round_to(np.ones(2), "bfloat16")
    with pytest.raises(NpllmValueError, match="bfloat16 or float16, got 'float32'"):
        round_to(np.ones(2, np.float32), "float32")


# -------------------------------------------------------------------------------------------------------------------- goldens


@pytest.fixture(scope="module")
def golden():
    """Reads a golden file once: what it says about itself, its arrays, and its weights made anew."""
    known = {}

    def read(name):
        if name not in known:
            with np.load(GOLDENS[name]) as file:
                arrays = {key: file[key] for key in file}
            about = json.loads(str(arrays.pop("about")))
            weights = family.tensors(about["config"], about["seed"], NUMPY[about["dtype"]])
            assert family.fingerprint(weights) == about["weights"], (
                "family.tensors draws other weights than when the golden was made"
            )
            known[name] = about, arrays, weights
        return known[name]

    return read


def load(golden, name, **options):
    """The model of a golden file, with the operations that emulate it unless others are given."""
    about, arrays, weights = golden(name)
    return family.load(
        about["config"], weights, **{"ops": ops.emulate(about["dtype"])} | options
    ), arrays


def bits(x, name):
    """Values as the integers of their 16 bits (name: a golden file, or a type); they must be such
    values to begin with.
    """
    dtype = name.split("_")[0]
    assert x.dtype == np.float32
    with np.errstate(over="ignore"):
        narrow = x.astype(NUMPY[dtype])
    np.testing.assert_array_equal(narrow.astype(np.float32), x, "not rounded to the type")
    return narrow.view(np.uint16)


def test_goldens_are_there():
    assert len(BFLOAT16) >= 4 and "bfloat16_longrope_partial_tied" in BFLOAT16
    assert sum(path.stat().st_size for path in GOLDENS.values()) < 150_000


@pytest.mark.parametrize("name", GOLDENS)
def test_prefill_is_bit_exact(golden, name):
    model, want = load(golden, name)
    np.testing.assert_array_equal(bits(model(want["ids"]), name), want["logits"])


@pytest.mark.parametrize("name", GOLDENS)
def test_left_padding_is_bit_exact_where_there_are_tokens(golden, name):
    model, want = load(golden, name)
    n_seq = want["mask"].shape[1]
    equal = (
        bits(model(want["ids"][:, :n_seq], attention_mask=want["mask"]), name)[want["mask"] == 1]
        == want["padded"][want["mask"] == 1]
    )
    assert np.mean(equal) >= (
        1 if name in BFLOAT16 else 0.99
    )  # float16: the order of sums shows in 5 of 2074 values


@pytest.mark.parametrize("name", GOLDENS)
def test_cached_decode_is_bit_exact(golden, name):
    model, want = load(golden, name)
    cache, n_seq = model.new_cache(2), want["cached"].shape[1]
    parts = [model(want["ids"][:, :N_PROMPT], cache=cache)]
    parts += [model(want["ids"][:, at : at + 1], cache=cache) for at in range(N_PROMPT, n_seq)]
    np.testing.assert_array_equal(bits(np.concatenate(parts, axis=1), name), want["cached"])


@pytest.mark.parametrize("name", GOLDENS)
def test_generation_is_bit_exact_at_every_step(golden, name):
    """Also across the longrope switch, where Transformers computes the prompt anew, as we do."""
    model, want = load(golden, name)
    ids, n_new = want["generated"], want["steps"].shape[1]
    np.testing.assert_array_equal(
        model.generate(ids[:, :N_PROMPT], max_new_tokens=n_new, do_sample=False), ids
    )
    cache = model.new_cache()
    parts = [model(ids[:, :N_PROMPT], cache=cache, logits_to_keep=1)]
    parts += [model(ids[:, at : at + 1], cache=cache) for at in range(N_PROMPT, ids.shape[1] - 1)]
    np.testing.assert_array_equal(bits(np.concatenate(parts, axis=1), name), want["steps"])


# ----------------------------------------------------------------------------------------------------- it rounds, and everywhere


@pytest.mark.parametrize("name", GOLDENS)
def test_the_default_gives_other_numbers(golden, name):
    """What emulation is for; and the default is at least a hundred times nearer to float64."""
    about, _, _ = golden(name)
    (emulated, want), (default, _), (exact, _) = (
        load(golden, name, **options)
        for options in ({}, {"ops": None}, {"dtype": "float64", "ops": None})
    )
    ids = want["ids"]
    assert np.mean(default(ids) == emulated(ids)) < 0.01
    step = {"bfloat16": 2**-8, "float16": 2**-11}[about["dtype"]]
    error = np.abs(emulated(ids) - exact(ids)).max()
    assert step / 2 < error / np.abs(exact(ids)).max() < 40 * step
    assert np.abs(default(ids) - exact(ids)).max() < error / 100


@pytest.mark.parametrize("point", [point for point in POINTS if point != "masked"])
@pytest.mark.parametrize("name", BFLOAT16)
def test_every_rounding_point_matters(golden, name, point):
    content = golden(name)[0]["config"]
    left_out = {point}
    if (
        point in ("scores", "scaled")
        and content["hidden_size"] // content["num_attention_heads"] == 16
    ):
        left_out = {
            "scores",
            "scaled",
        }  # a scale of 1/4 rounds nothing, so that one of the two is enough
    model, want = load(
        golden,
        name,
        ops=ops.emulate("bfloat16", [other for other in POINTS if other not in left_out]),
    )
    assert np.any(model(want["ids"]).astype(NUMPY["bfloat16"]).view(np.uint16) != want["logits"])


def test_no_point_at_all_is_the_default():
    """Without rounding the emulation is plain float32, up to the order of sums."""
    changes = {"dtype": NUMPY["bfloat16"], "sliding_window": 3}
    ids = tiny.random_ids(2, 9)
    close(
        tiny.model(ops=ops.emulate("bfloat16", ()), **changes)(ids),
        tiny.model(**changes)(ids),
        times=4,
    )


def test_a_row_that_sees_no_key_is_the_mean_of_all_values():
    """finfo.min is added to every score, and in float16 must swallow them: without rounding the
    sum, they would show.
    """
    rng = np.random.default_rng(0)
    q, k, v = (
        round_to(rng.standard_normal((1, 2, 4, 8)).astype(np.float32), "float16") for _ in range(3)
    )
    nothing = np.zeros((4, 4), bool)
    got = ops.emulate("float16").attention(q, k, v, mask=nothing)
    close(
        got, np.broadcast_to(round_to(v.mean(axis=-2, keepdims=True), "float16"), v.shape), times=1
    )
    other = ops.emulate("float16", [point for point in POINTS if point != "masked"]).attention(
        q, k, v, mask=nothing
    )
    assert np.abs(other - got).max() > 0.05


def test_attention_reads_grouped_heads_and_partial_rope_passes_through():
    rng = np.random.default_rng(1)
    q = round_to(rng.standard_normal((2, 6, 5, 8)).astype(np.float32), "bfloat16")
    k, v = (
        round_to(rng.standard_normal((2, 3, 5, 8)).astype(np.float32), "bfloat16") for _ in range(2)
    )
    emulated = ops.emulate("bfloat16")
    rule = ops.mask.causal()
    close(emulated.attention(q, k, v, mask=rule), ops.attention(q, k, v, mask=rule), times=2e4)
    same_bits(
        emulated.attention(q, k, v, mask=rule),
        emulated.attention(q, k.repeat(2, axis=1), v.repeat(2, axis=1), mask=rule),
    )
    cos, sin = emulated.rope_tables(np.arange(5), ops.rope_frequencies(6))
    turned = emulated.apply_rope(q, cos, sin)
    same_bits(turned[..., 6:], q[..., 6:])
    for interleaved in (False, True):
        close(
            emulated.apply_rope(q, cos, sin, interleaved=interleaved),
            ops.apply_rope(q, cos, sin, interleaved=interleaved),
            times=2e3,
        )


# ----------------------------------------------------------------------------------------------------------- the set, its errors


def test_signatures_are_those_of_the_definitions():
    emulated = ops.emulate("float16")
    assert emulated.name == "emulate float16"
    for name in emulated.names():
        if name not in ops.SLOTS:
            assert inspect.signature(getattr(emulated, name)) == inspect.signature(
                getattr(ops, name)
            ), name


@pytest.mark.parametrize("dtype", ["float8", "float32", "float64", None])
def test_other_types_are_refused(dtype):
    with pytest.raises(NpllmValueError, match="bfloat16 and float16"):
        ops.emulate(dtype)


def test_unknown_points_are_refused():
    with pytest.raises(
        NpllmValueError, match=r"no rounding point is called soft; there are normalised, gain"
    ):
        ops.emulate("bfloat16", ["linear", "soft"])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_weights_of_another_type_are_refused(dtype):
    model = tiny.model(ops=ops.emulate("bfloat16"), dtype=dtype)
    with pytest.raises(
        NpllmTypeError, match=f'takes weights stored in bfloat16.*got {dtype}.*dtype="bfloat16"'
    ):
        model(tiny.random_ids(1, 3))


@pytest.mark.parametrize(
    "option", [{"bias": np.zeros((3, 3), np.float32)}, {"softcap": 1.0}, {"return_lse": True}]
)
def test_what_phi3_does_not_have_is_refused(option):
    x = np.ones((1, 3, 2), np.float32)
    with pytest.raises(NpllmValueError, match="no bias, no softcap and returns no lse"):
        ops.emulate("bfloat16").attention(x, x, x, **option)


def test_shapes_are_checked():
    emulated, x, w = (
        ops.emulate("bfloat16"),
        np.ones((2, 3), np.float32),
        np.ones((4, 5), NUMPY["bfloat16"]),
    )
    for call in (
        lambda: emulated.linear(x, w),
        lambda: emulated.rms_norm(x, w[0], 1e-5),
        lambda: emulated.swiglu(x, x[:1]),
        lambda: emulated.add(x, x[:1]),
        lambda: emulated.apply_rope(x[None], x, x[:1]),
    ):
        with pytest.raises(NpllmValueError, match=r"\[2, 3\]|\[d_out, d_in\]|\[d_model\]|d_rope"):
            call()


def test_blocks_of_a_weight_change_nothing(monkeypatch):
    rng = np.random.default_rng(2)
    x, w = (
        rng.standard_normal((3, 7)).astype(np.float32),
        rng.standard_normal((11, 7)).astype(NUMPY["bfloat16"]),
    )
    bias = rng.standard_normal(11).astype(NUMPY["bfloat16"])
    whole = ops.emulate("bfloat16").linear(x, w, bias)
    close(whole, round_to(ops.linear(x, w, bias), "bfloat16"), times=1e3)
    monkeypatch.setattr(arrays, "HOST_ENTRIES", 4 * 7)
    same_bits(ops.emulate("bfloat16").linear(x, w, bias), whole)


# ------------------------------------------------------------------------------------------------------------- beside Transformers


@pytest.fixture(scope="module")
def transformers():
    try:
        import torch
        import transformers
    except ImportError as error:
        if os.environ.get("NPLLM_REQUIRE_LIVE") == "1":
            pytest.fail(f"NPLLM_REQUIRE_LIVE=1, but Transformers cannot be imported: {error}")
        pytest.skip(f"Transformers is not installed ({error})")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    return transformers


def drawn(seed):
    """A random tiny config.json: heads, groups, widths, layers, tie, window, partial and long RoPE."""
    rng = np.random.default_rng(seed)
    n_kv_head, group, d_head, n_layer = (
        int(rng.choice(n)) for n in ((1, 2, 3), (1, 2, 4), (8, 16, 24), (1, 2, 3))
    )
    content = {
        "num_attention_heads": n_kv_head * group,
        "num_key_value_heads": n_kv_head,
        "hidden_size": n_kv_head * group * d_head,
        "num_hidden_layers": n_layer,
        "intermediate_size": int(rng.integers(8, 100)),
        "tie_word_embeddings": bool(rng.integers(2)),
        "sliding_window": [None, 4, 6][rng.integers(3)],
        "partial_rotary_factor": [1.0, 0.75, 0.5][rng.integers(3)],
    }
    if rng.integers(2):
        half = int(d_head * content["partial_rotary_factor"]) // 2
        content |= {
            "original_max_position_embeddings": 8,
            "max_position_embeddings": 128,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": rng.uniform(1, 2, half).tolist(),
                "long_factor": rng.uniform(1, 8, half).tolist(),
            },
        }
    return tiny.config_dict(**content)


def live_shares(transformers, tmp_path, dtype, seeds):
    """Share of equal bits for each drawn config: prefill short and long of the longrope switch, and
    cached decode.
    """
    import torch

    shares = []
    for seed in seeds:
        content = drawn(seed) | {"torch_dtype": dtype}
        folder = family.write(
            tmp_path / str(seed), content, family.tensors(content, seed, NUMPY[dtype])
        )
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="eager"
        ).eval()
        ours = npllm.load(folder, ops=ops.emulate(dtype))
        ids = family.ids_of(ours.config, (2, 12), seed)
        with torch.no_grad():
            want = [theirs(torch.tensor(ids[:, :n])).logits for n in (12, 8)]
            first = theirs(torch.tensor(ids[:, :6]), use_cache=True)
            want += [
                theirs(
                    torch.tensor(ids[:, at : at + 1]), past_key_values=first.past_key_values
                ).logits
                for at in (6, 7)
            ]
        cache = ours.new_cache(2)
        ours(ids[:, :6], cache=cache)
        got = [
            ours(ids),
            ours(ids[:, :8]),
            *(ours(ids[:, at : at + 1], cache=cache) for at in (6, 7)),
        ]
        equal = [
            bits(a, dtype) == b.contiguous().view(torch.int16).numpy().view(np.uint16)
            for a, b in zip(got, want, strict=True)
        ]
        shares.append(float(np.mean(np.concatenate([part.ravel() for part in equal]))))
    return shares


def test_the_docstring_lists_every_point():
    listed = ops.emulate.__doc__.split("The points", 1)[1].split("Between two points", 1)[0]
    assert {name for name in POINTS if not re.search(rf"\b{name}\b", listed)} == set()


def test_points_may_come_from_a_generator():
    x, w = np.ones((1, 2), np.float32), np.full((1, 2), 1 + 2**-7, np.dtype(tiny.DTYPES["BF16"]))
    w = w + np.array([[2**-7, 0]], w.dtype)
    rounded = ops.emulate("bfloat16", (name for name in ("linear",))).linear(x, w)
    assert rounded == ops.emulate("bfloat16", ["linear"]).linear(x, w)
    assert rounded != ops.emulate("bfloat16", []).linear(x, w)


@pytest.mark.live
@pytest.mark.filterwarnings("ignore")
def test_live_bfloat16(transformers, tmp_path):
    shares = live_shares(transformers, tmp_path, "bfloat16", range(40))
    print(
        f"\nbfloat16: {np.mean(shares):.3%} of the logits of 40 tiny models are equal bits; {np.mean(np.equal(shares, 1)):.0%} of the models are"
    )
    assert np.mean(shares) >= 0.99, shares


@pytest.mark.live
@pytest.mark.filterwarnings("ignore")
def test_live_float16(transformers, tmp_path):
    """PyTorch's order of sums in float16 is not repeated."""
    shares = live_shares(transformers, tmp_path, "float16", range(20))
    print(
        f"\nfloat16: {np.mean(shares):.3%} of the logits of 20 tiny models are equal bits; {np.mean(np.equal(shares, 1)):.0%} of the models are"
    )
    assert np.mean(shares) >= 0.5, shares
