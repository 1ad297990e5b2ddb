"""Laws: every planted bug breaks one within 200 examples, correct implementations none; what a
failure says, and that its line replays it.
"""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from seeds import draws, run_seed

import npllm
from npllm import ops, testing
from npllm.errors import NpllmValueError
from npllm.testing.laws import SUBJECTS, check, chi_square
from npllm.testing.laws.arrays import LAYOUTS, Guarded, laid_out
from npllm.testing.laws.trial import RETURNS
from npllm.testing.planted import run
from npllm.testing.planted.bug import right_qkv

SEED = run_seed()
BUGS = testing.bugs


def right(op):
    """The definition of an operation, as `check` calls it."""
    return {
        "rope": lambda **inputs: run("rope", inputs),
        "sampler": lambda **inputs: run("sampler", inputs),
        "qkv_projection": right_qkv,
        "lm_head": lambda hidden, weight, embedding: ops.linear(hidden, weight),  # noqa: ARG005
        "detokenize": lambda prefixes, tokens: [prefixes[-1]],  # noqa: ARG005
    }.get(op) or getattr(ops, op)


# ------------------------------------------------------------------ bugs and definitions


@pytest.mark.parametrize("name", BUGS)
def test_every_planted_bug_breaks_a_law_within_200_examples(name):
    bug = BUGS[name]
    with pytest.raises(testing.LawBroken) as caught:
        check(bug.op, bug.fn, max_examples=200, seed=SEED, shrink=False)
        pytest.fail(f"missed with seed={SEED}")
    assert caught.value.law != RETURNS, "it is found by what it returns"


@pytest.mark.slow
@pytest.mark.parametrize("n", range(20))
def test_every_planted_bug_breaks_a_law_for_20_seeds(n):
    missed = []
    seed = SEED + n
    for name, bug in BUGS.items():
        try:
            check(bug.op, bug.fn, max_examples=200, seed=seed, shrink=False)
            missed.append(name)
        except testing.LawBroken:
            pass
    assert missed == [], f"run {n}, seed={seed}"


@pytest.mark.parametrize("op", SUBJECTS)
def test_the_definitions_break_no_law(op):
    report = check(op, right(op), max_examples=draws(12, 30), seed=SEED)
    assert report.n_trial >= draws(12, 30), report
    assert report.n_undecided <= report.n_trial / 4, report
    assert report.used <= 1


@pytest.mark.slow
@pytest.mark.parametrize("op", SUBJECTS)
def test_the_definitions_break_no_law_in_2000_examples(op):
    report = check(op, right(op), max_examples=2000, seed=SEED)
    assert report.used <= 1, report


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", ["attention", "apply_rope", "rms_norm", "linear", "swiglu"])
def test_the_definitions_break_no_law_in_16_bits(op, dtype):
    report = check(op, right(op), max_examples=draws(10, 25), seed=SEED, dtype=dtype)
    assert 0.3 < report.used <= 1, report


# ------------------------------------------------------------------ what a failure says


def test_a_failure_says_law_case_budget_diagnosis_and_replays():
    bug = BUGS["attention: C8 tile"]

    def mine(q, k, v, *, mask, scale=None):
        return bug.fn(q, k, v, mask=mask, scale=scale)

    with pytest.raises(testing.LawBroken) as caught:
        testing.check_attention(mine, seed=3)
    broken = caught.value
    text = str(broken)
    assert broken.diagnosis.names == ["C8 tile"]
    for part in ("law  ", "found  ", "case  ", "budget  ", "convention  C8 tile", "seed=3"):
        assert part in text, text
    assert broken.case["n_batch"] * broken.case["n_seq"] == 1, "the case is shrunk"
    line = text.splitlines()[-1].removeprefix("replay      ")
    with pytest.raises(testing.LawBroken) as again:
        eval(line, {"npllm": npllm, "mine": mine})
    assert (again.value.law, again.value.used) == (broken.law, broken.used)
    testing.replay(ops.attention, "attention", broken.case)
    assert isinstance(broken, AssertionError)
    assert isinstance(broken, npllm.NpllmError)


def test_the_same_seed_finds_the_same_case():
    cases = set()
    for _ in range(2):
        with pytest.raises(testing.LawBroken) as caught:
            testing.check_rms_norm(BUGS["rms_norm: tail not summed"].fn, seed=11)
        cases.add(repr(caught.value.case))
    assert len(cases) == 1


