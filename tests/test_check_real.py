"""scripts/check_real_phi3.py, with a tiny model that stands in for Microsoft's weights."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import tiny

import npllm
from npllm.config.config import Config
from npllm.errors import NpllmValueError

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "check_real_phi3.py"
spec = importlib.util.spec_from_file_location("check_real_phi3", SCRIPT)
testing = pytest.importorskip("click.testing")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

IDS = [10, 20, 30, 40]
MESSAGES = [{"role": "user", "content": "hello"}]
MINI = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": 2047,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_text_folder(
        tmp_path_factory.mktemp("tiny") / "stand-in", max_position_embeddings=512
    )


@pytest.fixture(scope="module")
def expected(folder):
    """What a trusted run of the model would have published: rounded to 4 digits."""
    model = npllm.load(folder, ops=npllm.ops.reference)
    logits = np.asarray(model(np.array([IDS])))[0, :2, :30]
    messages = [{"role": "user", "content": "hello"}]
    prompt = model.tokenizer.encode_chat(messages)
    ids = np.array([prompt])
    for _ in range(8):  # greedy, one readable token after the other
        last = np.array(model(ids, logits_to_keep=1)[0, -1])
        ids = np.concatenate([ids, [[last.argmax()]]], axis=1)
    text = model.tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=False)
    answer = text if model.tokenizer.encode(text) == ids[0, len(prompt) :].tolist() else None
    return {
        "input_ids": IDS,
        "logits": {"by hand": np.round(logits, 4).tolist()},
        "messages": messages,
        "text": answer,
    }


def run(folder, expected, *options):
    """Result of the script and its exit code."""
    path = folder.parent / "expected.json"
    path.write_text(json.dumps(expected), encoding="utf-8")
    return testing.CliRunner().invoke(script.main, [str(folder), "--expected", str(path), *options])


def test_a_right_model_agrees(folder, expected):
    result = run(folder, expected)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "agrees with Transformers" in result.stdout


def test_json_says_the_same(folder, expected):
    result = run(folder, expected, "--json")
    facts = json.loads(result.stdout)
    assert (facts["model"], facts["agrees"], facts["folder"]) == ("stand-in", True, str(folder))
    assert facts["checks"][0] | {"error": 0, "allowed": 0} == {
        "check": "logits, by hand",
        "error": 0,
        "allowed": 0,
        "verdict": "agrees",
    }


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 29)])
def test_one_wrong_logit_differs(folder, expected, row, column):
    """Every number counts, the last of the last row as well."""
    logits = [list(numbers) for numbers in expected["logits"]["by hand"]]
    logits[row][column] += 2e-3
    result = run(folder, expected | {"logits": {"wrong": logits}})
    assert result.exit_code == 1
    assert "DIFFERS" in result.stdout
    assert (
        run(
            folder, expected | {"logits": {"wrong": logits, "right": expected["logits"]["by hand"]}}
        ).exit_code
        == 0
    ), "one version suffices"


def test_a_logit_that_is_no_number_differs(folder, expected):
    assert run(folder, expected | {"logits": {"nan": [[float("nan")] * 30] * 2}}).exit_code == 1


class Greedy(tiny.Scripted):
    """Says what it is told to, through `model` and `lm_head`."""

    def model(self, input_ids, **_):
        return np.asarray(input_ids, dtype=np.float32)[..., None]

    def lm_head(self, hidden):
        told, logits = (
            self.script[0],
            np.zeros((1, hidden.shape[1], self.config.vocab_size), np.float32),
        )
        assert hidden.shape[1] <= len(told), "logits of more positions than the answer has"
        for position in range(hidden.shape[1]):
            logits[0, position, told[position]] = 1
        return logits


@pytest.mark.parametrize(
    ("text", "verdict"), [("a right answer", "agrees"), ("a right arrow", "differs, at token")]
)
def test_the_greedy_answer_counts(text, verdict):
    """It is checked at the positions of the answer only."""
    model = Greedy("a right answer")
    row = script.compare_text(model, {"text": text, "messages": MESSAGES, "prompt": None})
    assert row["verdict"].startswith(verdict)
    checks = script.check(
        model,
        {
            "text": text,
            "messages": MESSAGES,
            "prompt": None,
            "input_ids": [1],
            "logits": {"x": [[0.0]]},
        },
    )
    assert checks["agrees"] == (verdict == "agrees")


def test_a_prompt_of_another_template_is_not_compared():
    row = script.compare_text(
        Greedy("x"), {"text": "x", "messages": MESSAGES, "prompt": "<|system|> hello"}
    )
    assert row["verdict"].startswith("skipped: this folder's chat template")


def test_the_published_prompt_is_what_the_template_writes():
    tokenizer = npllm.Tokenizer.from_folder(
        SCRIPT.parents[1] / "tests" / "golden" / "tokenizers" / "phi-3-mini"
    )
    assert (
        tokenizer.decode(tokenizer.encode_chat(script.MESSAGES), skip_special_tokens=False)
        == script.PROMPT
    )


def test_without_tokenizer_the_text_is_left_out(expected, tmp_path):
    folder = tiny.write_folder(
        tmp_path / "bare",
        vocab_size=tiny.byte_level().get_vocab_size(),
        max_position_embeddings=512,
    )
    result = run(folder, expected)
    assert result.exit_code == 0
    assert "no tokenizer.json" in result.stdout


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "Phi-3-mini-4k-instruct"),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1.1] * 48,
                    "long_factor": [1.07] * 48,
                },
            },
            "Phi-3-mini-128k-instruct",
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "type": "su",
                    "short_factor": [1.05] * 48,
                    "long_factor": [1.03] * 48,
                },
            },
            "Phi-3-mini-128k-instruct",
        ),
    ],
)
def test_the_config_decides_which_numbers(changes, name):
    found, expected = script.published_for(
        Config.from_json(tiny.config_dict(**MINI | changes)), "folder"
    )
    assert found == name
    for rows in expected["logits"].values():
        assert np.shape(rows) == (2, 30)
    assert (expected["input_ids"][:3], expected["logits"]["as published now"][1][-1]) == (
        [1212, 318, 281],
        16.7315 if name.endswith("4k-instruct") else 16.6647,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {
            "hidden_size": 5120,
            "num_attention_heads": 40,
            "num_key_value_heads": 10,
            "num_hidden_layers": 40,
        },
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 48,
                "long_factor": [1.08] * 48,
            },
        },
        {"vocab_size": 32065},
    ],
    ids=["medium", "3.5-mini", "another vocabulary"],
)
def test_another_model_is_refused(changes):
    with pytest.raises(
        NpllmValueError, match="neither Phi-3-mini-4k-instruct nor Phi-3-mini-128k-instruct"
    ):
        script.published_for(Config.from_json(tiny.config_dict(**MINI | changes)), "folder")


def test_another_folder_is_refused_in_one_line(folder):
    result = testing.CliRunner().invoke(script.main, [str(folder)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("check_real_phi3: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"logits": []},
        {"logits": {"x": []}},
        {"logits": {"x": [[1], [1, 2]]}},
        {"logits": {"x": [[1.0]]}, "input_ids": 3},
    ],
)
def test_malformed_expectations_are_refused(folder, content):
    result = run(folder, content)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)


def test_expectations_wider_than_the_model_are_refused(folder):
    result = run(folder, {"input_ids": IDS, "logits": {"x": [[0.0] * 5000]}})
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "expected logits are [1, 5000]" in result.stderr
