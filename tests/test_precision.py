"""The precision report: distances beside oracles, the overflow that is planted, the share of each
rounding point.
"""

import json
import math

import numpy as np
import optional
import pytest
import tiny
from close import close
from hypothesis import given
from hypothesis import strategies as st

import npllm
from npllm import ops
from npllm.errors import NpllmError, NpllmValueError
from npllm.forward_pass import Tokens
from npllm.ops.emulate import POINTS
from npllm.quantized.block_formats import FORMATS
from npllm.quantized.block_packing import quantize_blocks
from npllm.testing.golden_bundles import BUNDLES
from npllm.tracing.precision.arithmetics import EMULATED, PARAMETERS
from npllm.tracing.precision.distances import (
    LogitDistance,
    centred_error,
    kl_divergence,
    relative_error,
)
from npllm.tracing.precision.extremes import Extreme, first_overflow
from npllm.tracing.precision.measuring import precision
from npllm.tracing.precision.passes import Arithmetic, convert, logits_of, residual_streams

BFLOAT16 = tiny.DTYPES["BF16"]
FLOAT64 = Arithmetic("float64", ops.reference, np.float64)
IDS = tiny.random_ids(1, 12)
seeds = st.integers(0, 2**16)


def report(model, ids=IDS, **options):
    return precision(model, ids, **{"shares": False} | options)


# ------------------------------------------------------------------------------------ distances


def kl_oracle(p_logits, q_logits):
    """Sum over the vocabulary of p log(p / q), with exact sums."""
    z_p, z_q = (math.fsum(math.exp(y) for y in row) for row in (p_logits, q_logits))
    p = [math.exp(y) / z_p for y in p_logits]
    return math.fsum(
        share * (a - math.log(z_p) - b + math.log(z_q))
        for share, a, b in zip(p, p_logits, q_logits, strict=True)
    )


@given(seeds, st.floats(0.1, 20), st.floats(1e-6, 3))
def test_kl_divergence_is_that_of_exact_sums(seed, size, error):
    rng = np.random.default_rng(seed)
    gold = size * rng.standard_normal((3, 17))
    y = (gold + error * rng.standard_normal(gold.shape)).astype(np.float32)
    want = [kl_oracle(*rows) for rows in zip(gold.tolist(), y.tolist(), strict=True)]
    np.testing.assert_allclose(kl_divergence(gold, y), want, rtol=1e-9, atol=1e-14)


@given(seeds, st.floats(-50, 50))
def test_what_all_logits_have_in_common_is_no_error(seed, shift):
    gold = np.random.default_rng(seed).standard_normal((2, 9))
    np.testing.assert_allclose(centred_error(gold + shift, gold), 0, atol=1e-24)
    np.testing.assert_allclose(kl_divergence(gold, gold + shift), 0, atol=1e-13)


def test_relative_error_counts_each_row_by_its_own_length():
    gold = np.array([[3.0, 4.0], [3000.0, 4000.0], [0.0, 0.0]])
    x = gold + np.array([[0.5, 0.0], [0.0, 500.0], [0.0, 0.0]])
    assert relative_error(x, gold) == pytest.approx(math.sqrt((0.01 + 0.01 + 0) / 3))
    assert relative_error(gold, gold) == 0
    assert math.isnan(relative_error(gold * np.nan, gold))


