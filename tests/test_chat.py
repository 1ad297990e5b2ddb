"""npllm chat: its commands, messages of several lines, saved conversations, and the cache it keeps."""

import numpy as np
import pytest
import tiny

import npllm
from npllm.cache import KVCache

CliRunner = pytest.importorskip("click.testing").CliRunner
cli = pytest.importorskip("npllm.cli.commands")
ONE = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_text_folder(
        tmp_path_factory.mktemp("chat"),
        max_position_embeddings=4000,
        original_max_position_embeddings=4000,
    )


@pytest.fixture(scope="module")
def model(folder):
    return npllm.load(folder)


@pytest.fixture
def chat(folder):
    """Function (input, *arguments) -> result, with three new tokens an answer."""

    def run(given, *arguments):
        words = ["chat", "-m", str(folder), "-n", "3", *map(str, arguments)]
        return CliRunner().invoke(cli.main, words, input=given)

    return run


def answers(model, *contents):
    """What each message gets when the whole history is read again: a run without reuse."""
    messages, found = [], []
    for content in contents:
        messages.append({"role": "user", "content": content})
        found.append(model.generate(messages, max_new_tokens=3))
        messages.append({"role": "assistant", "content": found[-1]})
    return found


def lines(result):
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_the_answers_are_those_of_a_run_without_reuse(chat, model):
    expected = answers(model, "hello", "hello w", "x" * 300, "hello")
    result = chat(f"hello\nhello w\n{'x' * 300}\nhello\n")
    assert lines(result) == "".join(f"{text}\n" for text in expected)
    plain = chat(f"hello\nhello w\n{'x' * 300}\nhello\n", "--no-use-cache")
    assert lines(plain) == lines(result)


def test_the_history_is_read_once(chat, monkeypatch):
    """Of the second message only what is new goes through the model."""
    sizes = []
    transact = KVCache.transact

    def counted(cache, *args):
        before = cache.n_ctx
        result = transact(cache, *args)
        sizes.append(cache.n_ctx - before)
        return result

    monkeypatch.setattr(KVCache, "transact", counted)
    chat(f"{'x' * 500}\nhello\n")
    read = [n for n in sizes if n > 0]
    assert read[0] > 500 and max(read[1:]) < 20


def test_undo_forgets_the_last_message_and_its_answer(chat, model):
    one, two = answers(model, "hello", "hello w")
    assert lines(chat("hello\nhello w\n/undo\nhello w\n")) == f"{one}\n{two}\n{two}\n"
    assert lines(chat("hello\n/undo\nhello\n")) == f"{one}\n{one}\n"
    assert "forgot 'hello' and its answer" in chat("hello\n/undo\n").stderr
    assert "a new conversation begins" in chat("hello\n/reset\n").stderr
    empty = chat("/undo\n")
    assert (lines(empty), empty.stderr) == ("", "npllm: there is no message to forget\n")


def test_help_lists_every_command_and_an_unknown_one_is_refused(chat, model):
    helped = chat("/help\n")
    for name in ("/help", "/undo", "/reset", "/save FILE", "/exit"):
        assert f"\n{name} " in f"\n{helped.stderr}"
    result = chat("/rest\n/save\n")
    assert lines(result) == ""
    assert "unknown command /rest: /help lists them" in result.stderr
    assert "/save needs the name of a file" in result.stderr
    (slashed,) = answers(model, "/rest")
    assert lines(chat("//rest\n")) == f"{slashed}\n"


def test_a_message_may_have_several_lines(chat, model):
    (expected,) = answers(model, "hello\nw\nx")
    assert lines(chat("hello\\\nw\\\nx\n")) == f"{expected}\n"
    assert lines(chat('"""hello\nw\nx"""\n')) == f"{expected}\n"
    assert lines(chat('"""\nhello\nw\nx\n"""\n/exit\n')) == f"{expected}\n"


@pytest.mark.parametrize("how", ["at the end", "by a command"])
def test_a_saved_conversation_goes_on(chat, model, tmp_path, how):
    one, two = answers(model, "hello", "hello w")
    file = tmp_path / "talk"
    saved = (
        chat("hello\n", "--save", file) if how == "at the end" else chat(f"hello\n/save {file}\n")
    )
    assert lines(saved) == f"{one}\n"
    assert lines(chat("hello w\n", "--resume", file)) == f"{two}\n"
    cache = model.load_cache(file)
    ids = model.tokenizer.encode_chat([ONE])
    assert np.array_equal(cache.ids[0, : len(ids)], ids)
    assert lines(chat("/undo\nhello\n", "--resume", file, "--save", file)) == f"{one}\n"


def test_what_cannot_be_resumed_is_one_line(chat, model, tmp_path):
    file = tmp_path / "talk"
    for note in (
        "",
        "{",
        "[1]",
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": 1}]}',
    ):
        model.new_cache().save(file, note=note)
        result = chat("hello\n", "--resume", file)
        assert (result.exit_code, result.stdout) == (1, ""), note
        assert result.stderr.count("\n") == 1
    assert chat("hello\n", "--resume", tmp_path / "missing").exit_code == 1
    refused = chat("hello\n/save /nonexistent/talk\nhello\n")
    assert refused.exit_code == 0 and "cannot be written" in refused.stderr


@pytest.mark.parametrize(
    "arguments", [("--no-use-cache", "--save", "x"), ("--resume", "x", "--system", "y")]
)
def test_options_that_would_be_ignored_are_refused(chat, arguments):
    result = chat("hello\n", *arguments)
    assert result.exit_code == 2 and "would be ignored" in result.stderr
