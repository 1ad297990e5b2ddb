"""Constraints in generate, stream and beam search: from the caller and from generation_config.json,
beside Transformers' generate on the same folder.
"""

import numpy as np
import optional
import pytest
from close import close
from tiny import (
    CONFIG,
    SETTINGS,
    Scripted,
    byte_level,
    model,
    random_ids,
    write_folder,
)

import npllm
from npllm.decoding import beam, last_logits
from npllm.errors import NpllmTypeError, NpllmValueError

torch = optional.module("torch")
transformers = optional.module("transformers")

N_VOCAB = CONFIG["vocab_size"]
IDS = random_ids(2, 6, n_vocab=12)
OPTIONS = [
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[17], [51, 42], [42, 23, 23], [2]]},
    {"suppress_tokens": [*range(3, 50)]},
    {"begin_suppress_tokens": [*range(50)]},
    {"min_new_tokens": 9, "suppress_tokens": [*range(6, 58)]},
    {"forced_eos_token_id": 9},
    {"forced_eos_token_id": [9, 10], "repetition_penalty": 1.4},
    {"num_beams": 3},
    {"num_beams": 4, "no_repeat_ngram_size": 2, "min_new_tokens": 5, "length_penalty": 2.0},
    {"num_beams": 2, "early_stopping": True, "forced_eos_token_id": 2, "suppress_tokens": [4]},
]


def folder(path, generation, **changes):
    changes = {"eos_token_id": [2, 3], "pad_token_id": 0} | changes
    shared = {name: changes[name] for name in ("eos_token_id", "pad_token_id")}
    return write_folder(path, generation=shared | generation, **changes)


@pytest.mark.live
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_answer_is_that_of_transformers(tmp_path, options):
    path = folder(tmp_path, options)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        want = theirs.generate(torch.tensor(IDS), max_new_tokens=12, do_sample=False).numpy()
    m = npllm.load(path)
    close(m.generate(IDS, max_new_tokens=12), want)
    plain = npllm.load(folder(tmp_path / "plain", {}))
    assert plain.generate(IDS, max_new_tokens=12).tolist() != want.tolist(), "it does something"


@pytest.mark.parametrize("options", [o for o in OPTIONS if "length_penalty" not in o], ids=str)
def test_the_caller_and_the_file_say_the_same(tmp_path, options):
    from_file = npllm.load(folder(tmp_path / "with", options))
    plain = npllm.load(folder(tmp_path / "plain", {}))
    file_only = {"early_stopping"}
    given = {name: value for name, value in options.items() if name not in file_only}
    if not file_only & set(options):
        close(
            from_file.generate(IDS, max_new_tokens=9),
            plain.generate(IDS, max_new_tokens=9, **given),
        )
    off = {"num_beams": 1, "repetition_penalty": 1.0} | {
        name: 0 if "size" in name or "min" in name else []
        for name in given
        if name not in ("num_beams", "repetition_penalty")
    }
    close(from_file.generate(IDS, max_new_tokens=9, **off), plain.generate(IDS, max_new_tokens=9))


def test_the_cache_and_company_change_no_token():
    m, options = model(eos_token_id=None), {"no_repeat_ngram_size": 2, "bad_words_ids": [[5, 7]]}
    mask = np.array([[0, 0, 1, 1, 1, 1], [1] * 6])
    both = m.generate(IDS, attention_mask=mask, max_new_tokens=15, **options)
    without = m.generate(IDS, attention_mask=mask, max_new_tokens=15, use_cache=False, **options)
    close(without, both)
    alone = m.generate(IDS[:1, 2:], max_new_tokens=15, **options)
    close(both[:1, 6:], alone[:, 4:])


def test_padding_is_no_token_that_may_not_come_twice():
    """Under padding stands the id that the model prefers."""
    m = Scripted([9, 9], [10, 10])
    ids, mask = np.array([[9, 9, 70], [70, 71, 72]]), np.array([[0, 0, 1], [1, 1, 1]])
    got = m.generate(ids, attention_mask=mask, max_new_tokens=2, no_repeat_ngram_size=1)
    assert got[0, 3] == 9 and got[0, 4] != 9 and got[1, 3] == 10 and got[1, 4] != 10


def test_beams_follow_the_same_rules(tmp_path):
    m = npllm.load(folder(tmp_path, {"no_repeat_ngram_size": 1, "suppress_tokens": [4, 5]}))
    answers = m.beam_search(IDS, num_beams=4, num_return_sequences=4, max_new_tokens=10).sequences
    for prompt, row in zip(IDS, answers, strict=True):
        for answer in row[:, IDS.shape[1] :].tolist():
            tokens = [i for i in answer if i != 0]
            assert len(set(tokens)) == len(tokens) and not {*tokens} & {4, 5, *prompt.tolist()}