def test_a_flip_says_what_float64_thinks_of_both_tokens():
    gold = np.array([[1.0, 3.0, 2.75], [5.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    y = np.array([[1.0, 2.9, 3.0], [5.0, 1.0, 0.0], [np.nan, 1.0, 2.0]], np.float32)
    distance = LogitDistance(is_full=True)
    distance.see(y[:1], gold[:1])
    distance.see(y[1:], gold[1:])
    assert distance.flips == [(0, 1, 2, 0.25)]
    assert distance.n_same == 1


# ------------------------------------------------------------------------------------ the types


def test_float64_against_itself_is_zero():
    row = report(tiny.model(), types=["float64"]).row("float64")
    assert row.depth == [0.0] * 4
    assert (row.logits, row.kl_mean, row.kl_max, row.top1, row.flips) == (0, 0, 0, 1, [])


def test_a_model_in_float64_differs_by_the_order_of_its_sums_only():
    row = report(tiny.model(dtype=np.float64), types=["own"]).row("own")
    assert row.logits < 1e-13
    assert max(row.depth) < 1e-14


@pytest.mark.parametrize("dtype", EMULATED)
def test_without_any_rounding_the_error_is_that_of_float32(dtype):
    model = tiny.model(dtype=BFLOAT16, ops=ops.reference)
    unrounded = model.on(ops.emulate(dtype, (), bitwise=False))
    want = report(model, types=["own"]).row("own")
    got = report(unrounded, types=["own"]).row("own")
    assert 0 < want.logits < 1e-5
    assert 0.3 < got.logits / want.logits < 3
    for ours, theirs in zip(got.depth[1:], want.depth[1:], strict=True):
        assert 0.3 < ours / theirs < 3


@given(seeds)
def test_the_error_shrinks_with_more_bits(seed):
    """8, 11 and 24 significant bits."""
    found = report(tiny.model(dtype=BFLOAT16, seed=seed), types=["bfloat16", "float16", "own"])
    coarse, middle, fine = found.rows
    for at in range(1, len(found.depths)):
        assert coarse.depth[at] > 2 * middle.depth[at] > 100 * fine.depth[at] > 0
    assert coarse.logits > 2 * middle.logits > 100 * fine.logits
    assert coarse.kl_mean > 4 * middle.kl_mean > 100 * fine.kl_mean


@pytest.mark.parametrize("dtype", EMULATED)
def test_a_16_bit_row_is_the_model_that_rounds_bit_by_bit(dtype):
    """The order of the sums changes some last bits, and so the error by a little."""
    model = tiny.model(dtype=tiny.DTYPES["BF16" if dtype == "bfloat16" else "F16"])
    row = report(model, types=[dtype]).row(dtype)
    exact = report(model.on(ops.emulate(dtype)), types=["own"]).row("own")
    assert 0.7 < row.logits / exact.logits < 1.4
    assert 0.7 < row.depth[-1] / exact.depth[-1] < 1.4


@pytest.mark.parametrize("dtype", EMULATED)
def test_fast_sums_differ_from_exact_bits_by_a_step_at_most(dtype):
    step = {"bfloat16": 2**-7, "float16": 2**-10}[dtype]
    stored = np.dtype(BFLOAT16 if dtype == "bfloat16" else np.float16)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 96)).astype(stored).astype(np.float32)
    w = rng.standard_normal((50, 96)).astype(stored)
    exact, fast = (ops.emulate(dtype, bitwise=bits).linear(x, w) for bits in (True, False))
    differs = np.abs(fast - exact) > step * np.abs(exact)
    assert not differs.any()
    assert np.mean(fast == exact) > 0.99


def test_int8_is_what_the_quantized_checkpoint_gives(tmp_path):
    folder = tiny.write_folder(tmp_path)
    row = report(npllm.load(folder), types=["int8"]).row("int8")
    gold = npllm.load(folder, dtype="float64", ops="reference")(IDS)[0]
    y = npllm.load(folder, dtype="int8")(IDS)[0]
    want = [kl_oracle(*rows) for rows in zip(gold.tolist(), y.tolist(), strict=True)]
    assert row.kl_mean == pytest.approx(np.mean(want), rel=1e-4)
    assert row.kl_max == pytest.approx(max(want), rel=1e-4)
    assert row.logits == pytest.approx(float(np.sqrt(np.mean(np.var(y - gold, axis=-1)))), rel=1e-4)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (n % 3 > 0)) for n, name in enumerate(FORMATS)],
)
def test_a_block_format_is_measured_as_it_is_quantized(name):
    """Beside the model whose matrices are replaced by hand; widths of 32 take the fallback."""
    model = tiny.model(intermediate_size=64)
    row = report(model, types=[name]).row(name)
    gold = model.on(ops.reference)
    held = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}.get(name, name)

    def rounded(x):
        return quantize_blocks(x, held).widened() if x is not None and x.ndim == 2 else x

    layers = tuple(type(layer)(*map(rounded, layer)) for layer in model.params.layers)
    embed, head = rounded(model.params.embed_tokens), rounded(model.params.lm_head)
    params = model.params._replace(embed_tokens=embed, layers=layers, lm_head=head)
    y = npllm.Model(model.config, params, ops=ops.reference)(IDS)[0]
    want = [kl_oracle(*rows) for rows in zip(gold(IDS)[0].tolist(), y.tolist(), strict=True)]
    assert row.kl_mean == pytest.approx(np.mean(want), rel=1e-3)


