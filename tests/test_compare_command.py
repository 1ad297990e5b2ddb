"""`npllm compare`: exit codes, the table, JSON, the page and the picture."""

import json

import numpy as np
import optional
import planted_runs
import pytest

import npllm
from npllm import testing
from npllm.testing import bugs
from npllm.tracing.comparison.html_report import page_of
from npllm.tracing.comparison.report import lines_of, number

GQA = testing.golden("gqa")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Traces of a right run and of a wrong one, and the gold."""
    place = tmp_path_factory.mktemp("traces")
    ids = GQA.values["input_ids"]
    bug = bugs["swiglu: C7 up first"]
    op = planted_runs.once(npllm.ops.swiglu, bug.fn, {1})
    wrong = npllm.load(GQA.folder, ops=npllm.ops.reference.replace(swiglu=op))
    npllm.trace(npllm.load(GQA.folder, ops="reference"), ids, folder=place / "right")
    npllm.trace(wrong, ids, folder=place / "wrong")
    npllm.trace(npllm.load(GQA.folder), ids, dtype="float64", folder=place / "gold")
    return place


def call(*arguments):
    return optional.invoke(["compare", *map(str, arguments)])


def test_exit_codes(folders, tmp_path):
    gold, model = folders / "gold", ("-m", GQA.folder)
    assert call(folders / "right", gold, *model).exit_code == 0
    assert call(folders / "wrong", gold, *model).exit_code == 1
    assert call(folders / "wrong", "gqa").exit_code == 1, "a golden bundle by its name"
    assert call(folders / "right", GQA.folder).exit_code == 0, "a golden bundle by its folder"
    assert call(tmp_path, gold, *model).exit_code == 2
    assert call(folders / "right", tmp_path / "none", *model).exit_code == 2
    assert call(folders / "right", gold, "-m", tmp_path).exit_code == 2
    assert call(folders / "right", gold, *model, "--weights", tmp_path / "none").exit_code == 2
    assert call(folders / "right", gold, *model, "--names", "other").exit_code == 2


def test_what_cannot_be_decided_is_exit_code_3(tmp_path):
    """A cached step without the steps before it."""
    model = npllm.load(GQA.folder, ops="reference")
    ids = GQA.values["input_ids"][:1]
    trace = npllm.trace(model, ids, max_new_tokens=1, names=["*.cached_k@1", "*.cached_v@1"])
    values = {name.removesuffix("@1"): np.array(x) for name, x in trace.items()}
    index = json.loads(json.dumps(trace.index))
    index["steps"] = index["steps"][1:]
    entries = {name.removesuffix("@1"): entry for name, entry in index["values"].items()}
    for entry in entries.values():
        entry |= {"step": 0}
    index["values"] = entries
    npllm.Trace(index, values).save(tmp_path / "mine")
    result = call(tmp_path / "mine", tmp_path / "mine", "-m", GQA.folder)
    assert result.exit_code == 3, result.output
    assert "not decidable: 4 values" in result.stdout


def test_the_table_marks_the_wrong_op(folders):
    lines = call(folders / "wrong", folders / "gold", "-m", GQA.folder).stdout.splitlines()
    marked = [line for line in lines if line.startswith("✗")]
    assert len(marked) == 1
    assert marked[0].split()[1:3] == ["1", "mlp.swiglu"]
    assert marked[0].endswith("C7 up first")
    assert any("mlp.down_proj" in line and "inherited" in line for line in lines)
    assert "1 wrong op: layer 1 mlp.swiglu: C7 up first" in lines
    assert any(line.startswith("top-1 differs at ") for line in lines)
    every = call(folders / "wrong", "gqa", "--all").stdout.splitlines()
    assert len(every) > 42 > len(lines)


def test_json_holds_every_row(folders):
    facts = json.loads(call(folders / "wrong", "gqa", "--json").stdout)
    assert facts["status"] == "differs"
    assert facts["first_wrong"] == "model.layers.1.mlp.swiglu"
    row = next(row for row in facts["rows"] if row["name"] == facts["first_wrong"])
    assert (row["layer"], row["op"], row["status"]) == (1, "mlp.swiglu", "wrong")
    assert row["diagnosis"] == "C7 up first"
    assert row["introduced"] > 100 > row["inherited"]
    assert len(facts["rows"]) == 42


def test_json_has_names_for_what_it_lacks():
    values = planted_runs.right_run("gqa")
    values["model.layers.1.mlp.swiglu"][0, 0, 0] = np.nan
    facts = npllm.compare(values, GQA).facts()
    assert json.dumps(facts, allow_nan=False)
    assert "inf" in {row["introduced"] for row in facts["rows"]}


def test_the_page_is_written_and_names_the_row(folders, tmp_path):
    page = tmp_path / "page.html"
    assert call(folders / "wrong", "gqa", "--html", page).exit_code == 1
    text = page.read_text(encoding="utf-8")
    assert '<tr class="bad"><td>✗</td><td>1</td><td class="text">mlp.swiglu</td>' in text
    assert "http" not in text, "no other file"
    assert call(folders / "wrong", "gqa", "--html", tmp_path).exit_code == 2


def test_what_was_read_is_escaped():
    values = planted_runs.right_run("gqa") | {"<script>alert(1)</script>\x1b[2J": np.zeros(1)}
    with pytest.warns(UserWarning, match="names that no map knows"):
        found = npllm.compare(values, GQA)
    assert "<script>" not in page_of(found)
    assert "&lt;script&gt;" in page_of(found)
    assert "\x1b" not in "\n".join(lines_of(found))


def test_the_picture_is_drawn(folders, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the extra plot)")
    picture = tmp_path / "errors.png"
    assert call(folders / "wrong", "gqa", "--plot", picture).exit_code == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert call(folders / "wrong", "gqa", "--plot", tmp_path / "no" / "x.png").exit_code == 2


def test_numbers_are_short():
    shares = (None, 0.0, 0.3, 0.04, 912.0, 1e-9, 8.8e6, np.inf)
    assert [number(x) for x in shares] == [
        "-", "0.0", "0.3", "4.0e-2", "912.0", "1.0e-9", "8.8e6", "inf",
    ]  # fmt: skip
