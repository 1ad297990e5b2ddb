"""docs/habits.md: every command is one that the parser takes, every call has arguments that exist."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest

import npllm

cli = pytest.importorskip("npllm.cli.commands")
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "habits.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(.+)` \| `([^`]+)` \|$", PAGE, re.M)
COMMANDS = [here for _, here in ROWS if here.startswith("npllm ")]
CALLS = [here for _, here in ROWS if not here.startswith("npllm ")]


def test_there_are_forty_habits_of_three_programs():
    assert len(ROWS) >= 40 and len(COMMANDS) >= 20 and len(CALLS) >= 10
    assert re.findall(r"^## (.*)", PAGE, re.M) == ["mlx-lm", "llama.cpp", "Transformers"]
    assert PAGE.count("\n| `") == len(ROWS), "every row is read"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_the_parser_takes(command, monkeypatch):
    monkeypatch.setattr("npllm.cli.options.set_threads", lambda _: None)
    name, *words = shlex.split(command)[1:]
    parent = cli.main.context_class(cli.main, **cli.main.context_settings)  # click keeps its -h
    context = cli.main.commands[name].make_context(name, words, parent=parent)
    assert context.args == []


@pytest.mark.parametrize("call", CALLS)
def test_a_call_has_arguments_that_exist(call):
    node = ast.parse(call, mode="eval").body
    names = {"npllm": npllm, "model": npllm.Model}
    function = names.get(ast.unparse(node.func)) or _found(node.func, names)
    if function is npllm.Model:
        function = npllm.Model.__call__
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for keyword in node.keywords:
        known = (
            parameters
            if not takes_all
            else {*parameters, *inspect.signature(npllm.Model.generate).parameters}
        )
        assert keyword.arg in known, keyword.arg


def _found(node, names):
    if isinstance(node, ast.Name):
        return names[node.id]
    if node.attr == "tokenizer":
        return npllm.Tokenizer
    return getattr(_found(node.value, names), node.attr)