# ------------------------------------------------------------------------- functions of the caller


def test_a_function_of_the_caller_sees_all_ids_and_changes_the_logits():
    seen = []

    def only_even(ids, logits):
        seen.append(ids)
        return np.where(np.arange(logits.shape[-1]) % 2 == 0, logits, -np.inf).astype(logits.dtype)

    m = model(eos_token_id=None)
    got = m.generate(IDS, max_new_tokens=8, logits_processors=[only_even])
    assert (got[:, 6:] % 2 == 0).all() and (m.generate(IDS, max_new_tokens=8)[:, 6:] % 2).any()
    assert [ids.shape[1] for ids in seen] == [*range(6, 14)]
    close(seen[-1], got[:, :-1])
    drawn = m.generate(
        IDS, max_new_tokens=8, logits_processors=[only_even], temperature=2.0, seed=1
    )
    assert (drawn[:, 6:] % 2 == 0).all()
    beams = m.beam_search(IDS, max_new_tokens=8, logits_processors=[only_even]).sequences
    assert (beams[:, :, 6:] % 2 == 0).all()


def test_functions_run_in_their_order_behind_the_constraints():
    calls = []

    def first(_, logits):
        calls.append(("first", float(logits[0, 5])))
        return logits + np.float32(1)

    def second(_, logits):
        calls.append(("second", float(logits[0, 5])))
        logits[:] = 0  # a copy: nothing that anyone else sees
        return logits

    model().generate(IDS, max_new_tokens=1, suppress_tokens=[5], logits_processors=(first, second))
    assert calls == [("first", -np.inf), ("second", -np.inf)]


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (lambda *_: None, NpllmTypeError, "must return a NumPy array of float32, got NoneType"),
        (lambda _, x: x.astype(np.float64), NpllmTypeError, "float32, got float64"),
        (lambda _, x: x[:, :-1], NpllmValueError, r"= \[2, 61\], got \[2, 60\]"),
        (lambda _, x: x * np.float32(np.nan), NpllmValueError, "logits after logits_processors"),
        (lambda _, x: x - np.float32(np.inf), NpllmValueError, "logits after logits_processors"),
    ],
)
def test_what_is_no_logits_is_refused(function, error, words):
    with pytest.raises(error, match=words):
        model().generate(IDS, logits_processors=[function])


@pytest.mark.parametrize("given", [5, ["x"], "x", [None]])
def test_what_is_no_function_is_refused(given):
    with pytest.raises(NpllmTypeError, match="logits_processors must be functions"):
        model().generate(IDS, logits_processors=given)


def test_constraints_that_leave_no_token_say_which():
    with pytest.raises(NpllmValueError, match="logits after suppress_tokens = "):
        model().generate(IDS, suppress_tokens=[*range(N_VOCAB)])


# ----------------------------------------------------------------------------- beams and stop strings


def test_beams_do_not_stream_and_do_not_sample(tmp_path):
    path = folder(tmp_path, {"num_beams": 3}, vocab_size=272)
    byte_level().save(str(path / "tokenizer.json"))
    m = npllm.load(path)
    with pytest.raises(NpllmValueError, match="num_beams = 3 gives answers as a whole"):
        m.stream("hello")
    assert "".join(m.stream("hello", max_new_tokens=3, num_beams=1)) == m.generate(
        "hello", max_new_tokens=3, num_beams=1
    )
    with pytest.raises(NpllmValueError, match="num_beams = 3 with sampling is not implemented"):
        m.generate("hello", temperature=0.5)


def test_generate_with_beams_is_the_best_of_the_beam_search(tmp_path):
    changes = {"vocab_size": 272, "max_position_embeddings": 100}
    m = npllm.load(write_folder(tmp_path, tokenizer=byte_level(), settings=SETTINGS, **changes))
    texts = ["hello", "hello world"]
    best = [row[0]["text"] for row in m.beam_search(texts, num_beams=3, max_new_tokens=8)]
    assert m.generate(texts, num_beams=3, max_new_tokens=8) == best
    assert m.generate(texts[0], num_beams=3, max_new_tokens=8) == best[0]
    ids = random_ids(2, 5)
    beams = m.beam_search(ids, num_beams=3, max_new_tokens=8)
    close(m.generate(ids, num_beams=3, max_new_tokens=8), beams.sequences[:, 0])


def test_stop_strings_of_the_file_are_those_of_the_caller():
    m = Scripted("one two three", stop_strings=["two"])
    assert m.generate("x") == "one "
    m = Scripted("one two three", stop_strings="thr")
    assert m.generate("x") == "one two " and m.n_calls < 13
    m = Scripted("one two three", stop_strings=["two"])
    assert m.generate("x", stop="thr") == "one two "
    m = Scripted("one two three", stop_strings=["two"])
    assert m.generate("x", stop=[], max_new_tokens=13) == "one two three"


