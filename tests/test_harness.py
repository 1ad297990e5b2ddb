"""`npllm eval` and the class that lm-eval calls, on local tasks; against lm-eval's own model "hf"."""

import contextlib
import importlib
import json
from types import SimpleNamespace

import numpy as np
import optional
import pytest
import tiny
from eval_tasks import TASKS, write_tasks

import npllm
from npllm.analysis.score import score
from npllm.checkpoints.fetch import fetch
from npllm.errors import MissingExtraError, NpllmTypeError, NpllmValueError
from npllm.evaluation import run
from npllm.evaluation.requests import generation_request

lm_eval = None
with contextlib.suppress(ImportError):
    lm_eval = importlib.import_module("lm_eval")
    lm_eval_tasks = importlib.import_module("lm_eval.tasks")
    NpllmLM = importlib.import_module("npllm.evaluation.harness").NpllmLM
if lm_eval is None and not optional.may_be_missing("lm_eval"):
    importlib.import_module("lm_eval")

needs_lm_eval = pytest.mark.skipif(lm_eval is None, reason="lm-eval is not installed")
SEEDS = {"bootstrap_iters": 0}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def checkpoint(tmp_path):
    vocab = tiny.byte_level().get_vocab_size()
    return tiny.write_folder(
        tmp_path / "m",
        tokenizer=tiny.byte_level(),
        settings=tiny.SETTINGS | {"bos_token": None, "eos_token": "</s>"},
        vocab_size=vocab,
        max_position_embeddings=256,
        original_max_position_embeddings=256,
    )


def request(*args):
    return SimpleNamespace(args=args)


# ------------------------------------------------------------------------------ without lm-eval


def test_generation_kwargs():
    asked = generation_request({"until": "\n", "max_gen_toks": 5, "do_sample": False}, 256)
    assert asked == (("\n",), 5, {"do_sample": False})
    asked = generation_request({"until": ["a", ""], "temperature": 0.5, "top_k": 3}, 7)
    assert asked == (("a",), 7, {"do_sample": True, "temperature": 0.5, "top_k": 3})
    asked = generation_request({"temperature": 0.0, "max_new_tokens": 4}, 7)
    assert asked == ((), 4, {"do_sample": False})
    assert generation_request({"do_sample": False, "temperature": 0.7}, 7)[2] == {
        "do_sample": False
    }


def test_unsupported_generation_kwargs_are_refused_by_name():
    with pytest.raises(NpllmValueError, match="penalty_alpha is not supported"):
        generation_request({"until": [], "penalty_alpha": 0.6}, 256)
    with pytest.raises(NpllmTypeError, match="must be a dict"):
        generation_request("until", 256)


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"\.\[eval\]"):
        run.evaluate(tiny.model(), ["local_choice"])


# --------------------------------------------------------------------------------- with lm-eval


@pytest.fixture
def lm(checkpoint):
    return NpllmLM(npllm.load(checkpoint), batch_size=4)


