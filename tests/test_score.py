"""Scoring: log-probabilities by their definition, windows that score each token once, perplexity as
Transformers' model has it.
"""

import json
import math
import os
import time
from pathlib import Path

import family
import numpy as np
import pytest
import tiny
from close import close
from hypothesis import given, settings
from hypothesis import strategies as st
from optional import invoke
from seeds import draws

import npllm
from npllm.analysis.packing import score_packed
from npllm.analysis.score import perplexity, score, windows

TEXT = Path(__file__).parent / "data" / "american-speeches.txt"


def naive(model, ids):
    """Each token after all before it: one forward pass for each, and a softmax written out."""
    result = []
    for n in range(1, len(ids)):
        row = model(np.array([ids[:n]]))[0, -1].tolist()
        result.append(
            row[ids[n]] - max(row) - math.log(math.fsum(math.exp(x - max(row)) for x in row))
        )
    return np.array(result)


@pytest.fixture(scope="module")
def model():
    return family.model(tiny.config_dict())


@given(n=st.integers(0, 200), max_length=st.integers(2, 50), data=st.data())
def test_windows_score_every_token_but_the_first_once(n, max_length, data):
    stride = data.draw(st.integers(1, max_length - 1))
    cuts = windows(n, max_length, stride)
    assert [t for cut in cuts for t in range(cut.first, cut.stop)] == list(range(1, n))
    for cut in cuts:
        assert 0 <= cut.start < cut.first < cut.stop <= n
        assert cut.stop - cut.start <= max_length
        assert (
            cut.start == 0 or cut.first - cut.start >= max_length - stride
        )  # so much context, at least
        assert cut.start % stride == 0


@settings(max_examples=15)
@given(n=st.integers(2, 30), seed=st.integers(0, 99))
def test_scores_are_log_probabilities_after_everything_before(model, n, seed):
    ids = family.ids_of(model.config, (n,), seed)
    scored = score(model, ids)
    close(scored.log_probs, naive(model, ids))
    close(scored.log_probs, score_packed(model, [ids])[0])
    assert scored.total == pytest.approx(sum(scored.log_probs), rel=1e-12)
    assert scored.perplexity == pytest.approx(math.exp(-scored.total / (n - 1)), rel=1e-12)
    assert list(scored.ids) == list(ids)


@settings(max_examples=draws(6, 15))
@given(n=st.integers(2, 50), max_length=st.integers(2, 20), data=st.data())
def test_a_token_is_scored_in_the_first_window_that_holds_it(model, n, max_length, data):
    stride, ids = data.draw(st.integers(1, max_length - 1)), family.ids_of(model.config, (n,), n)
    expected = [
        naive(model, ids[cut.start : cut.stop])[cut.first - cut.start - 1 :]
        for cut in windows(n, max_length, stride)
    ]
    close(
        score(model, ids, max_length=max_length, stride=stride).log_probs, np.concatenate(expected)
    )


def test_logits_are_taken_in_blocks_of_rows_and_nothing_is_lost_between_them(model, monkeypatch):
    ids = family.ids_of(model.config, (60,))
    whole = score(model, ids).log_probs
    for rows in (1, 7, 59, 60):
        monkeypatch.setattr("npllm.analysis.score.ROWS", rows)
        close(score(model, ids).log_probs, whole)


def test_probabilities_of_all_continuations_sum_to_one(model):
    prompt, n_vocab = [5, 9, 11], model.config.vocab_size
    total = sum(math.exp(score(model, [*prompt, t]).log_probs[-1]) for t in range(n_vocab))
    assert total == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(
    ("log_probs", "expected"),
    [([math.log(1 / 8)] * 5, 8), ([0.0], 1), ([-np.inf, -1], math.inf), ([-2000.0], math.inf)],
)
def test_perplexity(log_probs, expected):
    assert perplexity(np.array(log_probs)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ([5], {}, "at least 2 tokens .* got 1"),
        ([], {}, "got 0"),
        ([5.0, 6.0], {}, "integers \\[n\\], got float64 \\[2\\]"),
        ([[5, 6]], {}, "got int64 \\[1, 2\\]"),
        ([5, 99, 5], {}, "0 ... vocab_size - 1 = 60, got 5 ... 99"),
        ([5, 6], {"max_length": 65}, "at most the context length .* = 64, got 65"),
        ([5, 6], {"max_length": 1}, "max_length = 1"),
        (
            [5, 6],
            {"max_length": 8, "stride": 8},
            "windows overlap, got max_length = 8 and stride = 8",
        ),
        ([5, 6], {"stride": 0}, "stride = 0"),
        ("text", {}, "no tokenizer.json"),
    ],
)
def test_what_cannot_be_scored_raises(model, text, options, message):
    with pytest.raises(npllm.NpllmError, match=message):
        score(model, text, **options)


