"""`npllm attention` and `npllm masks`: the order of the steps, and the line that says what was
written.
"""

import json
import re

import optional
import pytest
from page_reading import tiny_model

import npllm
from npllm.analysis.step_facts import STEPS

PLACE = ["--layer", "1", "--head", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("tiny")).folder)


def attention(folder, *options):
    result = optional.invoke(["attention", "-m", folder, "-p", "hello wé", *PLACE, *options])
    assert result.exit_code == 0, result.output
    return result


def test_the_steps_are_printed_in_the_order_of_the_computation(folder):
    lines = attention(folder, "--position", "1").stdout.splitlines()
    assert lines[0].startswith("layer 1, head 3, key/value head 1, query 1 ")
    rows = [re.match(r" +(\d+)  (\w+) +(\[[\d, ]+\])", line) for line in lines]
    assert [row[2] for row in rows if row] == list(STEPS)
    keys = [line for line in lines if re.match(r" {6}\d+ '", line)]
    last = next(n for n, line in enumerate(lines) if "weighted_values" in line)
    assert lines.index(keys[0]) > last and lines.index(keys[-1]) < len(lines) - 4
    assert [line.endswith("not visible to the query") for line in keys[:3]] == [False, False, True]


def test_json_has_the_same_numbers(folder):
    facts = json.loads(attention(folder, "--json").stdout)
    steps = npllm.steps.attention_steps(npllm.load(folder), "hello wé", layer=1, head=3)
    assert [step["name"] for step in facts["steps"]] == list(STEPS)
    assert [row["weight"] for row in facts["keys"]] == pytest.approx(steps.weights.tolist())


@pytest.mark.slow
@pytest.mark.parametrize(("options", "which"), [((), "head 3"), (("--all-heads",), "all 4 heads")])
def test_a_plot_is_told_on_stderr(folder, tmp_path, options, which):
    pytest.importorskip("matplotlib", reason="plots need matplotlib (the extra plot)")
    file = tmp_path / "heads.png"
    result = attention(folder, "--plot", str(file), "--json", *options)
    json.loads(result.stdout)
    (line,) = [line for line in result.stderr.splitlines() if str(file) in line]
    n_kb = f"{file.stat().st_size / 1000:.0f} kB"
    assert f"{file}: attention weights of layer 1, {which}, " in line
    assert re.search(r"\d+ tokens, \d+ x \d+ pixels, " + n_kb + "$", line)


def test_masks_says_what_it_wrote(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib (the extra plot)")
    file = tmp_path / "masks.png"
    result = optional.invoke(["masks", str(file), "-n", "16"])
    n_kb = f"{file.stat().st_size / 1000:.0f} kB"
    pattern = rf"{re.escape(str(file))}: 17 mask rules over 16 positions, \d+ x \d+ pixels, {n_kb}"
    assert re.fullmatch(pattern, result.stdout.strip())