def test_what_the_function_raises_is_the_cause():
    def mine(q, k, v, *, mask):  # noqa: ARG001
        raise KeyError("head")

    with pytest.raises(testing.LawBroken, match="it raised KeyError: 'head'") as caught:
        testing.check_attention(mine)
    assert isinstance(caught.value.__cause__, KeyError)


# ------------------------------------------------------------------ features


@pytest.mark.parametrize(
    ("feature", "name"),
    [
        ("gqa", "C8 tile"),
        ("window", "C10 w + 1 keys"),
        ("cache", "C9 top-left"),
        ("scale", "scale argument ignored"),
        ("empty rows", "C11 mean of V"),
        ("lse", "C24 base 2"),
    ],
)
def test_a_feature_that_is_off_is_not_tested(feature, name):
    fn = BUGS[f"attention: {name}"].fn
    every = set(SUBJECTS["attention"].features) - {"poison", "lse"} | {feature}
    with pytest.raises(testing.LawBroken):
        testing.check_attention(fn, every, seed=SEED, shrink=False)
    report = testing.check_attention(
        fn, every - {feature, "slots"}, max_examples=draws(10, 30), seed=SEED
    )
    assert feature in report.left_out


def test_only_what_the_signature_takes_is_asked_for():
    def mine(q, k, v, mask):
        return ops.attention(q, k, v, mask=mask)

    report = testing.check_attention(mine, max_examples=20)
    assert {"bias", "softcap", "scale", "slots", "lse", "poison"} == set(report.left_out)


def test_an_unknown_feature_or_operation_raises():
    with pytest.raises(NpllmValueError, match="features of attention must be of gqa, window"):
        testing.check_attention(ops.attention, {"gqa", "alibi"})
    with pytest.raises(NpllmValueError, match="op must be one of attention"):
        check("conv", ops.linear)
    with pytest.raises(NpllmValueError, match='kind must be "draws" or "probabilities"'):
        testing.check_sampler(ops.sample, kind="ids")


def test_poison_shows_nan_that_leaks_and_is_asked_for():
    on = {"cache", "padding", "poison"}
    with pytest.raises(testing.LawBroken, match="holds NaN"):
        testing.check_attention(ops.attention, on, shrink=False)

    def careful(q, k, v, *, mask):
        table = np.broadcast_to(
            ops.mask.to_bool(mask, q.shape[-2], k.shape[-2]), (*q.shape[:-1], k.shape[-2])
        )
        y = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
        for at in np.ndindex(q.shape[:-1]):
            seen, head = table[at], at[:-1]
            if not seen.any():
                y[at] = 0
                continue
            y[at] = ops.attention(q[at][None, None], k[head][seen][None], v[head][seen][None])
        return y

    testing.check_attention(careful, on, tiles=(4,), max_examples=15)


# ------------------------------------------------------------------ memory


def into(spoil):
    def mine(x, weight, eps, out):
        out[...] = ops.rms_norm(x, weight, eps)
        spoil(out)

    return mine


def beside(out):
    flat = np.lib.stride_tricks.as_strided(out, (out.size + 1,), (out.itemsize,))
    flat[-1] = 7


def unwritten(out):
    out.reshape(-1)[-1] = np.nan


@pytest.mark.parametrize(
    ("spoil", "law"),
    [
        (beside, "Nothing is written beside the output"),
        (unwritten, "Every entry of the output that was given as `out` is written"),
    ],
)
def test_memory_given_for_the_output_is_watched(spoil, law):
    testing.check_rms_norm(into(lambda out: None), max_examples=20)  # noqa: ARG005
    with pytest.raises(testing.LawBroken, match=law):
        testing.check_rms_norm(into(spoil), max_examples=20)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 5), (1, 1)])
