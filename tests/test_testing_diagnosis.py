"""diagnose: names every convention that shows; no name on what is right or garbage."""

import collections

import ml_dtypes
import numpy as np
import pytest
from fresh import FRESH, normal
from seeds import draws, run_seed

from npllm import testing
from npllm.errors import NpllmValueError
from npllm.testing import diagnose
from npllm.testing.forms import NotApplicableError, Work, evaluate, prepare
from npllm.testing.forms.rounding import emulations
from npllm.testing.forms.table import OPS
from npllm.testing.planted import run
from npllm.testing.probes import PROBES, settling_probe
from npllm.testing.registry import alternatives

U = 2.0**-24


def kernel(op, raw, choices=()):
    """What a float32 kernel with some options returns."""
    inputs = prepare(op, raw)
    y = evaluate(op, inputs, dict(choices), Work(dtype=np.float32)).y
    return y.astype(np.float32).reshape(OPS[op].shape(inputs))


class Truth:
    """Which sets of options an input tells apart, by float64 answers and both budgets."""

    def __init__(self, op, raw):
        self.op, self.inputs = op, prepare(op, raw)

    def answer(self, choices):
        found = evaluate(self.op, self.inputs, dict(choices))
        size = np.where(np.isfinite(found.y), np.abs(found.y), 0)
        return found.y, found.slack + U * size

    def runs(self, choices):
        try:
            self.answer(choices)
        except NotApplicableError:
            return False
        return True

    def apart(self, a, b):
        (y, budget), (z, other) = self.answer(a), self.answer(b)
        both_finite = np.isfinite(y) & np.isfinite(z)
        odd = ~both_finite & ~((np.isnan(y) & np.isnan(z)) | (y == z))
        with np.errstate(invalid="ignore"):
            return bool((both_finite & (np.abs(y - z) > budget + other)).any() or odd.any())


def sets_of(names):
    """The sets of options that the names of a diagnosis stand for."""
    if len(names) > 1:
        return [frozenset(names)]
    return [frozenset(part.split(" & ")) for name in names for part in name.split(" or ")]


def choices_of(names):
    return tuple(tuple(name.split(" ", 1)) for name in sorted(names))


def check_named(op, raw, choices):
    """Assert that a diagnosis is what float64 allows; True where it is exactly the options."""
    truth, wanted = Truth(op, raw), frozenset(" ".join(choice) for choice in choices)
    found = diagnose(op, raw, kernel(op, raw, choices))
    if found.status == "right":
        assert not truth.apart((), choices), f"{op} {wanted}: {found}"
        assert len(choices) > 1 or any(
            "right" in group and wanted <= set(group) for group in found.undecided
        )
        return False
    named = sets_of(found.names)
    assert named, f"{op} {wanted} explained by nothing\n{found}"
    for other in named:
        assert other == wanted or not truth.apart(choices_of(other), choices), (
            f"{op} {wanted} called {set(other)}\n{found}"
        )
    assert wanted in named or all(len(other) < len(wanted) for other in named), (
        f"{op} {wanted} not among {named}"
    )
    assert found.runner_up is None or found.runner_up[1] > 1
    return named == [wanted]


ALGEBRAIC = [(op, choice) for op in FRESH for choice in alternatives(op)]