@pytest.mark.live
@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
class TestAlone:
    def test_a_log_likelihood_is_the_score_of_the_text(self, lm):
        model = lm.model
        (total, _), (other, _) = lm.loglikelihood(
            [request("hello world", " hello"), request("", "hello w")], disable_tqdm=True
        )
        for text, context, got in (
            ("hello world hello", "hello world", total),
            ("</s>hello w", "</s>", other),
        ):
            ids, n = model.tokenizer.encode(text), len(model.tokenizer.encode(context))
            scored = score(model, ids).log_probs[n - 1 :]
            assert got == pytest.approx(scored.sum(), abs=1e-4)

    def test_a_context_that_is_too_long_is_cut_on_the_left(self, checkpoint):
        lm = NpllmLM(str(checkpoint), max_length=10)
        with pytest.warns(UserWarning, match="1 of 2 inputs are longer than max_length = 10"):
            long, short = lm._loglikelihood_tokens(
                [(None, list(range(20, 40)), [7, 8]), (None, list(range(31, 40)), [7, 8])],
                disable_tqdm=True,
            )
        assert long == short
        with pytest.raises(NpllmValueError, match="at most max_length = 10"):
            lm._loglikelihood_tokens([(None, [7], [8] * 11)], disable_tqdm=True)

    def test_generation_stops_before_the_first_stop(self, checkpoint):
        lm = NpllmLM(str(checkpoint))
        length = {"max_gen_toks": 12, "min_new_tokens": 12}
        (whole,) = lm.generate_until([request("hello", length)], disable_tqdm=True)
        stop = whole[len(whole) // 2]
        asked = [
            request("hello", {"until": [stop], **length}),
            request("a longer prompt than the other", {"until": [], "max_gen_toks": 3}),
            request("hello", {"until": [], "temperature": 1.0, **length}),
        ]
        first, second, third = lm.generate_until(asked, disable_tqdm=True)
        assert first == whole.partition(stop)[0] != whole
        prompt = asked[1].args[0]
        assert second == lm.model.generate(prompt, max_new_tokens=3, do_sample=False)
        (again,) = NpllmLM(str(checkpoint)).generate_until(asked[2:], disable_tqdm=True)
        assert third == again != whole

    def test_a_prompt_that_is_too_long_is_cut_on_the_left(self, checkpoint):
        lm = NpllmLM(str(checkpoint), max_length=20)
        text = "abcdefghijklmnopqrstuvwxyz"
        with pytest.warns(UserWarning, match="a prompt of 26 tokens leaves no room for 8"):
            cut = lm.generate_until([request(text, {"max_gen_toks": 8})], disable_tqdm=True)
        kept = lm.generate_until([request(text[-12:], {"max_gen_toks": 8})], disable_tqdm=True)
        assert cut == kept
        with pytest.raises(NpllmValueError, match="less than max_length = 20, got 20"):
            lm.generate_until([request("a", {"max_gen_toks": 20})], disable_tqdm=True)

    def test_chat_template(self, lm):
        messages = [{"role": "user", "content": "hello"}]
        text = lm.apply_chat_template(messages)
        assert text == lm.model.tokenizer.apply_chat_template(messages)
        messages += [{"role": "assistant", "content": "well "}]
        assert lm.apply_chat_template(messages, False).endswith("<|assistant|>well")
        assert lm.chat_template(True) == tiny.CHAT_TEMPLATE
        assert "/" not in lm.tokenizer_name

    def test_what_cannot_be_evaluated(self, checkpoint):
        with pytest.raises(NpllmTypeError, match="dtype go with a path"):
            NpllmLM(npllm.load(checkpoint), dtype="float64")
        with pytest.raises(NpllmValueError, match="device must be \"cpu\", got 'cuda'"):
            NpllmLM(str(checkpoint), device="cuda")
        with pytest.raises(NpllmValueError, match=r"tokenizer\.json"):
            NpllmLM(tiny.model())

    def test_it_is_registered_by_name(self, checkpoint):
        from lm_eval.api.registry import get_model

        made = get_model("npllm").create_from_arg_string(f"pretrained={checkpoint},dtype=float64")
        assert isinstance(made, NpllmLM) and made.model.params.norm.dtype == np.float64


# ----------------------------------------------------------------------------- the runner and hf


def hf_model(**options):
    from lm_eval.models.huggingface import HFLM

    return HFLM(**options)


def samples(results, task):
    """What was answered to each request of each document of a task."""
    return [sample["resps"] for sample in results["samples"][task]]


def same(mine, theirs):
    for task in TASKS:
        ours, right = samples(mine, task), samples(theirs, task)
        if task == "local_generate":
            assert ours == right
            continue
        for got, want in zip(ours, right, strict=True):
            numbers = [np.ravel([x[0] for x in y]).astype(float) for y in (got, want)]
            flat = [np.array([float(np.ravel(x[0])[0]) for x in y]) for y in (got, want)]
            assert np.abs(flat[0] - flat[1]).max() < 1e-4 * max(1, np.abs(flat[1]).max()), numbers
    for task in TASKS:
        for name, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert mine["results"][task][name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.live
@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"num_fewshot": 2}, {"apply_chat_template": True}])
def test_results_are_those_of_the_model_hf(options, checkpoint, tmp_path):
    folder = write_tasks(tmp_path / "tasks")
    theirs = hf_model(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=3)
    manager = lm_eval_tasks.TaskManager(include_path=str(folder), include_defaults=False)
    how = {"tasks": list(TASKS), "task_manager": manager, **SEEDS, **options}
    mine = lm_eval.simple_evaluate(model=NpllmLM(str(checkpoint)), **how)
    same(mine, lm_eval.simple_evaluate(model=theirs, **how))


@pytest.mark.live
@pytest.mark.weights
@pytest.mark.slow
@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_the_default_model_gives_what_hf_gives(tmp_path):
    folder = write_tasks(tmp_path / "tasks")
    path = fetch()
    theirs = hf_model(pretrained=str(path), device="cpu", dtype="float32", batch_size=4)
    manager = lm_eval_tasks.TaskManager(include_path=str(folder), include_defaults=False)
    how = {"tasks": list(TASKS), "task_manager": manager, **SEEDS}
    mine = lm_eval.simple_evaluate(model=NpllmLM(npllm.load(path)), **how)
    same(mine, lm_eval.simple_evaluate(model=theirs, **how))


@pytest.mark.live
@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_the_command(checkpoint, tmp_path):
    folder = write_tasks(tmp_path / "tasks")
    args = ["eval", "--tasks", "local_choice", "-m", str(checkpoint), "--include-path", str(folder)]
    out = tmp_path / "out"
    result = optional.invoke([*args, "--limit", "3", "--output-path", str(out), "--num-fewshot=1"])
    assert result.exit_code == 0, result.output
    assert "|local_choice|" in result.stdout and "acc_norm" in result.stdout
    kept = json.loads((out / "results.json").read_text())
    assert kept["n-samples"]["local_choice"]["effective"] == 3
    assert kept["n-shot"]["local_choice"] == 1
    result = optional.invoke([*args, "--json"])
    facts = json.loads(result.stdout)
    assert 0 <= facts["results"]["local_choice"]["acc,none"] <= 1
    result = optional.invoke(["eval", "--tasks", "no_such_task", "-m", str(checkpoint)])
    assert result.exit_code == 1 and "no_such_task" in result.stderr
