"""`npllm batch`: every row answered as if alone, whatever happened before."""

import codecs
import copy
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import optional
import pytest
import served
import test_encoder

import npllm
from npllm.analysis.score import score
from npllm.batch import answers as answers_module
from npllm.batch import results as results_module
from npllm.batch import run as batch_run
from npllm.batch.ray_engine import Worker
from npllm.batch.results import Results
from npllm.batch.run import batch
from npllm.batch.tasks import make_task
from npllm.cache import owner
from npllm.checkpoints.sentence_settings import SentenceSettings
from npllm.errors import NpllmError, NpllmRuntimeError, NpllmTypeError, NpllmValueError
from npllm.models.sentence import Dense, Head, Normalize
from npllm.ops import mask as masks
from npllm.text.tokenizer import Tokenizer

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
    assert done == (20, 20, 0, 0, None, 0)
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


UNWRITABLE = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "[" * 300 + "]" * 300]


@pytest.mark.parametrize("x", UNWRITABLE)
@pytest.mark.parametrize("place", ['{"prompt": "a", "x": %s}', '{"prompt": "a", "x": [{"y": %s}]}'])
def test_a_row_that_could_not_be_written_again_is_an_error_row(model, tmp_path, out, place, x):
    bad = place % x
    rows = prompts(3)
    done = batch(model, write(tmp_path / "in", [bad, *rows]), out, max_new_tokens=1)
    assert (done.n_answered, done.n_failed, len(read(out))) == (3, 1, 3)
    (error,) = read(done.errors)
    assert error["row"] == bad
    assert ("levels deep" if x[0] == "[" else "finite") in error["error"]


@pytest.mark.parametrize(
    "row", [{}, {"prompt": "hello", "result": 1}, {"prompt": ""}, {"x": 1.5}, "[1]", "{", '"\xe9"']
)
def test_the_errors_hold_what_was_read(model, tmp_path, out, row):
    done = batch(model, write(tmp_path / "in", [row]), out)
    assert [error["row"] for error in read(done.errors)] == [row]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(model, tmp_path, out, newline):
    rows = [json.dumps(row).encode() for row in prompts(2)]
    (tmp_path / "in").write_bytes(codecs.BOM_UTF8 + newline.join([*rows, codecs.BOM_UTF8]))
    done = batch(model, tmp_path / "in", out, max_new_tokens=1)
    assert (done.n_answered, done.n_failed) == (2, 1)  # elsewhere it is no mark
    (tmp_path / "in").write_bytes(codecs.BOM_UTF8)
    assert batch(model, tmp_path / "in", out)[:4] == (0, 0, 0, 0)


def test_bytes_that_are_no_text_are_kept_as_escapes(model, tmp_path, out):
    (tmp_path / "in").write_bytes(b'{"prompt": "\xff"}')
    done = batch(model, tmp_path / "in", out)
    assert read(done.errors)[0]["row"] == '{"prompt": "\\xff"}'


def test_a_number_of_an_answer_that_is_not_finite_is_null(model, tmp_path, out, monkeypatch):
    """A token of probability 0."""
    rows = [{"text": "hello w"}, {"text": "hello hello"}]
    scored = score(model, "hello w")
    never = scored._replace(log_probs=np.full_like(scored.log_probs, -np.inf))
    monkeypatch.setattr(
        answers_module, "score_batches", lambda _, ids: enumerate([never] * len(ids))
    )
    batch(model, write(tmp_path / "in", rows), out, task="score")
    for one in results(read(out)):
        assert (one["log_probability"], one["perplexity"]) == (None, None)
    assert batch(model, tmp_path / "in", out, task="score").n_reused == 2


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"task": "sing"}, NpllmValueError),
        ({"task": "embed"}, NpllmTypeError),
        ({"task": "score", "temperature": 1}, NpllmTypeError),
        ({"temperature": -1}, NpllmValueError),
        ({"colour": 1}, NpllmTypeError),
        ({"num_beams": 2}, NpllmTypeError),
        ({"num_return_sequences": 2}, NpllmTypeError),
        ({"top_logprobs": 2}, NpllmTypeError),
        ({"tools": []}, NpllmTypeError),
        ({"task": "chat", "attention_mask": [[1]]}, NpllmTypeError),
        ({"return_dict_in_generate": True}, NpllmTypeError),
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