def test_perplexity_of_nothing_raises():
    with pytest.raises(npllm.NpllmError, match="at least one token, got none"):
        perplexity(np.array([]))


# ------------------------------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    backend = tiny.byte_level()
    return tiny.write_folder(
        tmp_path_factory.mktemp("score") / "tiny",
        tokenizer=backend,
        settings=tiny.SETTINGS,
        vocab_size=backend.get_vocab_size(),
    )


def test_score_prints_every_token_and_the_whole(folder):
    model = npllm.load(folder)
    facts = json.loads(invoke(["score", "-m", str(folder), "hello world", "--json"]).stdout)
    scored = score(model, "hello world")
    assert (
        [row["id"] for row in facts["tokens"]]
        == model.tokenizer.encode("hello world")
        == list(scored.ids)
    )
    assert [row["log_probability"] for row in facts["tokens"]] == [None, *scored.log_probs]
    assert (facts["log_probability"], facts["perplexity"]) == (scored.total, scored.perplexity)
    result = invoke(["score", "-m", str(folder), "hello world"])
    assert len(result.stdout.splitlines()) == len(scored.ids) + 1
    assert f"{scored.log_probs[0]:.4f}" in result.stdout


def test_perplexity_reads_a_file_or_standard_input(folder, tmp_path):
    (tmp_path / "text.txt").write_text("hello world, hello " * 10, encoding="utf-8")
    command = ["perplexity", "-m", str(folder), "--max-length", "16", "--stride", "4"]
    facts = json.loads(invoke([*command, str(tmp_path / "text.txt"), "--json"]).stdout)
    scored = score(npllm.load(folder), "hello world, hello " * 10, max_length=16, stride=4)
    assert facts["perplexity"] == scored.perplexity
    assert facts["scored_tokens"] == facts["tokens"] - 1 == len(scored.log_probs)
    assert facts["tokens_per_second"] == pytest.approx(facts["scored_tokens"] / facts["seconds"])
    assert facts["bits_per_byte"] == pytest.approx(-scored.total / math.log(2) / 190)
    result = invoke(command, input="hello world, hello " * 10)
    assert result.exit_code == 0
    assert f"perplexity {scored.perplexity:.4f}" in result.stdout
    assert "tokens/s" in result.stderr and "tokens/s" not in result.stdout


def test_a_file_that_is_no_text_is_named(folder, tmp_path):
    (tmp_path / "bytes").write_bytes(b"ab\xff")
    for name, message in (
        ("bytes", "not UTF-8 text (invalid start byte at byte 2)"),
        ("none", "cannot be read (No such file or directory)"),
    ):
        result = invoke(["perplexity", "-m", str(folder), str(tmp_path / name)])
        assert (result.exit_code, result.stdout) == (1, "")
        assert f"{name}: " in result.stderr and message in result.stderr


# ---------------------------------------------------------------------------------------------------- the default checkpoint


def hf_perplexity(model, ids, max_length, stride):
    """The algorithm of Transformers' documentation in torch, every token weighed alike."""
    import torch

    losses, previous = [], 1
    for start in range(0, len(ids), stride):
        stop = min(start + max_length, len(ids))
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:stop]]), use_cache=False).logits[0]
        n = stop - previous
        losses.append(
            torch.nn.functional.cross_entropy(
                logits[-n - 1 : -1], torch.tensor(ids[stop - n : stop]), reduction="none"
            )
        )
        previous = stop
        if stop == len(ids):
            break
    return float(torch.exp(torch.cat(losses).double().mean())), sum(map(len, losses))


@pytest.mark.live
@pytest.mark.filterwarnings("ignore")
def test_perplexity_of_a_public_domain_text_is_that_of_transformers(default_model):
    if os.environ.get("NPLLM_REQUIRE_LIVE") != "1":
        pytest.importorskip(
            "torch", reason="compares with Transformers, and torch is not installed"
        )
    import torch
    import transformers

    torch.set_num_threads(1)
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        default_model.folder, dtype=torch.float32
    ).eval()
    ids = default_model.tokenizer.encode(TEXT.read_text("utf-8"))
    assert len(ids) > 2500
    expected, n = hf_perplexity(hf, ids, 1024, 768)
    begin = time.perf_counter()
    ours = score(default_model, ids, max_length=1024, stride=768)
    seconds = time.perf_counter() - begin
    assert n == len(ours.log_probs) == len(ids) - 1
    assert ours.perplexity == pytest.approx(expected, rel=1e-4)
    print(
        f"\nperplexity of {len(ids)} tokens: {ours.perplexity:.6f}, Transformers {expected:.6f}, {n / seconds:.0f} tokens/s"
    )