def test_a_width_that_no_block_divides_is_refused():
    with pytest.raises(NpllmValueError, match="multiple of the 32 entries of a Q4_0 block, got 40"):
        report(tiny.model(), types=["Q4_0"])


def test_the_reference_of_int8_weights_is_these_weights(tmp_path):
    """A model that was loaded in int8 is compared with float64 arithmetic on its own weights."""
    model = npllm.load(tiny.write_folder(tmp_path), dtype="int8")
    found = report(model, types=["own", "int8", "float64"])
    assert found.row("float64").logits == 0
    assert found.row("own").logits < 1e-5
    assert found.row("int8").logits == found.row("own").logits


def test_convert_rounds_once_and_keeps_what_is_not_there():
    w = np.random.default_rng(0).standard_normal((3, 70)).astype(np.float32)
    close(convert(w, "bfloat16"), w.astype(BFLOAT16).astype(np.float32), times=0)
    close(convert(w, "float16"), w.astype(np.float16).astype(np.float32), times=0)
    close(convert(w, "float64"), w.astype(np.float64), times=0)
    assert convert(None, "int8") is None
    assert convert(w, "stored") is w
    assert convert(w[0], "int8").dtype == np.float32


# ----------------------------------------------------------------------------------- the models

MODELS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "window": {"sliding_window": 4},
    "tied": {"tie_word_embeddings": True},
    "partial": {"partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_the_reference_is_the_model_in_float64(changes):
    """Layer by layer as in one call; the last stream is that after the norm."""
    model, valid = tiny.model(dtype=np.float64, **changes), np.ones(IDS.shape, bool)
    seen = {}
    want = model.on("reference").model(IDS, tap=lambda name, x: seen.setdefault(name, x))
    tokens = Tokens(IDS, valid, np.arange(IDS.shape[1]))
    first, second, third, last = (
        states[0] for states in residual_streams(model, tokens, [FLOAT64])
    )
    close(first, seen["model.embed_tokens"], times=0)
    close(second, seen["model.layers.0"])
    close(third, seen["model.layers.1"])
    close(last, want)
    logits = logits_of(FLOAT64, last[0], model.params.lm_head)
    close(logits, model.on("reference")(IDS)[0])


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_the_rows_of_every_kind_of_model(changes):
    found = report(tiny.model(**changes), types=["own", "bfloat16"])
    assert found.row("own").logits < 1e-5
    assert 1e-3 < found.row("bfloat16").depth[-1] < 0.1


@pytest.mark.parametrize("name", [name for name in BUNDLES if name != "bert"])
def test_every_golden_bundle_can_be_measured(name):
    """Positions, factors and windows as the model has them: float32 is near, int8 is not."""
    bundle = npllm.testing.golden(name)
    found = report(npllm.load(bundle.folder), bundle.values["input_ids"])
    assert found.row("own").logits < 1e-5 < 1e-3 < found.row("int8").logits
    assert found.overflow is None


def test_left_padding_is_not_measured():
    """A padded batch is the mean of its rows."""
    model = tiny.model()
    rows = [tiny.random_ids(1, n, seed=n) for n in (12, 5)]
    ids, valid = np.zeros((2, 12), np.int64), np.zeros((2, 12), np.int64)
    ids[0], ids[1, 7:] = rows[0][0], rows[1][0]
    valid[0], valid[1, 7:] = 1, 1
    both = report(model, ids, attention_mask=valid, types=["int8"]).row("int8")
    each = [report(model, row, types=["int8"]).row("int8") for row in rows]
    assert both.kl_mean == pytest.approx(
        (12 * each[0].kl_mean + 5 * each[1].kl_mean) / 17, rel=1e-4
    )
    assert both.kl_max == pytest.approx(max(row.kl_max for row in each), rel=1e-4)
    squares = [n * np.square(row.depth) for n, row in zip((12, 5), each, strict=True)]
    np.testing.assert_allclose(np.square(both.depth), sum(squares) / 17, rtol=1e-4)
    assert {(flip.row, flip.column >= 7) for flip in both.flips if flip.row} <= {(1, True)}


def test_what_is_held_does_not_grow_with_the_number_of_layers(traced_peak):
    def peak(n_layer):
        model = tiny.model(num_hidden_layers=n_layer, hidden_size=64, intermediate_size=256)
        layer = sum(x.size for x in model.params.layers[0] if x is not None)
        return traced_peak(lambda: report(model, IDS[:, :3])), layer

    few, size = peak(2)
    many, _ = peak(12)
    assert many - few < 2 * size, f"float64 copies of ten layers are {80 * size} bytes"


# -------------------------------------------------------------------------------- float16's end


def scaled(model, layer, **factors):
    """The model with some weights of one layer multiplied."""
    layers = [*model.params.layers]
    for name, factor in factors.items():
        new = getattr(layers[layer], name) * np.float32(factor)
        layers[layer] = layers[layer]._replace(**{name: new})
    return npllm.Model(model.config, model.params._replace(layers=tuple(layers)))


def test_a_planted_large_activation_is_the_overflow_that_is_named():
    model = scaled(tiny.model(), 1, gate_up_proj=4, down_proj=1e4)
    found = report(model, types=["own", "float16"])
    seen = {}
    model(IDS, tap=lambda name, x: seen.setdefault(name, x))
    largest = float(np.abs(seen["model.layers.1.mlp.down_proj"]).max())
    assert largest > 65520
    assert found.overflow.name == "model.layers.1.mlp.down_proj"
    assert found.overflow.headroom < 0
    assert not found.row("float16").is_finite
    assert "not finite" in str(found)
    assert f"overflows first at {found.overflow.name}" in str(found)
    json.dumps(found.facts(), allow_nan=False)


@pytest.mark.parametrize(
    ("field", "name"),
    [("down_proj", "mlp.down_proj.weight"), ("qkv_proj", "self_attn.qkv_proj.weight")],
)
def test_a_weight_beyond_float16_is_named(field, name):
    found = report(scaled(tiny.model(), 1, **{field: 1e6}), types=["own"])
    assert found.overflow.name == f"model.layers.1.{name}"


def test_the_largest_weights_are_listed():
    model = tiny.model()
    found = {extreme.name: extreme.largest for extreme in report(model, types=["own"]).largest}
    assert found["lm_head.weight"] == np.abs(model.params.lm_head).max()
    assert found["model.norm.weight"] == np.abs(model.params.norm).max()
    largest = [np.abs(layer.o_proj).max() for layer in model.params.layers]
    name = f"model.layers.{int(np.argmax(largest))}.self_attn.o_proj.weight"
    assert found[name] == max(largest)


@pytest.mark.parametrize("name", ["scores", "swiglu"])
def test_the_operation_is_named_whatever_it_is(name):
    """Large products of small weights."""
    factors = {"scores": {"qkv_proj": 300.0}, "swiglu": {"gate_up_proj": 300.0}}[name]
    found = report(scaled(tiny.model(), 0, **factors), types=["float16"])
    assert found.overflow.op.endswith(name)
    assert found.overflow.name.startswith("model.layers.0.")
    assert not found.row("float16").is_finite


def test_the_largest_values_are_those_of_the_model():
    """Scores too, of hidden pairs as well: q k^T by a loop."""
    model, seen = tiny.model(dtype=np.float64), {}
    model(IDS, tap=lambda name, x: seen.setdefault(name, x))
    found = {extreme.name: extreme.largest for extreme in report(model, types=["own"]).largest}
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        assert found[name] == pytest.approx(np.abs(seen[name]).max(), rel=1e-12)
    q, k = ([seen[f"model.layers.{layer}.self_attn.{name}"] for layer in range(2)] for name in "qk")
    scores = [
        np.abs(q[layer][0, head] @ k[layer][0, head // 2].T).max()
        for layer in range(2)
        for head in range(4)
    ]
    (name,) = [name for name in found if name.endswith("self_attn.scores")]
    assert found[name] == pytest.approx(max(scores), rel=1e-12)
    assert scores.index(max(scores)) // 4 == int(name.split(".")[2])


@pytest.mark.parametrize("value", [65520.0, math.inf, math.nan])
def test_the_first_overflow_is_the_first_in_the_order_of_execution(value):
    found = [Extreme("a", 65519.9), Extreme("b", value), Extreme("c", 1e9)]
    assert first_overflow(found) is found[1]
    assert first_overflow(found[:1]) is None


def test_headroom_is_the_number_of_doublings_before_infinity():
    with np.errstate(over="ignore"):
        assert np.isfinite(np.float16(65519.99)) and np.isinf(np.float16(65520.0))
    assert Extreme("a", 65520.0 / 4).headroom == 2
    assert Extreme("a", 65520.0).headroom == 0
    assert Extreme("a", 0.0).headroom == math.inf


# --------------------------------------------------------------------------------------- shares


def test_the_shares_name_every_point_and_add_up():
    row = report(tiny.model(), shares=True, types=["bfloat16"]).row("bfloat16")
    assert {share.point for share in row.shares} == {*POINTS, PARAMETERS}
    assert all(share.without <= 1 and share.alone >= 0 for share in row.shares)
    alone = [share.alone for share in row.shares]
    assert alone == sorted(alone, reverse=True)
    assert 0.5 < sum(alone) < 2


def test_a_share_is_that_of_the_emulation_with_and_without_the_point():
    model = tiny.model(dtype=BFLOAT16)
    row = report(model, shares=True, types=["bfloat16"]).row("bfloat16")

    def error(points):
        rounded = model.on(ops.emulate("bfloat16", points, bitwise=False))
        return report(rounded, types=["own"]).row("own").logits

    whole = error(POINTS)
    for share in row.shares:
        if share.point in ("residual", "linear", "weights"):
            without = error([point for point in POINTS if point != share.point])
            assert share.without == pytest.approx(1 - (without / whole) ** 2, abs=1e-6)
            assert share.alone == pytest.approx((error([share.point]) / whole) ** 2, abs=1e-6)
        if share.point == PARAMETERS:
            assert share.without == 0
            assert share.alone < 1e-6


def test_rounding_the_weights_is_a_share_where_they_are_stored_wider():
    row = report(tiny.model(), shares=True, types=["bfloat16"]).row("bfloat16")
    (share,) = [share for share in row.shares if share.point == PARAMETERS]
    assert share.alone > 0.05


def test_an_overflow_has_no_shares():
    found = report(scaled(tiny.model(), 0, down_proj=1e6), shares=True, types=["float16"])
    assert found.row("float16").shares == []


# --------------------------------------------------------------------------- errors and command


@pytest.mark.parametrize(
    ("ids", "options", "says"),
    [
        (IDS, {"types": ["int3"]}, "types must be some of own, float64"),
        (IDS, {"types": []}, "types must be some of"),
        (IDS, {"types": "own"}, "types must be some of"),
        (IDS + 1000, {}, "vocab_size"),
        (np.zeros((1, 0), np.int64), {}, "input_ids"),
        ("text", {}, "tokenizer"),
        (3, {}, "tokenizer|prompt must be"),
        (IDS, {"attention_mask": [[1] * 11 + [0]]}, "padded on the left"),
        (np.zeros((1, 65), np.int64), {}, "context length"),
    ],
)
def test_bad_input_is_refused(ids, options, says):
    with pytest.raises(NpllmError, match=says):
        report(tiny.model(), ids, **options)


def test_what_is_no_language_model_is_refused():
    with pytest.raises(NpllmError, match="takes a causal language model"):
        precision("smollm2", IDS)


def test_weights_that_hold_nan_are_refused():
    with pytest.raises(NpllmValueError, match="float64 logits"):
        report(scaled(tiny.model(), 0, o_proj=np.nan), types=["own"])


@pytest.fixture
def folder(tmp_path):
    tokenizer = tiny.byte_level()
    size = tokenizer.get_vocab_size()
    return tiny.write_folder(tmp_path / "tiny", tokenizer=tokenizer, vocab_size=size)


def test_the_command_prints_the_table_or_json(folder):
    wanted = ["precision", "-m", str(folder), "-p", "hello world", "--no-shares"]
    table = optional.invoke(wanted)
    assert table.exit_code == 0, table.output
    assert "int8 weights" in table.stdout and "No value overflows float16" in table.stdout
    found = json.loads(optional.invoke([*wanted, "--json", "--type", "own"]).stdout)
    assert [row["type"] for row in found["rows"]] == ["own"]
    assert found["overflow"] is None
    assert len(found["depths"]) == len(found["rows"][0]["depth"]) == 4


def test_the_picture_shows_depth_and_shares(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib (the extra plot)")
    from npllm.tracing.precision.plot import draw_precision

    for shares in (True, False):
        path = tmp_path / f"{shares}.png"
        draw_precision(path, report(tiny.model(), shares=shares))
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("folder")
def test_an_overflow_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib (the extra plot)")
    from npllm.tracing.precision.plot import draw_precision

    path = tmp_path / "picture.png"
    draw_precision(path, report(scaled(tiny.model(), 0, down_proj=1e6), shares=True))
    assert path.read_bytes().startswith(b"\x89PNG")