def test_a_beam_ends_with_a_stop_string(tmp_path, monkeypatch):
    changes = {"vocab_size": 272, "max_position_embeddings": 100, "eos_token_id": None}
    m = npllm.load(write_folder(tmp_path, tokenizer=byte_level(), settings=SETTINGS, **changes))
    whole = m.beam_search("hello", num_beams=3, num_return_sequences=3, max_new_tokens=12)
    letter = whole[0]["text"][4]
    found = m.beam_search(
        "hello", num_beams=3, num_return_sequences=3, max_new_tokens=12, stop=letter
    )
    assert all(letter not in answer["text"] for answer in found)
    assert any(len(answer["text"]) < 12 for answer in found)
    calls = []
    monkeypatch.setattr(
        beam, "last_logits", lambda *a, **o: calls.append(1) or last_logits(*a, **o)
    )
    options = {"num_beams": 1, "max_new_tokens": 12, "early_stopping": True}
    m.beam_search("hello", **options, stop=m.beam_search("hello", **options)[0]["text"][2])
    assert len(calls) < 12 + 12, "the search itself ends at the stop string, not only its text"


# ---------------------------------------------------------------------------------- NumPy's numbers


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 5, "do_sample": True, "temperature": 0.5, "top_k": 20, "seed": 3},
        {"max_new_tokens": 5, "top_p": 0.75, "min_p": 0.25, "seed": 3, "use_cache": False},
        {"max_new_tokens": 5, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 5, "suppress_tokens": [4, 5], "forced_eos_token_id": 7},
        {"max_new_tokens": 5, "min_new_tokens": 4, "num_beams": 2, "bad_words_ids": [[5, 6]]},
    ],
    ids=str,
)
def test_numpy_scalars_are_numbers_in_every_option(options):
    m = model()
    close(m.generate(IDS, **of_numpy(options)), m.generate(IDS, **options))


def of_numpy(value):
    """The same with NumPy's scalars in place of Python's numbers."""
    if isinstance(value, dict):
        return {name: of_numpy(one) for name, one in value.items()}
    if isinstance(value, list):
        return [of_numpy(one) for one in value]
    kind = {bool: np.bool_, int: np.int64, float: np.float32}[type(value)]
    return kind(value)


def test_numpy_scalars_are_numbers_outside_of_generate_too():
    m, half = model(), np.float32(0.5)
    beams = m.beam_search(
        IDS,
        num_beams=np.int32(3),
        num_return_sequences=np.int8(2),
        max_new_tokens=np.uint8(5),
        length_penalty=half,
        early_stopping=np.bool_(True),
    )
    want = m.beam_search(
        IDS,
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=5,
        length_penalty=0.5,
        early_stopping=True,
    )
    close(beams.sequences, want.sequences)
    close(m(IDS, logits_to_keep=np.int64(2)), m(IDS)[:, -2:])
    assert m.new_cache(np.int64(2)).n_batch == 2
    given = {"temperature": half, "top_k": np.int64(9), "top_p": np.float64(0.5), "min_p": half}
    plain = {name: value.item() for name, value in given.items()}
    got = m.next_token_distribution(IDS, **given)
    close(got, m.next_token_distribution(IDS, **plain))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_scalar_of_numpy_does_not_widen_logits(kind):
    logits, seen = (
        np.random.default_rng(0).standard_normal((2, 9)).astype(np.float32),
        np.ones(9) > 0,
    )
    for y in (
        npllm.ops.temperature(logits, kind(0.5)),
        npllm.ops.temperature(logits, kind(1e-9)),
        npllm.ops.repetition_penalty(logits, seen, kind(1.5)),
        npllm.ops.top_p(logits, kind(0.5)),
        npllm.ops.min_p(logits, kind(0.5)),
        npllm.ops.top_k(logits, np.int64(3)),
    ):
        assert y.dtype == np.float32
    close(npllm.ops.temperature(logits, kind(0.5)), logits * 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", np.float64(5)),
        ("max_new_tokens", np.bool_(True)),
        ("top_k", np.float32(5)),
        ("temperature", np.float32(-1)),
        ("seed", np.int64(-1)),
        ("use_cache", 1),
        ("do_sample", "yes"),
    ],
)
def test_scalars_of_the_wrong_kind_are_refused_as_python_numbers_are(name, value):
    with pytest.raises(NpllmValueError, match=f"{name} must be "):
        model().generate(IDS, **{name: value})