# ------------------------------------------------------------------------------ the user's files


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refused(model, source, out, match, **options):
    """Nothing on disk changes."""
    folder = Path(out).resolve().parent
    before = contents(folder)
    with pytest.raises(NpllmError, match=match):
        batch(model, source, out, **options)
    assert contents(folder) == before


def test_an_input_that_would_be_overwritten_or_removed_is_refused(model, tmp_path, monkeypatch):
    parts = tmp_path / "q.jsonl.parts"
    parts.mkdir()
    for name in ("q.errors.jsonl", "q.jsonl.parts/in.jsonl", "q.jsonl"):
        write(tmp_path / name, prompts(1))
        refused(model, tmp_path / name, tmp_path / "q.jsonl", "the input")
        monkeypatch.chdir(parts)
        refused(model, f"../{name}", tmp_path / "q.jsonl", "the input")
        (tmp_path / "link").symlink_to(tmp_path / name)
        refused(model, tmp_path / "link", tmp_path / "q.jsonl", "the input")
        (tmp_path / "link").unlink()
        os.link(tmp_path / name, tmp_path / "link")
        if "parts" not in name:
            refused(model, tmp_path / "link", tmp_path / "q.jsonl", "the input")
        (tmp_path / "link").unlink()
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("out.jsonl", "dear diary"),
        ("out.jsonl", '{"hash": "1", "result": 1}'),
        ("out.jsonl", '{"hash": "1", "result": {"text": NaN}}'),
        ("out.errors.jsonl", "dear diary"),
        ("out.errors.jsonl", '{"line": 1, "error": "", "row": {}}\n{"line": 1}'),
        ("out.errors.jsonl", ""),
        ("out.errors.jsonl/a", ""),
        ("out.jsonl/a", ""),
        ("out.jsonl.parts/thesis.txt", "chapter 1"),
        ("out.jsonl.parts/thesis.jsonl", '["key", {}]'),
        ("out.jsonl.parts/journal.jsonl", "dear diary"),
        ("out.jsonl.parts/journal.jsonl", "5\n"),
        ("out.jsonl.parts/journal.jsonl", '["hash", 5]\n'),
        ("out.jsonl.parts", "a file"),
    ],
)
def test_files_of_others_are_refused_and_stay(model, tmp_path, name, content):
    source, file = write(tmp_path / "in.jsonl", ["{", *prompts(1)]), tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content, encoding="utf-8")
    refused(model, source, tmp_path / "out.jsonl", str(file.name).split(".")[0])


def test_only_files_of_the_run_are_removed(model, tmp_path, out):
    """Also what a killed worker left; a file that came meanwhile stays."""
    parts = Path(f"{out}.parts")
    parts.mkdir()
    key = "0" * 32
    (parts / f".shard-{key}.jsonl.{key}").write_text('["', encoding="utf-8")

    def runner(task, items, results, advance):
        (parts / "notes").write_text("mine", encoding="utf-8")
        results.add_shard([])
        batch_run.run_here(task, items, results, advance)

    batch(model, write(tmp_path / "in", prompts(1)), out, max_new_tokens=1, runner=runner)
    assert contents(parts) == {"notes": b"mine"} and len(read(out)) == 1


def test_outputs_that_differ_in_their_suffix_have_files_of_errors_of_their_own():
    names = [Results(Path(name)).errors.name for name in ("q", "q.json", "q.jsonl")]
    assert names == ["q.errors", "q.errors.json", "q.errors.jsonl"]