@pytest.mark.parametrize(
    ("op", "choice"),
    ALGEBRAIC,
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_each_option_alone_is_named_on_fresh_inputs(op, choice):
    rng = np.random.default_rng(run_seed())
    exact = n_run = 0
    for _ in range(60):
        raw = FRESH[op](rng)
        if Truth(op, raw).runs((choice,)):
            n_run += 1
            exact += check_named(op, raw, (choice,))
        if n_run >= draws(1, 2) and (exact or choice in NEVER_ALONE):
            return
    raise AssertionError(f"named alone in {exact} of {n_run} inputs that run this option")


NEVER_ALONE = {
    ("C3", "always long"),
    ("C3", "always short"),
    ("C3", "by cache offset"),
    ("C11", "mean of V"),
    ("C12", "finfo.min"),
    ("C12", "-1e9"),
    ("C15", "top-p before top-k"),
    ("C17", "filters see the whole"),
    ("C23", "zero tail to 32"),
    ("C23", "zero tail to 16"),
}
"""Options that agree with another on every input of these shapes; they are named as a class."""


def random_pairs(count):
    rng = np.random.default_rng(run_seed())
    ops = ["attention", "attention_lse", "rope", "rms_norm", "qkv_projection", "sampler"]
    n_exact = n_run = 0
    while n_run < count:
        op = ops[n_run % 3 if rng.random() < 0.7 else rng.integers(len(ops))]
        options = alternatives(op)
        a, b = sorted(rng.choice(len(options), 2, replace=False))
        raw, pair = FRESH[op](rng), (options[a], options[b])
        if pair[0][0] != pair[1][0] and Truth(op, raw).runs(pair):
            n_run += 1
            n_exact += check_named(op, raw, pair)
    print(f"{n_exact} of {count} pairs named exactly, others as a class that float64 cannot split")
    assert n_exact > count / 3 - 5  # a few pairs may all be of the kind that no input tells apart


def test_random_pairs_are_named():
    random_pairs(draws(7, 15))


@pytest.mark.slow
def test_200_random_pairs_are_named():
    random_pairs(200)


# ------------------------------------------------------------------ nothing is named


def in_dtype(raw, dtype):
    """Inputs as a kernel of a 16-bit dtype gets them."""
    return {
        name: x.astype(dtype)
        if getattr(x, "dtype", None) == np.float32 and name != "factors"
        else x
        for name, x in raw.items()
    }


def correct_outputs(count):
    rng = np.random.default_rng(run_seed())
    statuses = collections.Counter()
    for n in range(count):
        op, dtype = (
            list(FRESH)[n % len(FRESH)],
            [np.float32, ml_dtypes.bfloat16, np.float16][n // len(FRESH) % 3],
        )
        raw = in_dtype(FRESH[op](rng), dtype)
        found = diagnose(op, raw, kernel(op, raw).astype(dtype))
        assert not found.names, f"{op} {np.dtype(dtype)}: {found}"
        statuses[found.status] += 1
    print(dict(statuses))
    assert statuses["wrong"] == 0 and statuses["right"] > 0.95 * count, statuses


def garbage(kind, y, rng):
    return {
        "zeros": lambda: np.zeros_like(y),
        "NaN": lambda: np.full_like(y, np.nan),
        "random": lambda: normal(rng, *y.shape),
        "shuffled": lambda: rng.permuted(y, axis=-1),
        "half": lambda: y / 2,
        "last row": lambda: np.concatenate([np.zeros_like(y[:-1]), y[-1:]]),
        "infinity": lambda: np.full_like(y, np.inf),
    }[kind]()


def garbage_outputs(count):
    rng = np.random.default_rng(run_seed())
    kinds = ["zeros", "NaN", "random", "shuffled", "half", "last row", "infinity"]
    for n in range(count):
        op, kind = list(FRESH)[n % len(FRESH)], kinds[n % len(kinds)]
        raw = FRESH[op](rng)
        y = kernel(op, raw)
        bad = garbage(kind, y, rng)
        if np.array_equal(bad, y) or (op == "sampler" and kind == "shuffled"):
            continue
        found = diagnose(op, raw, bad)
        assert found.status == "wrong" and not found.names, f"{op}, {kind}: {found}"
        assert found.where


def test_correct_outputs_get_no_name():
    correct_outputs(draws(20, 60))


def test_garbage_gets_no_name():
    garbage_outputs(draws(20, 70))


@pytest.mark.slow
def test_1000_correct_outputs_get_no_name():
    correct_outputs(1000)


@pytest.mark.slow
def test_1000_garbage_outputs_get_no_name():
    garbage_outputs(1000)


def test_a_bug_that_is_in_no_list_is_described_by_where_it_lives():
    raw = PROBES["attention-cached"].make()
    y = run("attention", raw)
    y[:, 1] *= 1.01
    found = diagnose("attention", raw, y)
    assert found.status == "wrong" and not found.names
    assert "n_head 1" in found.where and "none of the list" in str(found)
    z = run("attention", raw)
    z[..., 12:] = 0
    assert "d_value 12 ... 15" in diagnose("attention", raw, z).where


def test_what_cancels_is_not_decidable():
    x = np.array([[1e6, -1e6, 1e-3]], dtype=np.float32)
    raw = {"x": x, "weight": np.ones((4, 3), dtype=np.float32)}
    found = diagnose("linear", raw, np.full((1, 4), 2e-3, dtype=np.float32))
    assert found.status == "not decidable" and not found.names


def test_a_log_sum_exp_that_cancels_is_not_decidable():
    q = np.array([[[1e7, -1e7]]], dtype=np.float32)
    k = v = np.ones((1, 3, 2), dtype=np.float32)
    raw = {"q": q, "k": k, "v": v, "causal": False}
    found = diagnose("attention_lse", raw, np.array([[1.6]], dtype=np.float32))
    assert found.status == "not decidable" and not found.names
    found = diagnose("attention_lse", raw, np.array([[100.0]], dtype=np.float32))
    assert found.status == "wrong" and not found.names, (
        "no order of summation gives that, and no name explains it"
    )


def test_an_output_just_inside_the_bound_is_right_and_one_outside_is_wrong():
    raw = FRESH["attention_lse"](np.random.default_rng(run_seed()))
    inputs = prepare("attention_lse", raw)
    answer = evaluate("attention_lse", inputs)
    inside, outside = (
        np.where(np.isfinite(answer.y), answer.y + share * answer.slack, answer.y).astype(
            np.float32
        )
        for share in (0.9, 1.5)
    )
    assert diagnose("attention_lse", raw, inside).status == "right"
    found = diagnose("attention_lse", raw, outside)
    assert found.status == "wrong" and not found.names


# ------------------------------------------------------------------ what an input cannot decide


def test_the_input_that_cannot_decide_says_so_and_names_the_probe_that_does():
    rng = np.random.default_rng(run_seed())
    raw = {"q": normal(rng, 1, 3, 6, 8), "k": normal(rng, 1, 3, 6, 8), "v": normal(rng, 1, 3, 6, 8)}
    found = diagnose("attention", raw, kernel("attention", raw))
    group = next(group for group in found.undecided if "right" in group)
    assert found.status == "right" and {"C8 tile", "C9 top-left", "C10 ignored", "C11 NaN"} <= set(
        group
    )
    probe = PROBES[found.probe]
    assert probe.op == "attention"
    assert settling_probe("attention", found.undecided) == found.probe
    told = [
        name
        for name in group[1:]
        if diagnose(
            "attention", probe.make(), kernel("attention", probe.make(), choices_of([name]))
        ).status
        == "wrong"
    ]
    assert len(told) > len(group) / 2


def test_the_input_that_decides_everything_needs_no_probe():
    raw = PROBES["swiglu-moderate"].make()
    found = diagnose("swiglu", raw, kernel("swiglu", raw))
    assert (found.status, found.undecided, found.probe) == ("right", [], None)


def test_the_runner_up_is_told_with_its_distance():
    raw = PROBES["attention-padded"].make()
    found = diagnose("attention", raw, kernel("attention", raw, [("C10", "w + 1 keys")]))
    name, distance = found.runner_up
    assert found.names == ["C10 w + 1 keys"] and name != "C10 w + 1 keys" and distance > 100
    assert name in str(found) and found.facts()["runner_up"] == {"name": name, "distance": distance}


def test_a_large_input_is_searched_on_some_rows_and_confirmed_on_all():
    rng = np.random.default_rng(run_seed())
    raw = {
        "q": normal(rng, 1, 8, 120, 16),
        "k": normal(rng, 1, 4, 400, 16),
        "v": normal(rng, 1, 4, 400, 16),
        "window": 50,
    }
    for choice in (("C9", "top-left"), ("C8", "tile"))[: draws(1, 2)]:
        y = kernel("attention", raw, [choice])
        assert diagnose("attention", raw, y).names == [" ".join(choice)]
        y[0, 3, 61, 4] += 0.01
        found = diagnose("attention", raw, y)
        assert found.status == "wrong" and not found.names


def test_arrays_without_a_batch_axis_and_with_two_are_taken():
    raw = PROBES["attention-cached"].make()
    for shaped in (lambda x: x[0], lambda x: x[:, None]):
        other = {name: shaped(x) if getattr(x, "ndim", 0) > 3 else x for name, x in raw.items()}
        assert diagnose(
            "attention", other, kernel("attention", other, [("C9", "one key late")])
        ).names == ["C9 one key late"]


# ------------------------------------------------------------------ rounding, support, text


ROUNDINGS = [
    ("rms-norm-bfloat16", "C13", "cast after weight"),
    ("attention-bfloat16", "C14", "softmax in the model dtype"),
    ("attention-bfloat16", "C14", "scale on q"),
    ("linear-bfloat16", "C30", "storage dtype"),
    ("rms-norm-bfloat16", "C30", "storage dtype"),
    ("rope-bits", "C2", "float64"),
]


@pytest.mark.parametrize(("probe", "name", "option"), ROUNDINGS)
def test_a_rounding_is_named_by_its_bits_and_ours_is_not(probe, name, option):
    probe = PROBES[probe]
    rng = np.random.default_rng(run_seed())
    raw = probe.make()
    raw = {
        key: rng.permuted(x, axis=-1) if key in ("x", "q", "k", "v") else x
        for key, x in raw.items()
    }
    inputs, dtype = (
        prepare(probe.op, raw),
        ml_dtypes.bfloat16 if probe.dtype == "bfloat16" else np.float32,
    )
    for style in range(len(emulations(name, option, probe.op, inputs, dtype))):
        y = (
            emulations(name, option, probe.op, inputs, dtype)[style]
            .reshape(OPS[probe.op].shape(inputs))
            .astype(dtype)
        )
        found = diagnose(probe.op, raw, y)
        assert found.rounding.get(name) == option, (style, str(found))
        assert found.status == "right" or found.names in ([], [f"C30 {option}"]), str(found)
    ours = testing.conventions[name].ours
    y = (
        emulations(name, ours, probe.op, inputs, dtype)[0]
        .reshape(OPS[probe.op].shape(inputs))
        .astype(dtype)
    )
    found = diagnose(probe.op, raw, y)
    assert found.status == "right" and name not in found.rounding, str(found)


def test_narrow_sums_of_a_float32_output_are_named():
    for op, probe in (("linear", "linear-bfloat16"), ("rms_norm", "rms-norm-bfloat16")):
        raw = PROBES[probe].make()
        for kind in ("bfloat16", "float16"):
            y = run(op, raw, **{op: testing.bugs[f"{op}: C30 {kind} accumulator"].fn})
            found = diagnose(op, raw, y)
            assert (found.status, found.names) == ("wrong", [f"C30 {kind} accumulator"]), str(found)


def test_a_sampler_that_may_draw_another_token_is_wrong_however_small_its_probability():
    raw = PROBES["sampler-boundaries"].make()
    y = kernel("sampler", raw)
    assert diagnose("sampler", raw, y).status == "right"
    y[0, int(np.argmin(y[0]))] = 1e-30
    assert diagnose("sampler", raw, y).status == "wrong"


def test_a_support_that_rounding_decides_is_not_held_against_a_sampler():
    logits = np.log(np.array([[0.5 + 1e-9, 0.3, 0.2]])).astype(np.float32)
    raw = {"logits": logits, "top_p": 0.5 + 3e-8}
    one, two = np.array([[1.0, 0, 0]], np.float32), np.array([[0.625, 0.375, 0]], np.float32)
    assert "wrong" not in (
        diagnose("sampler", raw, one).status,
        diagnose("sampler", raw, two).status,
    )


def test_the_text_of_a_stream_is_compared_as_strings():
    raw = PROBES["detokenize-stream"].make()
    whole = testing.conventions["C20"].run("detokenize", raw, "whole-prefix difference")
    assert "".join(whole) == "Hello world \U0001f642!" and "\ufffd" not in "".join(whole)
    assert diagnose("detokenize", raw, whole).status == "right"
    assert diagnose("detokenize", raw, "".join(whole)).status == "right"
    for option in ("token by token", "incomplete shown"):
        found = diagnose(
            "detokenize", raw, testing.conventions["C20"].run("detokenize", raw, option)
        )
        assert (found.status, found.names) == ("wrong", [f"C20 {option}"])
    found = diagnose("detokenize", raw, "Hallo")
    assert (found.status, found.names, found.where) == (
        "wrong",
        [],
        "text differs from character 1",
    )
    plain = {"prefixes": ["a", "ab"], "tokens": ["a", "b"]}
    assert diagnose("detokenize", plain, "ab").undecided == [
        ["right", "C20 token by token", "C20 incomplete shown"]
    ]


def test_q_k_v_come_as_a_tuple_a_dict_or_side_by_side():
    raw = PROBES["qkv-grouped"].make()
    whole = kernel("qkv_projection", raw, [("C22", "k and v swapped")])
    parts = whole[:, :4], whole[:, 4:6], whole[:, 6:]
    for output in (whole, parts, dict(zip("qkv", parts, strict=True))):
        assert diagnose("qkv_projection", raw, output).names == ["C22 k and v swapped"]


def test_what_cannot_be_diagnosed_is_an_error_that_says_so():
    raw = PROBES["swiglu-moderate"].make()
    with pytest.raises(
        NpllmValueError, match=r"output of swiglu must be \[6, 16\] for these inputs, got \[16, 6\]"
    ):
        diagnose("swiglu", raw, np.zeros((16, 6), np.float32))
    with pytest.raises(NpllmValueError, match="op must be one of attention"):
        diagnose("swish", raw, np.zeros((6, 16), np.float32))
    with pytest.raises(NpllmValueError, match="inputs of detokenize must be prefixes, tokens"):
        diagnose("detokenize", {"tokens": []}, "")


def test_arrays_of_torch_are_taken_bfloat16_by_its_bits():
    torch = pytest.importorskip("torch")
    raw = PROBES["rms-norm-bfloat16"].make()
    narrow = {
        key: torch.from_numpy(x).to(torch.bfloat16) if key != "eps" else x for key, x in raw.items()
    }
    wide, weight = narrow["x"].float(), narrow["weight"]
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + raw["eps"])
    ours, after = weight * normal.to(torch.bfloat16), (weight.float() * normal).to(torch.bfloat16)
    assert diagnose("rms_norm", narrow, ours).rounding == {}
    found = diagnose("rms_norm", narrow, after)
    assert (found.status, found.rounding) == ("right", {"C13": "cast after weight"}), str(found)
    assert diagnose("rms_norm", narrow, (after.float() * 2).to(torch.bfloat16)).status == "wrong"
