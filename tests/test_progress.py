"""npllm.progress: a bar is drawn where one is wanted, and whatever stderr is, the work is done."""

import errno
import io
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny

from npllm import progress
from npllm.progress import progress_bar

ROOT = Path(__file__).resolve().parents[1]


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


class WriteOnly:
    """The least that a stream can be."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


class HungUp(Terminal):
    """A terminal that is gone: every write fails."""

    def write(self, text):  # noqa: ARG002 - the protocol's signature
        raise OSError(errno.ENXIO, "No such device or address")


STREAMS = {"None": None, "closed": Closed(), "only write": WriteOnly(), "hung up": HungUp()}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("only_terminal", [True, False])
def test_no_stream_breaks_the_work_or_a_line_or_a_warning(monkeypatch, name, only_terminal):
    monkeypatch.setattr(sys, "stderr", STREAMS[name])
    done = []
    with progress_bar(10, "loading", only_terminal=only_terminal) as advance:
        for _ in range(10):
            advance(1, "a.safetensors")
            done.append(1)
    progress.report("waiting")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", write_warning)  # pytest records them
        progress.warn("careful")
    assert len(done) == 10


def write_warning(message, *_, **__):
    """What Python does where nobody records warnings."""
    if sys.stderr is not None:
        sys.stderr.write(str(message))


def test_what_a_bare_stream_can_show_is_written_to_it(monkeypatch):
    stream = WriteOnly()
    monkeypatch.setattr(sys, "stderr", stream)
    progress.report("waiting")
    progress.write_line("done")
    assert stream.text == "npllm: waiting\ndone\n"


def test_a_warning_names_the_line_of_the_caller_and_may_be_an_error():
    with pytest.warns(UserWarning, match="careful") as caught:
        progress.warn("careful")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DeprecationWarning, match="careful"):
            progress.warn("careful", DeprecationWarning)


SCRIPT = """
import errno, io, sys, warnings

class WriteOnly:
    def write(self, text):
        pass

class HungUp(io.StringIO):
    def isatty(self):
        return True
    def write(self, text):
        raise OSError(errno.ENXIO, "No such device or address")

closed = io.StringIO()
closed.close()
streams = {"None": None, "closed": closed, "only write": WriteOnly(), "hung up": HungUp()}
sys.stderr = streams[sys.argv[1]]
warnings.simplefilter("always")
import npllm
import numpy as np
model = npllm.load(sys.argv[2], ops="reference")
ids = model.generate(np.array([[3, 4]]), max_new_tokens=2, use_cache=False)
print(len(npllm.score.score(model, [3, 4, 5], progress=True).log_probs), ids.shape[1])
sys.stderr = sys.__stderr__  # which Python flushes at its end
"""


def one_in_two(names, first):
    """Every other name by default, all with --all."""
    slow = pytest.mark.slow
    return [
        name if n % 2 == first else pytest.param(name, marks=slow) for n, name in enumerate(names)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", one_in_two(STREAMS, 0))
def test_loading_and_scoring_need_no_stderr(tmp_path, name):
    """With the warnings of Python itself, in a process of its own."""
    folder = tiny.write_folder(tmp_path)
    tiny.write_json(folder / "config.json", tiny.config_dict(an_unheard_of_key=1))  # a warning
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "2 4\n", "")


@pytest.mark.parametrize("name", one_in_two(STREAMS, 1))
def test_commands_need_no_stderr(tmp_path, name):
    """Results and exit codes are as ever: of a success with statistics, and of an error."""
    pytest.importorskip("click")
    folder = tiny.write_folder(
        tmp_path, tokenizer=tiny.byte_level(), settings=tiny.SETTINGS, vocab_size=300
    )
    head = SCRIPT.split("import npllm\n")[0]
    code = (
        f"{head}from npllm.cli import main\ncodes = []\n"
        "for path in sys.argv[2:]:\n"
        "    try:\n        main(['tokens', 'hello', '-m', path])\n"
        "    except SystemExit as end:\n        codes.append(end.code)\n"
        "print(codes)\nsys.stderr = sys.__stderr__  # which Python flushes at its end\n"
    )
    command = [sys.executable, "-c", code, name, str(folder), "/nonexistent"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "    265  'hello'\n[0, 1]\n"


def test_everything_on_stderr_passes_through_this_module():
    """No other module of the package writes to it, or issues a warning."""
    outside = {
        f"{path.relative_to(ROOT)}: {word}"
        for path in (ROOT / "npllm").rglob("*.py")
        for word in (
            "warnings.warn(",
            "stderr.write(",
            "file=sys.stderr",
            "err=True",
            "import tqdm",
        )
        if word in path.read_text(encoding="utf-8") and path.name != "progress.py"
    }
    assert outside == set()