def test_the_lock_is_held_until_the_parts_are_removed(out, monkeypatch):
    """A run that begins at any step of the removal loses nothing."""
    ended, begun = Results(out).open(), []
    ended.add([("key", {"text": "x"})])
    unlink, rmdir = Path.unlink, Path.rmdir

    def begin():
        monkeypatch.undo()
        with pytest.raises(NpllmRuntimeError, match="another run"):
            Results(out).open()
        monkeypatch.setattr(Path, "rmdir", rmdir_beside_another)

    def unlink_late(path, **options):
        if path.name == "journal.jsonl":
            begin()
        unlink(path, **options)

    def rmdir_beside_another(path):
        monkeypatch.undo()
        begun.append(Results(out).open())
        rmdir(path)

    monkeypatch.setattr(Path, "unlink", unlink_late)
    ended.finish([], [])
    (new,) = begun
    new.add([("new", {"text": "y"})])
    new.close()
    again = Results(out).open()
    assert again.found == {"new": {"text": "y"}}
    again.close()


def test_a_journal_that_was_removed_while_it_was_opened_is_opened_again(out, monkeypatch):
    """The other run ends between `open` and the lock."""
    first = Results(out).open()
    mine = results_module.lock
    monkeypatch.setattr(results_module, "lock", lambda *args: first.finish([], []) or mine(*args))
    monkeypatch.setattr(first, "finish", lambda *_: end_once(first))
    second = Results(out).open()
    second.add([("key", {})])
    second.close()
    assert (Path(f"{out}.parts") / "journal.jsonl").read_text() == '["key", {}]\n'


def end_once(results):
    if results._journal is not None:
        Results.finish(results, [], [])


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
    again = batch(model, source, out, max_new_tokens=3)
    assert (again.n_answered, again.n_reused, again.n_dropped) == (0, 4, 0)
    other = batch(model, source, out, max_new_tokens=4)
    assert (other.n_answered, other.n_reused, other.n_dropped) == (4, 0, 4)
    assert batch(model.with_ops(), source, out, max_new_tokens=4)[1:3] != (0, 0)


def edited(model, place=-2, change=1):
    """The same model; one entry of its last weight is another."""
    params = model.params
    weight = np.array(params.lm_head)
    weight.reshape(-1)[place] += change
    return model._on_params(params._replace(lm_head=weight))


def in_float16(model):
    """The same model; keys and values are kept in float16."""
    other = model.with_mask(model.mask)
    other.cache_dtype = "float16"
    return other


def with_tokens(model, changed=(), **options):
    old = model.tokenizer
    tokens = old.special_tokens | dict(changed)
    return model.with_tokenizer(Tokenizer(old.backend, old.chat_template, tokens, **options))


VARIANTS = {
    "mask": lambda model: model.with_mask(masks.sliding_window(2)),
    "wider mask": lambda model: model.with_mask(masks.sliding_window(3)),
    "masks": lambda model: model.with_mask([masks.sliding_window(2), masks.causal()]),
    "one weight": edited,
    "dtype of the cache": in_float16,
    "begin of text": lambda model: with_tokens(model, add_bos_token=True),
    "special tokens": lambda model: with_tokens(model, {"unk_token": "h"}),
}


def test_the_path_of_a_model_is_no_part_of_an_answer(model, tmp_path, out, monkeypatch):
    """A relative path, a link, and a copy of the folder."""
    source = write(tmp_path / "in", prompts(2))
    batch(model, source, out, max_new_tokens=1)
    monkeypatch.chdir(model.folder.parent)
    (tmp_path / "link").symlink_to(model.folder)
    shutil.copytree(model.folder, tmp_path / "copy")
    for folder in (model.folder.name, tmp_path / "link", tmp_path / "copy"):
        again = batch(npllm.load(folder), source, out, max_new_tokens=1)
        assert again[1:3] == (0, 2), folder


UNNAMED = {
    "operation": lambda model: model.with_ops(silu=np.tanh),
    "function": lambda model: model.with_mask(masks.Rule(lambda i, j: j <= i)),
}


