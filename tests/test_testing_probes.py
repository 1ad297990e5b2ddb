"""Probe files, which diagnose a port in any language, and the commands around them."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from npllm import testing
from npllm.testing.forms.table import OPS
from npllm.testing.planted import run
from npllm.testing.probes import PROBES, write_probes
from npllm.testing.registry import alternatives

CliRunner = pytest.importorskip("click.testing").CliRunner
cli = pytest.importorskip("npllm.cli.testing")
main = pytest.importorskip("npllm.cli.commands").main
NAMED = cli.OPS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes")
    write_probes(folder)
    return folder


@pytest.fixture(scope="module")
def index(folder):
    return {
        entry["name"]: entry
        for entry in json.loads((folder / "index.json").read_text(encoding="utf-8"))["probes"]
    }


NUMERIC = [probe for probe in PROBES.values() if not probe.rounding and probe.op != "detokenize"]
each = pytest.mark.parametrize("probe", NUMERIC, ids=lambda probe: probe.name)


def port_compares(folder, entry, output):
    """What a port does: read the answers, and list those that agree with its output."""
    answers = load_file(folder / entry["answers"]["safetensors"])
    names = [name.removesuffix("/budget") for name in answers if name.endswith("/budget")]
    agreeing = []
    for name in names:
        y, budget = answers[f"{name}/float64"], answers[f"{name}/budget"]
        with np.errstate(invalid="ignore"):
            agrees = (
                (np.abs(output - y) <= budget) | (np.isnan(output) & np.isnan(y)) | (output == y)
            )
        if agrees.all():
            agreeing.append(name)
    return agreeing


@each
def test_the_right_answer_agrees_with_the_definitions(folder, index, probe):
    agreeing = port_compares(
        folder, index[probe.name], run(probe.op, probe.make()).astype(np.float64)
    )
    assert "right" in agreeing
    same = [name for name, facts in index[probe.name]["options"].items() if facts["same_as_right"]]
    assert set(agreeing) <= {"right", *same}


@each
def test_a_wrong_port_finds_its_option_by_comparing_files(folder, index, probe):
    entry = index[probe.name]
    answers = load_file(folder / entry["answers"]["safetensors"])
    for name, facts in entry["options"].items():
        agreeing = port_compares(
            folder, entry, answers[f"{name}/float64"].astype(np.float32).astype(np.float64)
        )
        assert name in agreeing
        allowed = {name, *facts["same_as"], *(["right"] if facts["same_as_right"] else [])}
        assert set(agreeing) <= allowed, f"{name} agrees with {agreeing}"


@each
def test_npz_and_safetensors_hold_the_same_and_the_index_describes_them(folder, index, probe):
    for kind in ("inputs", "answers"):
        facts = index[probe.name][kind]
        tensors, arrays = load_file(folder / facts["safetensors"]), np.load(folder / facts["npz"])
        assert set(tensors) == set(arrays.files) == set(facts["arrays"])
        for name, about in facts["arrays"].items():
            assert (
                tensors[name].dtype == arrays[name].dtype == about["dtype"]
                and list(tensors[name].shape) == about["shape"]
            )
            assert np.array_equal(tensors[name], arrays[name], equal_nan=True)
    answers = load_file(folder / index[probe.name]["answers"]["safetensors"])
    assert (
        answers["right/float32"].dtype == np.float32
        and answers["right/float64"].dtype == np.float64
    )
    assert np.array_equal(answers["right/float32"], answers["right/float64"].astype(np.float32))
    assert index[probe.name]["op"] == probe.op and index[probe.name]["says"].endswith(".")


def test_every_option_of_every_operation_is_in_some_file(index):
    written = {(entry["op"], name) for entry in index.values() for name in entry.get("options", {})}
    for op in OPS:
        assert {(op, " ".join(choice)) for choice in alternatives(op)} <= written
    text = index["detokenize-stream"]["answers"]
    assert set(text) == {"right", "C20 token by token", "C20 incomplete shown"}


def test_probes_of_rounding_hold_the_output_of_each_option(folder, index):
    arrays = load_file(folder / index["rms-norm-bfloat16"]["answers"]["safetensors"])
    assert {"C13 cast before weight/bfloat16/0", "C13 cast after weight/bfloat16/0"} <= set(arrays)
    assert not np.array_equal(
        arrays["C13 cast before weight/bfloat16/0"], arrays["C13 cast after weight/bfloat16/0"]
    )


def test_probes_are_the_same_every_time():
    for probe in PROBES.values():
        for name, x in probe.make().items():
            assert np.array_equal(x, probe.make()[name]), f"{probe.name} {name}"


# ------------------------------------------------------------------ commands


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_knows_the_operations():
    assert set(NAMED) == {*OPS, "detokenize"}


def test_npllm_probes_writes_the_folder(tmp_path):
    result = invoke("probes", tmp_path / "deep" / "er", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["probes"] == len(PROBES) and (tmp_path / "deep" / "er" / "index.json").exists()
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = invoke("probes", blocked)
    assert result.exit_code == 1 and "cannot be written" in result.output


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".safetensors"])
def test_npllm_diagnose_names_the_convention_of_a_file(folder, index, tmp_path, suffix):
    from safetensors.numpy import save_file

    entry = index["attention-cached"]
    y = load_file(folder / entry["answers"]["safetensors"])["C9 top-left/float64"].astype(
        np.float32
    )
    path = tmp_path / f"mine{suffix}"
    {
        ".npz": lambda: np.savez(path, y),
        ".npy": lambda: np.save(path, y),
        ".safetensors": lambda: save_file({"output": y}, path),
    }[suffix]()
    for kind in ("npz", "safetensors"):
        result = invoke("diagnose", "--op", "attention", folder / entry["inputs"][kind], path)
        assert result.exit_code == 1 and "convention  C9 top-left" in result.output, result.output
    result = invoke(
        "diagnose", "--op", "attention", "--json", folder / entry["inputs"]["npz"], path
    )
    facts = json.loads(result.output)
    assert (
        facts["names"] == ["C9 top-left"]
        and facts["status"] == "wrong"
        and facts["runner_up"]["distance"] > 1
    )


def test_the_exit_codes(folder, index, tmp_path):
    entry = index["swiglu-moderate"]
    inputs = folder / entry["inputs"]["npz"]
    right = load_file(folder / entry["answers"]["safetensors"])["right/float32"]
    np.savez(tmp_path / "right.npz", output=right, other=right)
    np.save(tmp_path / "wrong.npy", right * 2)
    assert invoke("diagnose", "--op", "swiglu", inputs, tmp_path / "right.npz").exit_code == 0
    assert invoke("diagnose", "--op", "swiglu", inputs, tmp_path / "wrong.npy").exit_code == 1
    np.savez(
        tmp_path / "vague.npz",
        x=np.float32([[1e6, -1e6, 1e-3]]),
        weight=np.ones((1, 3), np.float32),
    )
    np.save(tmp_path / "vague.npy", np.float32([[2e-3]]))
    assert (
        invoke(
            "diagnose", "--op", "linear", tmp_path / "vague.npz", tmp_path / "vague.npy"
        ).exit_code
        == 3
    )


def test_usage_errors_say_what_is_wrong_and_end_with_2(folder, index, tmp_path):
    inputs = folder / index["swiglu-moderate"]["inputs"]["npz"]
    right = load_file(folder / index["swiglu-moderate"]["answers"]["safetensors"])["right/float32"]
    np.save(tmp_path / "right.npy", right)
    np.savez(tmp_path / "two.npz", a=right, b=right)
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "text.safetensors").write_text("no tensors")
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    for arguments, message in [
        ((inputs, tmp_path / "missing.npz"), "cannot be read"),
        ((inputs, tmp_path / "two.npz"), "must hold one array, or one called output"),
        ((inputs, tmp_path / "text.npz"), "is not a .npz file"),
        ((inputs, tmp_path / "text.safetensors"), "is not a .safetensors file"),
        ((inputs, tmp_path / "pickled.npy"), "is not a .npy file"),
        ((inputs, tmp_path / "right.bin"), "suffix must be"),
        ((tmp_path / "right.npy", tmp_path / "right.npy"), "missing: gate_up"),
    ]:
        result = invoke("diagnose", "--op", "swiglu", *arguments)
        assert result.exit_code == 2 and message in result.output, (message, result.output)
    assert invoke("diagnose", inputs, tmp_path / "right.npy").exit_code == 2
    assert invoke("diagnose", "--op", "swish", inputs, tmp_path / "right.npy").exit_code == 2


def test_text_comes_in_files_too(tmp_path):
    probe = PROBES["detokenize-stream"].make()
    np.savez(
        tmp_path / "inputs.npz",
        prefixes=np.array(probe["prefixes"]),
        tokens=np.array(probe["tokens"]),
    )
    np.savez(
        tmp_path / "output.npz",
        np.array(testing.conventions["C20"].run("detokenize", probe, "token by token")),
    )
    result = invoke(
        "diagnose", "--op", "detokenize", tmp_path / "inputs.npz", tmp_path / "output.npz"
    )
    assert result.exit_code == 1 and "C20 token by token" in result.output