def test_a_layout_changes_no_value(layout, shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    y = laid_out(x, layout)
    assert np.array_equal(x, y)
    assert y.flags.writeable
    assert y.flags.c_contiguous == (layout == "contiguous" or y.size == 1)


def test_contiguity_that_is_assumed_is_found():
    def mine(x, weight, eps):
        base = x if x.base is None else x.base
        return ops.rms_norm(base.reshape(-1)[: x.size].reshape(x.shape).copy(), weight, eps)

    with pytest.raises(testing.LawBroken) as caught:
        testing.check_rms_norm(mine, seed=SEED)
    assert caught.value.case["layout"] != "contiguous"


def test_a_guard_sees_both_sides():
    for at in (63, 64 + 6):
        guarded = Guarded((2, 3), "float32")
        guarded.out[...] = 0
        assert guarded.is_intact()
        guarded.buffer[at] = 0
        assert not guarded.is_intact()


# ------------------------------------------------------------------ the sampler


def drawn(logits, u, *, temperature=None, top_k=None, top_p=None, min_p=None):
    for name, value in (
        ("temperature", temperature),
        ("top_k", top_k),
        ("top_p", top_p),
        ("min_p", min_p),
    ):
        logits = logits if value is None else getattr(ops, name)(logits, value)
    return ops.sample(logits, u)


def test_a_sampler_that_draws_is_checked_by_support_and_chi_square():
    testing.check_sampler(drawn, max_examples=draws(8, 25))
    testing.check_sampler(ops.sample, max_examples=draws(4, 10))


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (lambda logits, u: drawn(logits, u**1.1), "with the probabilities"),
        (lambda logits, u, *, top_k=None: drawn(logits, u), "if and only if"),  # noqa: ARG005
        (lambda logits: drawn(logits, np.zeros(len(logits))), "with the probabilities"),
        (lambda logits, u: drawn(logits, u).astype(np.float32), "ids must be integers"),
    ],
)
def test_a_sampler_that_draws_wrongly_is_found(wrong, law):
    with pytest.raises(testing.LawBroken, match=law):
        testing.check_sampler(wrong, max_examples=60)


@pytest.mark.parametrize("n_free", [1, 2, 3, 7, 20])
def test_the_tail_is_that_of_chi_square(n_free):
    mpmath = pytest.importorskip("mpmath")
    for x in (0.1, 1.0, 5.0, 40.0, 120.0):
        exact = float(mpmath.gammainc(n_free / 2, x / 2, regularized=True))
        assert abs(chi_square.tail(x, n_free) / exact - 1) < 1e-12


def test_the_false_alarm_rate_is_what_it_says():
    """Of many correct samples, as many are rejected at 5 % as a binomial allows."""
    rng, p, n = np.random.default_rng(SEED), np.array([0.5, 0.25, 0.2, 0.05]), draws(1500, 4000)
    alarms = sum(chi_square.chi_square(rng.choice(4, 2000, p=p), p) < 0.05 for _ in range(n))
    assert abs(alarms - 0.05 * n) < 6 * (n * 0.05 * 0.95) ** 0.5, f"seed={SEED}"


def test_a_token_without_probability_and_a_lone_bin():
    p = np.array([1.0, 0.0])
    assert chi_square.chi_square(np.array([0, 1]), p) == 0
    assert chi_square.chi_square(np.zeros(50, np.int64), p) == 1


# ------------------------------------------------------------------ how little is needed


def test_checks_need_no_pytest_and_replays_no_hypothesis():
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "from npllm import ops, testing\n"
        "testing.check_swiglu(ops.swiglu, max_examples=3)\n"
        "sys.modules['hypothesis'] = None; sys.modules.pop('npllm.testing.strategies')\n"
        "case = {'n_row': 2, 'd_ff': 5, 'size': 'plain', 'layout': 'contiguous',"
        " 'dtype': 'float32', 'seed': 1}\n"
        "testing.replay(ops.swiglu, 'swiglu', case)\n"
        "try: testing.check_swiglu(ops.swiglu)\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'pip install -e ".[test]"' in done.stdout


@given(st.integers(0, 2**16))
def test_budgets_of_drawn_attention_stay_far_below_the_values(seed):
    from npllm.testing.laws.attention import draw_operands

    case = {"n_batch": 1, "n_head": 2, "n_kv_head": 1, "n_seq": 5, "n_ctx": 9, "d_head": 8}
    case |= {"size": "plain", "dtype": "float32", "seed": seed}
    q, k, v = draw_operands(case)
    bound = testing.budget("attention", {"q": q, "k": k, "v": v})
    y = testing.gold("attention", {"q": q, "k": k, "v": v})
    assert np.median(bound.statistical / np.abs(y)) < 1e-4