@pytest.mark.parametrize("name", [*VARIANTS, *UNNAMED])
def test_answers_of_another_model_are_not_taken_over(model, tmp_path, out, name):
    other = (VARIANTS | UNNAMED)[name](model)
    source = write(tmp_path / "in", prompts(2))
    batch(model, source, out, max_new_tokens=1)
    assert batch(other, source, out, max_new_tokens=1)[1:3] == (2, 0)
    again = batch(other, source, out, max_new_tokens=1)
    assert again[1:3] == ((2, 0) if name in UNNAMED else (0, 2))
    assert batch(model, source, out, max_new_tokens=1)[1:3] == (2, 0)


def test_vectors_of_another_encoder_are_not_taken_over(encoder):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((70, encoder.config.hidden_size)).astype(np.float32)
    changed = weight.copy()
    changed[1, 1] += 1
    heads = [Head(), Head(("max",)), Head(dimension=3), Head(modules=(Normalize(),))]
    heads += [
        Head(modules=(Dense(x, None, name),))
        for x, name in ((weight, "Tanh"), (weight, "ReLU"), (changed, "Tanh"))
    ]
    settings = [SentenceSettings(head) for head in heads]
    settings.append(SentenceSettings(prompts={"p": "a "}, default_prompt_name="p"))
    settings.append(SentenceSettings(prompts={"p": "b "}, default_prompt_name="p"))
    keys = set()
    for one in settings:
        variant = copy.copy(encoder)
        variant.settings = one
        hashed = make_task("embed", variant).settings
        assert hashed == make_task("embed", copy.copy(variant)).settings
        keys.add(json.dumps(hashed))
    assert len(keys) == len(settings)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8], ids=str)
def test_every_entry_of_every_weight_is_hashed(dtype, monkeypatch):
    """In every band, whether rows lie side by side or not."""
    monkeypatch.setattr(owner, "BAND_BYTES", 64)
    x = np.arange(210).reshape(15, 14).astype(dtype)
    found = {owner.content_hash((x, None)), owner.content_hash((None, x))}
    assert owner.content_hash((np.asfortranarray(x), None)) in found
    for i in range(x.size):
        changed = x.copy()
        changed.reshape(-1)[i] = 77 if x.reshape(-1)[i] != 77 else 78
        found.add(owner.content_hash((changed, None)))
    assert len(found) == x.size + 2
    for shape in ((), (0,), (3, 0)):
        assert owner.content_hash((np.zeros(shape, dtype),)) not in found


def test_a_chat_template_that_writes_the_date_is_answered_anew_each_day(model):
    template = "{{ strftime_now('%d') }}"
    dated = model.with_tokenizer(
        Tokenizer(model.tokenizer.backend, template, model.tokenizer.special_tokens)
    )
    assert make_task("chat", model).settings["date"] is None
    assert make_task("generate", dated).settings["date"] is None
    assert make_task("chat", dated).settings["date"] == datetime.date.today().isoformat()


@pytest.mark.parametrize(
    "options", [{"logits_processors": [max]}, {"min_new_tokens": np.int64(1)}], ids=str
)
def test_options_that_cannot_be_hashed_are_refused(model, tmp_path, options):
    source = write(tmp_path / "in", prompts(1))
    refused(model, source, tmp_path / "out.jsonl", "options?", **options)


def test_a_worker_with_another_model_answers_nothing(model, out):
    """What a Ray actor does, without Ray."""
    task = make_task("generate", model, max_new_tokens=2)
    results = Results(out).open()
    rows = {"key": np.array(["k"]), "ids": np.array([[1, 2]])}
    for change, n_answers in ((lambda same: same, 1), *((x, 0) for x in VARIANTS.values())):
        loaded = change(model)
        worker = Worker(lambda loaded=loaded: loaded, "generate", task.options, out, task.settings)
        answered = worker(rows)
        results.read_shards()
        assert len(results.found) == n_answers
        assert ("another model" in answered["error"][0]) == (not n_answers)
        results.found.clear()
        for shard in results.parts.glob("shard*"):
            shard.unlink()
    results.close()


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
