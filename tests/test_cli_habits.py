"""What a new user of the commands tripped over: each mended for every command."""

import inspect
import json
import re
import subprocess
import sys
import time

import pytest
import tiny

import npllm
from npllm import progress
from npllm.cli import main as entry
from npllm.errors import NpllmOSError
from npllm.evaluation.run import evaluate

CliRunner = pytest.importorskip("click.testing").CliRunner
cli = pytest.importorskip("npllm.cli.commands")
tokens_and_rate = pytest.importorskip("npllm.cli.streams").tokens_and_rate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_text_folder(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture
def call(folder):
    """Function (command, *arguments) -> result; runs with the tiny checkpoint."""

    def run(command, *arguments, **options):
        words = [command, *map(str, arguments), "-m", str(folder)]
        return CliRunner().invoke(cli.main, words, **options)

    return run


WITH_A_PROMPT = {
    "generate": ("-n", 2),
    "beam": ("-n", 2),
    "topk": (),
    "tokens": (),
    "score": (),
    "lens": (),
    "attention": ("--layer", 0, "--head", 0),
}
ELSEWHERE = {"trace", "explain", "precision"}  # the same options, slower to run
every_prompt = pytest.mark.parametrize(("command", "more"), WITH_A_PROMPT.items())


@every_prompt
def test_a_prompt_is_given_by_position_by_option_in_a_file_or_on_standard_input(
    call, tmp_path, command, more
):
    """The newline that echo and editors add is no part of it, one space is."""
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"hello w\n")
    expected = call(command, "hello w", *more)
    assert expected.exit_code == 0
    for arguments, given in (
        (("-p", "hello w"), None),
        (("--prompt", "hello w"), None),
        (("-f", file), None),
        (("-",), "hello w\n"),
        ((), "hello w\r\n"),
    ):
        assert call(command, *arguments, *more, input=given).stdout == expected.stdout, arguments


def test_one_newline_is_removed_and_no_second_one(call):
    rows = json.loads(call("tokens", "-", "--json", input="hello \n\n").stdout)
    assert "".join(row["text"] for row in rows) == "hello \n"


def test_every_command_with_a_prompt_takes_it_in_the_same_ways():
    with_prompt = {
        name
        for name, command in cli.main.commands.items()
        if {"-p", "--prompt"} <= {word for parameter in command.params for word in parameter.opts}
    }
    assert with_prompt == {*WITH_A_PROMPT, *ELSEWHERE}
    for name in with_prompt:
        parameters = {p.name: p for p in cli.main.commands[name].params}
        assert parameters["prompt"].param_type_name == "argument"
        assert "-f" in parameters["file"].opts


@every_prompt
def test_two_prompts_are_wrong_usage(call, command, more):
    result = call(command, "a", "-p", "b", *more)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "one prompt is needed, got 2" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("attention", "hello", "--layer", 0, "--head", 0, "--all-heads"),
        ("lens", "hello", "--attention", "-k", 3),
        ("lens", "hello", "--attention", "--json"),
        ("generate", "hello", "--system", "be brief"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(call, arguments):
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "would be ignored" in result.stderr


@pytest.mark.parametrize("option", ["--layout", "--mask"])
def test_check_refuses_what_goes_with_a_library(option):
    value = {"--layout": "b n h d", "--mask": "bool"}[option]
    result = CliRunner().invoke(cli.main, ["check", "m:attention", option, value])
    assert result.exit_code == 2 and f"{option} would be ignored" in result.stderr


def test_top_k_shows_as_many_tokens_as_it_keeps(call):
    def shown(*options):
        return json.loads(call("topk", "hello", "--json", *options).stdout)

    assert len(shown()) == 10
    assert len(shown("--top-k", 3)) == len(shown("-k", 3)) == len(shown("--top", 3)) == 3
    assert sum(row["probability"] for row in shown("--top-k", 3)) == pytest.approx(1, abs=1e-5)
    lens = [call("lens", "hello", word, 2).stdout for word in ("-k", "--top", "--top-k")]
    assert lens[0] == lens[1] == lens[2]
    same = ("generate", "hello", "-n", 3, "--seed", 1)
    assert call(*same, "-k", 4).stdout == call(*same, "--top-k", 4).stdout


def test_minus_one_generates_until_the_context_is_full(call, folder):
    model = npllm.load(folder)
    n_left = model.config.context_length - len(model.tokenizer.encode("hello"))
    result = call("generate", "hello", "-n", -1, "--json")
    assert json.loads(result.stdout)["new_tokens"] == n_left
    assert result.stderr == ""
    assert model.generate("hello", max_new_tokens=None) == json.loads(result.stdout)["text"]
    answer = call("beam", "hello", "-n", -1, "--num-beams", 1, "--json")
    assert len(model.tokenizer.encode(json.loads(answer.stdout)[0]["text"])) > 1
    assert call("generate", "hello", "-n", -2).exit_code == 2


def test_a_rate_is_left_out_where_none_was_measured(call):
    assert tokens_and_rate(1, None) == "1 token"
    assert tokens_and_rate(2, 3.5) == "2 tokens, 3.5 tokens/s"
    facts = json.loads(call("generate", "hello", "-n", 1, "--json").stdout)
    assert facts["new_tokens_per_second"] is None
    assert "generation 1 token;" in call("generate", "hello", "-n", 1).stderr
    assert "prompt 1 token; generation 0 tokens;" in call("generate", "hello", "-n", 0).stderr


def test_cost_names_the_number_that_was_typed(call, folder):
    limit = npllm.load(folder).config.context_length
    result = call("cost", "--context", limit)
    assert result.exit_code == 1
    assert f"context must be an integer in 1 ... {limit - 1}" in result.stderr
    assert result.stderr.rstrip().endswith(f"got {limit}")


def test_embed_says_that_a_language_model_is_none_in_words(call, folder):
    result = call("embed", "a", "b")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"npllm: {folder} is a language model and is no encoder")
    with pytest.raises(npllm.NpllmError, match=f"^{folder} is a language model"):
        npllm.load(folder).embed(["a"])


