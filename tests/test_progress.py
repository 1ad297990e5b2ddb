"""npllm.progress: a bar is drawn where one is wanted, and whatever stderr is, the work is done."""

import io
import sys

import pytest

from npllm import progress
from npllm.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Closed(io.StringIO):
    def __init__(self):
        super().__init__()
        self.close()


class Bare:
    """A stream that can only be written to, as some notebooks and services have."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def work(**options):
    with progress_bar(10, "loading", **options) as advance:
        advance(4, "a.safetensors")
        advance(-4)
        advance(10, "b.safetensors")


@pytest.fixture
def drawn(monkeypatch):
    """Function (stream=a terminal, **options) -> what the bar wrote to it."""
    pytest.importorskip("tqdm")

    def draw(stream=None, **options):
        stream = Terminal() if stream is None else stream
        monkeypatch.setattr(sys, "stderr", stream)
        work(**options)
        return stream.getvalue()

    return draw


def test_a_bar_shows_description_units_and_label(drawn):
    last = drawn(leave=True).rsplit("\r", 1)[1]
    assert last.startswith("loading: 100%") and "10.0/10.0" in last and "b.safetensors" in last


def test_other_units_are_counted_one_by_one(drawn):
    text = drawn(unit="token", leave=True)
    assert "10/10" in text and "token/s" in text


def test_a_bar_that_is_not_kept_is_erased(drawn):
    assert drawn().rsplit("\r", 2)[1].strip() == ""


def test_no_bar_is_drawn_unless_wanted(drawn):
    assert drawn(wanted=False) == ""


def test_without_tqdm_there_is_no_bar(drawn, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    try:
        text = drawn()
    except ImportError as error:  # else conftest.py would skip the test
        pytest.fail(f"tqdm is needed: {error}")
    assert text == ""


def test_a_file_gets_a_bar_only_where_asked(drawn):
    assert drawn(io.StringIO()) == ""
    assert "loading" in drawn(io.StringIO(), only_terminal=False)


@pytest.mark.parametrize("stderr", [None, Closed(), Bare()], ids=["None", "closed", "no isatty"])
@pytest.mark.parametrize("only_terminal", [True, False])
def test_no_stream_breaks_the_work(monkeypatch, stderr, only_terminal):
    monkeypatch.setattr(sys, "stderr", stderr)
    assert not progress.stderr_is_terminal()
    work(only_terminal=only_terminal)


def test_an_error_of_the_work_passes_through():
    with pytest.raises(KeyError, match="mine"), progress_bar(10, "loading"):
        raise KeyError("mine")


def test_a_report_is_one_line_on_stderr(capsys):
    progress.report("waiting")
    assert capsys.readouterr() == ("", "npllm: waiting\n")


@pytest.mark.parametrize("stderr", [None, Closed(), Bare()], ids=["None", "closed", "no isatty"])
def test_no_stream_breaks_a_report(monkeypatch, stderr):
    monkeypatch.setattr(sys, "stderr", stderr)
    progress.report("waiting")
