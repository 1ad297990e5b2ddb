"""Missing packages: what runs without them, which tests are skipped, and when that is an error."""

import os
import subprocess
import sys
from pathlib import Path

import optional
import pytest

import npllm

ROOT = Path(__file__).resolve().parents[1]


def python(*arguments, **environment):
    """Run Python on the checkout."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


def test_the_package_runs_as_a_module():
    pytest.importorskip("click")
    ended = python("-m", "npllm", "--version")
    assert ended.returncode == 0 and npllm.__version__ in ended.stdout


WITHOUT = """
import sys, threading
for name in ("click", "jinja2", "threadpoolctl", "numba", "gguf", "huggingface_hub", "tqdm"):
    sys.modules[name] = None
sys.path.insert(0, "tests")
import numpy as np
import tiny, npllm
from npllm import kernels, threads
model = tiny.model(ops=kernels.fastest_ops("numpy"))
assert np.isfinite(model(tiny.random_ids(2, 40))).all()
done = []
threads.run_blocks(lambda block: done.append((block, threading.get_ident())), range(5))
assert done == [(block, threading.get_ident()) for block in range(5)]
tokenizer = npllm.Tokenizer(tiny.byte_level(), "{{ messages }}", {})
try:
    tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
except npllm.NpllmError as error:
    print(error)
"""


def test_a_model_runs_where_packages_are_missing():
    """The command needs click, a chat template Jinja; nothing else does."""
    ended = python("-c", WITHOUT)
    assert ended.returncode == 0, ended.stderr
    assert "a chat template needs Jinja" in ended.stdout


def test_a_missing_package_is_named_and_another_error_is_not():
    error = ImportError("no module", name="no_such_package")
    assert optional.missing_package(error) is None
    assert optional.missing_package(ValueError("x")) is None
    assert optional.missing_package(ImportError("broken", name="numpy")) is None
    for name in optional.PACKAGES:
        found = npllm.NpllmError("needs it")
        found.__cause__ = ImportError(name=f"{name}.part")
        there = optional.importlib.util.find_spec(name) is not None
        assert optional.missing_package(found) == (None if there else name)


def test_where_everything_is_required_a_missing_package_is_an_error(monkeypatch):
    monkeypatch.setattr(optional, "REQUIRED", True)
    with pytest.raises(ImportError):
        optional.module("no_such_package")
    with pytest.raises(ImportError):
        optional.import_or_fail("no_such_package")


def test_what_ci_installs_last_is_never_required_before(monkeypatch):
    monkeypatch.setattr(optional, "REQUIRED", True)
    monkeypatch.setattr(optional, "REQUIRED_LIVE", False)
    monkeypatch.setattr(optional, "LIVE", (*optional.LIVE, "no_such_package"))
    with pytest.raises(pytest.skip.Exception):
        optional.import_or_fail("no_such_package.part")
    with pytest.raises(pytest.skip.Exception):
        _ = optional.module("no_such_package.part").anything
    monkeypatch.setattr(optional, "REQUIRED_LIVE", True)  # and then it is
    for find in (optional.import_or_fail, optional.module):
        with pytest.raises(ImportError):
            find("no_such_package.part")


BLOCKED = """
import sys
import pytest
sys.modules["gguf"] = sys.modules["array_api_strict"] = None
arguments = ["-q", "-p", "no:cacheprovider", "tests/test_convert.py", "tests/test_arrays.py"]
sys.exit(pytest.main([*arguments, "-k", "test_namespace_is_the_library_of_the_arrays"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("required", ["0", "1"])
def test_one_variable_turns_every_skip_for_a_package_into_an_error(required):
    ended = python("-c", BLOCKED, NPLLM_REQUIRE_ALL=required)
    if required == "1":
        assert "2 errors" in ended.stdout, ended.stdout
    else:
        assert "2 skipped" in ended.stdout and "error" not in ended.stdout, ended.stdout
