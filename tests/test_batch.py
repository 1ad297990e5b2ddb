"""`npllm batch`: every row answered as if alone, whatever happened before."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optional
import pytest
import served
import test_encoder

from npllm.analysis.score import score
from npllm.batch import run as batch_run
from npllm.batch.results import Results
from npllm.batch.run import batch
from npllm.errors import NpllmError, NpllmRuntimeError, NpllmTypeError, NpllmValueError

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["hello", "hell", "he", "hello hello", "w", "hello w hello w hell"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return served.load(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def encoder():
    return test_encoder.make(dtype=np.float32, max_position_embeddings=64)[0]


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompts(n=len(WORDS)):
    return [{"prompt": f"{WORDS[i % 6]} {i}", "id": i} for i in range(n)]


def results(rows):
    return [row["result"] for row in rows]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.jsonl"


# ------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("options", [{}, {"temperature": 1.1, "seed": 3, "stop": ["h"]}], ids=str)
def test_a_prompt_is_continued_as_generate_does(model, tmp_path, out, options):
    rows = prompts(20)
    done = batch(model, write(tmp_path / "in", rows), out, max_new_tokens=9, **options)
    assert done == (20, 20, 0, 0, None)
    found = read(out)
    assert [row["id"] for row in found] == list(range(20))
    assert [row["result"]["text"] for row in found] == [
        model.generate(row["prompt"], max_new_tokens=9, **options) for row in rows
    ]
    assert all(row["result"]["n_tokens"] <= 9 for row in found)
    assert not Path(f"{out}.parts").exists()


def test_a_conversation_is_answered_as_generate_does(model, tmp_path, out):
    rows = [{"messages": [{"role": "user", "content": word}]} for word in WORDS]
    batch(model, write(tmp_path / "in", rows), out, task="chat", max_new_tokens=5)
    assert [one["text"] for one in results(read(out))] == [
        model.generate(row["messages"], max_new_tokens=5) for row in rows
    ]


def test_a_text_is_scored_as_score_does(model, tmp_path, out):
    texts = [f"{word} 12" for word in WORDS]
    batch(model, write(tmp_path / "in", [{"text": text} for text in texts]), out, task="score")
    for word, found in zip(texts, results(read(out)), strict=True):
        wanted = score(model, word)
        assert found == {
            "log_probability": wanted.total,
            "perplexity": wanted.perplexity,
            "n_tokens": len(wanted.ids),
        }


def test_a_text_is_embedded_as_embed_does(encoder, tmp_path, out):
    texts = ["a b c", "hello", "b c a", "c " * 40, "a " * 40, "a " * 12, "b " * 12]
    batch(encoder, write(tmp_path / "in", [{"text": t} for t in texts]), out, task="embed")
    found = [one["embedding"] for one in results(read(out))]
    np.testing.assert_array_equal(found, np.concatenate([encoder.embed([t]) for t in texts]))


def test_rows_of_one_length_are_embedded_together(encoder, tmp_path, out, monkeypatch):
    calls = []
    embed_ids = type(encoder).embed_ids
    monkeypatch.setattr(
        type(encoder), "embed_ids", lambda *a: calls.append(len(a[1])) or embed_ids(*a)
    )
    texts = ["a " * 30 + word for word in ("a", "b", "c")] + ["a", "b"]
    batch(encoder, write(tmp_path / "in", [{"text": t} for t in texts]), out, task="embed")
    assert calls[0] == 3 and sum(calls) == 5


def test_order_may_be_given_up(model, tmp_path, out):
    rows = prompts(12)
    batch(model, write(tmp_path / "in", rows), out, max_new_tokens=2, keep_order=False)
    found = read(out)
    assert [row["id"] for row in found] != list(range(12))  # the longest first
    assert sorted(row["id"] for row in found) == list(range(12))


def test_equal_rows_are_answered_once(model, tmp_path, out):
    rows = [{"prompt": "hello", "id": i} for i in range(5)]
    done = batch(model, write(tmp_path / "in", rows), out, max_new_tokens=2)
    assert [row["id"] for row in read(out)] == list(range(5))
    assert (done.n_answered, done.n_reused) == (1, 4)


# ------------------------------------------------------------------------------ bad rows

BAD = [
    "{",
    "[1]",
    '"hello"',
    "\x00",
    '{"prompt": "a", "prompt": "b"}',
    {"text": "hello"},
    {"prompt": 5},
    {"prompt": ""},
    {"prompt": [1, 2]},
    {"prompt": [{"role": "user", "content": "hello"}]},
    {"prompt": "a" * 300},
    {"prompt": "hello", "temperature": 1},
    {"prompt": "hello", "result": 1},
]


def test_bad_rows_are_reported_and_kept_apart(model, tmp_path, out):
    rows = [x for pair in zip(BAD, prompts(len(BAD)), strict=True) for x in pair]
    done = batch(model, write(tmp_path / "in", rows), out, max_new_tokens=2)
    assert [row["id"] for row in read(out)] == list(range(len(BAD)))
    assert (done.n_failed, done.errors) == (len(BAD), tmp_path / "out.errors.jsonl")
    errors = read(done.errors)
    assert [error["line"] for error in errors] == list(range(1, 2 * len(BAD), 2))
    assert all(error["error"] for error in errors)
    assert errors[5]["row"] == {"text": "hello"} and errors[0]["row"] == "{"
    batch(model, write(tmp_path / "in", prompts(3)), out, max_new_tokens=2)
    assert not done.errors.exists() and len(read(out)) == 3


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"task": "sing"}, NpllmValueError),
        ({"task": "embed"}, NpllmTypeError),
        ({"task": "score", "temperature": 1}, NpllmTypeError),
        ({"temperature": -1}, NpllmValueError),
        ({"colour": 1}, (NpllmTypeError, TypeError)),
        ({"out": "in.jsonl"}, NpllmValueError),
        ({"source": "missing.jsonl"}, NpllmError),
        ({"out": "other.txt"}, NpllmValueError),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_before_any_row(model, tmp_path, wrong, error, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("in.jsonl"), prompts(2))
    write(Path("other.txt"), ["dear diary"])
    names = {"source": "in.jsonl", "out": "out.jsonl"} | wrong
    with pytest.raises(error):
        batch(model, names.pop("source"), names.pop("out"), **names)
    assert Path("other.txt").read_text() == "dear diary\n"
    assert not Path("out.jsonl").exists()


# ------------------------------------------------------------------------------ resuming


def interrupted(monkeypatch, n):
    """Let the run end after n answers, as Ctrl-C does."""
    whole = batch_run.answers

    def some(*args):
        for i, pair in enumerate(whole(*args)):
            if i == n:
                raise KeyboardInterrupt
            yield pair

    monkeypatch.setattr(batch_run, "answers", some)


def test_a_run_goes_on_where_it_was_interrupted(model, tmp_path, out, monkeypatch):
    rows = prompts(12)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, 5)
        batch(model, write(tmp_path / "in", rows), out, max_new_tokens=3)
    assert not out.exists()
    rows = [{"prompt": "another"}, *rows[::-1]]  # found by what they are, not by their place
    done = batch(model, write(tmp_path / "in", rows), out, max_new_tokens=3)
    assert (done.n_answered, done.n_reused) == (8, 5)
    assert [one["text"] for one in results(read(out))] == [
        model.generate(row["prompt"], max_new_tokens=3) for row in rows
    ]


def test_a_complete_output_is_taken_over_and_other_settings_are_not(model, tmp_path, out):
    source = write(tmp_path / "in", prompts(4))
    batch(model, source, out, max_new_tokens=3)
    assert batch(model, source, out, max_new_tokens=3)[1:3] == (0, 4)
    assert batch(model, source, out, max_new_tokens=4)[1:3] == (4, 0)
    assert batch(model.with_ops(), source, out, max_new_tokens=4)[1:3] != (0, 0)


def test_half_a_line_is_no_answer(out):
    """A journal that was cut at any byte."""
    answers = {f"key {i}": {"text": "x" * i} for i in range(4)}
    with_all = Results(out).open()
    with_all.add(answers.items())
    with_all.close()
    journal = Path(f"{out}.parts") / "journal.jsonl"
    content = journal.read_bytes()
    for n in range(len(content) + 1):
        journal.write_bytes(content[:n])
        again = Results(out).open()
        assert list(again.found) == list(answers)[: content[:n].count(b"\n")]
        again.add([("new", {"text": "y"})])
        again.close()
        last = Results(out).open()
        assert last.found == again.found
        last.close()


def test_one_run_at_a_time_writes_a_file(out):
    first = Results(out).open()
    with pytest.raises(NpllmRuntimeError, match="another run"):
        Results(out).open()
    first.close()
    Results(out).open().close()


# ------------------------------------------------------------------------------ the command


def test_the_command(model, tmp_path, out):
    source = write(tmp_path / "in.jsonl", [*prompts(3), "{"])
    words = ["batch", str(source), str(out), "-m", str(model.folder), "-n", "3", "--json"]
    result = optional.invoke(words)
    assert result.exit_code == 1, result.output
    facts = json.loads(result.stdout)
    assert (facts["n_answered"], facts["n_failed"]) == (3, 1)
    assert "1 rows failed" in result.stderr and facts["errors"] in result.stderr
    assert [one["text"] for one in results(read(out))] == [
        model.generate(row["prompt"], max_new_tokens=3) for row in prompts(3)
    ]
    ignored = optional.invoke([*words[:5], "--task", "score", "-n", "3"])
    assert ignored.exit_code == 2 and "--max-new-tokens would be ignored" in ignored.stderr
    ignored = optional.invoke([*words[:5], "--workers", "3"])
    assert ignored.exit_code == 2 and "--workers would be ignored" in ignored.stderr


@pytest.mark.slow
def test_ten_kills_lose_nothing_that_was_written(model, tmp_path, out):
    """kill -9 at ten moments of one job; then the answers of a run without any."""
    rows = [{"prompt": "hello " * (1 + i % 9) + str(i), "id": i} for i in range(200)]
    source = write(tmp_path / "in.jsonl", rows)
    words = ["-m", "npllm", "batch", str(source), str(out), "-m", str(model.folder), "-n", "60"]
    command = [sys.executable, *words]
    n_before, rng = 0, np.random.default_rng(0)
    for _ in range(10):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        n_at_start = n_written(out)
        end = time.monotonic() + 120
        while n_written(out) == n_at_start and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert n_written(out) >= n_before
        assert n_before or not out.exists()  # in the middle
        n_before = n_written(out)
    batch(model, source, out, max_new_tokens=60, stop=())
    clean = tmp_path / "clean.jsonl"
    batch(model, source, clean, max_new_tokens=60, stop=())
    assert out.read_bytes() == clean.read_bytes()


def n_written(out):
    """Whole answers on disk."""
    if out.exists():
        return out.read_bytes().count(b"\n")
    try:
        return (Path(f"{out}.parts") / "journal.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


# ------------------------------------------------------------------------------ Ray


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own code warns and leaves sockets open
def test_ray_gives_the_same_and_survives_the_death_of_a_worker(model, tmp_path, out, monkeypatch):
    """A real local cluster; one worker is killed after the first shard."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")  # for the workers
    from npllm.batch.ray_engine import ray_runner

    rows = [{"prompt": "hello " * (1 + i % 9) + str(i), "id": i} for i in range(40)]
    source, clean = write(tmp_path / "in.jsonl", rows), tmp_path / "clean.jsonl"
    batch(model, source, clean, max_new_tokens=20)
    loader = Loader(str(model.folder), str(tmp_path / "pids"))
    killed = []

    def advance(_):
        pids = (tmp_path / "pids").read_text().split()
        if not killed:
            killed.append(int(pids[0]))
            os.kill(killed[0], signal.SIGKILL)

    runner = ray_runner(loader, n_workers=2, batch_size=4, n_cpus=0.25)

    def watched(task, items, results, progress):
        runner(task, items, results, lambda n: (progress(n), advance(n)))

    try:
        done = batch(model, source, out, runner=watched, max_new_tokens=20)
    finally:
        ray.shutdown()
    assert killed and done.n_answered == 40
    assert out.read_bytes() == clean.read_bytes()
    assert len(set((tmp_path / "pids").read_text().split())) >= 3  # two, and one in its place


class Loader:
    """Loads the model in a worker, and writes down its process."""

    def __init__(self, folder, pids):
        self.folder, self.pids = folder, pids

    def __call__(self):
        import npllm

        with open(self.pids, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        return npllm.load(self.folder)
