"""`npllm check`, `npllm mutants` and the pytest plugin, on a small module of the user's."""

import json
import os
import subprocess
import sys

import optional
import pytest

pytest.importorskip("click")
from npllm import testing
from npllm.cli import mutants
from npllm.errors import NpllmValueError
from npllm.testing.mutation import LOG, MUTANT, command_of, under_test
from npllm.testing.naming import op_in

KERNEL = """
from npllm import ops, testing

def attention(q, k, v, *, mask, scale=None):
    return ops.attention(q, k, v, mask=mask, scale=scale)

def tiled_attention(q, k, v, *, mask, scale=None):
    return testing.bugs["attention: C8 tile"].fn(q, k, v, mask=mask, scale=scale)

def rms_norm(x, weight, eps):
    return ops.rms_norm(x, weight, eps)
"""

WEAK = """
import kernel, numpy as np
from npllm.testing import under_test

def test_zeros():
    y = under_test(kernel.rms_norm, "rms_norm")(np.zeros((2, 4), "f4"), np.ones(4, "f4"), 1e-5)
    assert (y == 0).all()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "kernel.py").write_text(KERNEL)
    (tmp_path / "test_weak.py").write_text(WEAK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "kernel", raising=False)
    return tmp_path


def check(*arguments):
    return optional.invoke(["check", *arguments])


@pytest.mark.usefixtures("folder")
def test_a_right_function_gets_a_table_a_verdict_and_what_is_left():
    result = check("kernel:attention", "--max-examples", "10", "--n-seq", "130")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["check", "calls", "of", "budget", "seconds", "status"]
    assert lines[1].startswith("laws, up to 10 examples")
    assert lines[2].startswith("130 tokens, 8 heads of 96")
    assert "verdict: attention of kernel:attention is right" in lines
    assert lines[-1].startswith("to do: not tested: bias, lse, poison, slots, softcap")


@pytest.mark.usefixtures("folder")
def test_a_wrong_function_is_diagnosed():
    result = check("kernel:tiled_attention", "--seed", "5")
    assert result.exit_code == 1
    for text in ("is wrong", "convention  C8 tile", "to do: mend C8 tile", "replay  "):
        assert text in result.stdout


@pytest.mark.usefixtures("folder")
def test_json_holds_the_same():
    facts = json.loads(check("kernel:rms_norm", "--json", "--max-examples", "5").stdout)
    assert (facts["op"], facts["verdict"]) == ("rms_norm", "right")
    wrong = json.loads(check("kernel:tiled_attention", "--json").stdout)
    assert wrong["verdict"] == "wrong"
    assert wrong["replay"].startswith("npllm.testing.replay(")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["kernel"], 'the function must be "module:function"'),
        (["kernel:nothing"], "cannot be imported"),
        (["no_such_module:attention"], "cannot be imported"),
        (["kernel:ops"], "does not say which operation"),
        (["kernel:attention", "--features", "alibi"], "features of attention must be of"),
        (["kernel:rms_norm", "--dtype", "int8"], "dtype must be one of"),
    ],
)
def test_usage_is_exit_code_2(arguments, text):
    result = check(*arguments)
    assert result.exit_code == 2
    assert text in result.stderr


def test_the_operation_is_the_longest_in_the_name():
    assert op_in("m:my_apply_rope_v2") == "apply_rope"
    assert op_in("m:rope_tables") == "rope_tables"
    assert op_in("m:Set.flash_attention") == "attention"


# ------------------------------------------------------------------ mutants


@pytest.mark.slow
def test_mutants_lists_what_weak_tests_miss(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    command = ["mutants", "pytest -q -p no:cacheprovider test_weak.py", "--only", "C29 eps o"]
    result = optional.invoke([*command, "--json"])
    assert result.exit_code == 1, result.output
    facts = json.loads(result.stdout)
    assert (facts["ops"], facts["bugs"]) == (["rms_norm"], 2)  # without eps, 0 / 0 is NaN: found
    assert [missed["name"] for missed in facts["missed"]] == ["rms_norm: C29 eps outside the root"]
    assert facts["missed"][0]["used"] > 1
    assert "d_model" in facts["missed"][0]["case"]
    lines = mutants.report_lines(facts)
    assert lines[0] == "1 of 2 planted bugs of rms_norm are found"
    assert "missed   rms_norm: C29 eps outside the root" in lines


@pytest.mark.usefixtures("folder")
def test_mutants_wants_tests_that_pass_and_use_the_function(monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    for command, text in (
        ("python -c 'raise SystemExit(3)'", "must pass without a bug, got exit code 3"),
        ("python -c pass", "the tests put no operation to the test"),
        ("no-such-program", "cannot be run"),
        ("'", "cannot be split"),
    ):
        result = optional.invoke(["mutants", command])
        assert result.exit_code == 2, result.output
        assert text in result.stderr


def test_a_mutant_takes_the_place_of_its_operation_only(monkeypatch, tmp_path):
    def fn():
        pass

    monkeypatch.setenv(MUTANT, "rms_norm: n - 1")
    monkeypatch.setenv(LOG, str(tmp_path / "log"))
    bug = testing.bugs["rms_norm: n - 1"].fn
    assert under_test(fn, "linear") is fn
    assert under_test(fn, "rms_norm") is bug
    assert testing.adapt(fn, "rms_norm", library="numpy") is bug
    assert (tmp_path / "log").read_text().split() == ["linear", "rms_norm", "rms_norm"]
    monkeypatch.setenv(MUTANT, "no such bug")
    with pytest.raises(NpllmValueError, match="must name a planted bug, got 'no such bug'"):
        under_test(fn, "rms_norm")


def test_pytest_is_that_of_this_interpreter():
    assert command_of("pytest -q 'a b'") == [sys.executable, "-m", "pytest", "-q", "a b"]
    with pytest.raises(NpllmValueError, match="must not be empty"):
        command_of("")


# ------------------------------------------------------------------ the plugin

FIXTURES = """
def test_one(npllm_check):
    assert npllm_check(max_examples=5).op == "rms_norm"

def test_two(npllm_op):
    assert npllm_op.__name__ == "rms_norm"
"""


def pytest_in(folder, *arguments):
    environment = os.environ | {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]),
    }
    command = [sys.executable, "-m", "pytest", "-p", "npllm.testing.plugin", "-q", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_option_adds_a_test_of_its_own(folder):
    done = pytest_in(folder, "--npllm-op", "kernel:tiled_attention")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "convention  C8 tile" in done.stdout
    assert "1 failed, 1 passed" in done.stdout


def test_the_fixtures_check_the_function(folder):
    (folder / "test_mine.py").write_text(FIXTURES)
    done = pytest_in(folder, "test_mine.py", "--npllm-op", "kernel:rms_norm")
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    missing = pytest_in(folder, "test_mine.py")
    assert "the fixtures need the option --npllm-op" in missing.stdout
