"""scripts/fuzz_templates.py: its cases are reproducible, hold, and see what they look for."""

import importlib.util
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from npllm.errors import NpllmValueError
from npllm.text import chat_template, template_process

_SPEC = importlib.util.spec_from_file_location(
    "fuzz_templates", Path(__file__).parents[1] / "scripts" / "fuzz_templates.py"
)
fuzz = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz)
pytestmark = pytest.mark.skipif(os.name != "posix", reason="watches a process through /proc")


@pytest.fixture
def cases(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NPLLM_FUZZ_SECRET", "")
    yield fuzz.TemplateCases(0, tmp_path)
    template_process.process.stop()  # it has the folder and the secret of the test


@pytest.mark.slow
def test_no_case_escapes(cases):
    outcomes = {cases.run(number) for number in range(30)}
    assert len(outcomes) > 5
    assert "rendered" in outcomes


def test_a_case_is_a_function_of_seed_and_number():
    programs = [fuzz.program(random.Random(f"template 0 {n}")) for n in range(200)]
    assert programs == [fuzz.program(random.Random(f"template 0 {n}")) for n in range(200)]
    assert len(set(programs)) > 190
    for block in fuzz.BLOCKS:
        name = block.split()[1].partition("(")[0]
        assert any(name in program for program in programs), name


@pytest.mark.slow
def test_the_mode_of_the_command():
    """Its process is watched as well, and the seed is printed."""
    script = Path(__file__).parents[1] / "scripts" / "fuzz.py"
    command = [sys.executable, str(script), "--mode", "template", "--n", "12"]
    environment = os.environ | {"PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert re.match(r"seed \d+\ntemplate: 12 cases of seed \d+ in \d+ s, 0 escapes", done.stdout)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("secret 0 of the environment", "left its sandbox"),
        (NpllmValueError("\x1b[31m"), "cannot be printed safely"),
        (ZeroDivisionError("raw"), "raw"),
    ],
)
def test_an_escape_is_seen(cases, monkeypatch, answer, words):
    def render(*_):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(chat_template, "render", render)
    with pytest.raises((RuntimeError, ZeroDivisionError), match=words):
        cases.run(1)


def test_more_than_the_limits_is_seen(cases, monkeypatch):
    monkeypatch.setattr(fuzz, "SLACK", -1.0)
    with pytest.raises(RuntimeError, match="allowed"):
        cases.run(1)
    monkeypatch.setattr(fuzz, "SLACK", 9.0)
    monkeypatch.setattr(template_process, "LARGEST_MEMORY", 1000)
    with pytest.raises(RuntimeError, match="held"):
        cases.run(2)


def test_a_file_and_a_changed_conversation_are_seen(cases, monkeypatch, tmp_path):
    monkeypatch.setattr(chat_template, "render", lambda _, messages, *__: messages.clear() or "")
    with pytest.raises(RuntimeError, match="left its sandbox"):
        cases.run(1)
    monkeypatch.setattr(chat_template, "render", lambda *_: (tmp_path / "x").touch() or "")
    with pytest.raises(RuntimeError, match="left its sandbox"):
        cases.run(1)


def test_a_text_that_depends_on_earlier_requests_is_seen(cases):
    with pytest.raises(RuntimeError, match="another text"):
        cases.compare("{{ 1 }}", "2")
    cases.compare("{{ 1 }}", "1")
    assert chat_template.process is template_process.process