# --------------------------------------------------------------- disks, interrupts, slow work


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize(
    "arguments", [("tokens", "hello"), pytest.param(("--help",), marks=pytest.mark.slow)]
)
def test_a_full_disk_is_one_line(folder, arguments):
    words = [*arguments, "-m", str(folder)] if arguments[0] == "tokens" else arguments
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "npllm", *words], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyboardInterrupt(), "Aborted!\n"),
        (OSError(28, "No space left on device"), "npllm: [Errno 28] No space left on device\n"),
        (MemoryError(), "npllm: MemoryError\n"),
    ],
)
def test_what_ends_the_import_of_the_commands_is_one_line(monkeypatch, capsys, error, line):
    class Broken:
        def find_spec(self, name, *_):
            if name == "npllm.cli.commands":
                raise error

    monkeypatch.delitem(sys.modules, "npllm.cli.commands")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        entry(["--version"])
    assert ended.value.code == 1
    assert capsys.readouterr() == ("", line)


def test_a_full_memory_is_one_line(call, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr("npllm.cli.checkpoints.read_tokenizer", fail)
    result = call("tokens", "hello")
    assert (result.exit_code, result.stderr) == (
        1,
        "npllm: not enough memory (Unable to allocate 9 TiB)\n",
    )


def test_slow_work_writes_a_line_now_and_then_where_stderr_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
    with progress.progress_bar(9000, "scoring", unit="token") as advance:
        advance(300)
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert lines and set(lines) == {"npllm: scoring: 300 of 9000 tokens, 0 s so far"}
    with progress.progress_bar(9_000_000, "loading") as advance:
        advance(1_000_000)
        time.sleep(0.2)
    assert "npllm: loading: 1 of 9 MB" in capsys.readouterr().err
    with progress.progress_bar(9, "loading", wanted=False), progress.working("x", wanted=False):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_reader_of_the_help_finds_what_minus_one_does():
    text = CliRunner().invoke(cli.main, ["generate", "-h"]).stdout
    assert "until a stop" in text and inspect.cleandoc(cli.main.help) in cli.main.help


VERBS = frozenset(
    """
    Add Answer Apply Begin Check Compare Compile Continue Decode Divide Draw End Fetch Find Generate
    Give Go Hold Keep Leave Let Link Listen Load Make Measure Name Pass Plant Print Put Read Refuse
    Replace Return Round Run Sample Save Search Send Show Start Take Time Use Verify Write Do
""".split()
)


def helps():
    """Every option with its help, by command."""
    return [
        (name, max(x.opts, key=len), x.help)
        for name, command in cli.main.commands.items()
        for x in command.params
        if x.param_type_name == "option"
    ]


def test_the_help_of_every_option_is_a_sentence_that_says_what_it_does():
    wrong = [
        (name, option, text)
        for name, option, text in helps()
        if text is None
        or text.split()[0].strip(",") not in VERBS
        or not re.search(r"\.( \[.*\])?$|\"$", text)
    ]
    assert wrong == [] and len(helps()) > 200
    said = {name: command.help.split()[0] for name, command in cli.main.commands.items()}
    starts = {"Chat", "Diagnose", "Draw", "Evaluate", "List", "Say", "Serve", "Name"} | VERBS
    assert {name: word for name, word in said.items() if word not in starts} == {}


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_folder_of_tasks_that_is_none_is_named(name, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NpllmOSError, match=rf"include_path must be a folder .*{name} is none"):
        evaluate(None, ["x"], include_path=tmp_path / name)
    result = CliRunner().invoke(
        cli.main, ["eval", "--tasks", "x", "--include-path", str(tmp_path / name)]
    )
    assert result.exit_code == 2 and name in result.output
