#!/usr/bin/env python3
"""Check npllm on Microsoft's own weights, against the numbers that Transformers' test file
publishes.

    python scripts/check_real_phi3.py PATH

PATH is a folder with Phi-3-mini-4k-instruct or Phi-3-mini-128k-instruct.  The script compares
logits in float32 (weights as stored), and the greedy answer to one question.  Exit code 0: agrees;
1: differs, or PATH is another model.  Peak memory is little more than the weights.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np

import npllm
from npllm.arrays import BACKENDS, to_numpy
from npllm.config.config import Config
from npllm.config.strict_json import read_json
from npllm.errors import NpllmError, NpllmValueError
from npllm.loading import checkpoint_folder

Facts = dict[str, Any]
# Source: tests/models/phi3/test_modeling_phi3.py in Transformers: logits[0, :2, :30], compared
# there in float32 with assert_close(rtol=1e-4, atol=1e-4).  The file had other numbers earlier; the
# weights on the hub were replaced as well.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
INPUT_IDS = [1212, 318, 281, 1672, 2643, 290, 428, 318, 257, 1332]
SYSTEM = (
    "You are a helpful digital assistant. Please provide safe, ethical and accurate information "
    "to the user."
)
QUESTION = "Can you provide ways to eat combinations of bananas and dragonfruits?"
MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
PROMPT = f"<|system|> {SYSTEM}<|end|><|user|> {QUESTION}<|end|><|assistant|>"
NEAR_TIE = 0.01  # logits: a smaller margin may change sign with the order of summation


def _rows(text: str) -> list[list[float]]:
    return np.array(text.split(), dtype=float).reshape(2, 30).tolist()


PUBLISHED = {
    "Phi-3-mini-4k-instruct": {
        "logits": {
            "as published now": _rows("""
            8.9005 8.5380 12.0361 9.1562 7.4068 10.2581 7.8991 7.2447 7.0626 7.5760
            7.8315 9.4076 16.1104 20.1290 7.7500 7.1947 6.1550 7.0563 8.5344 8.7248
            7.1359 7.8237 7.6817 7.6395 7.7924 6.9702 6.9097 8.7074 9.5768 8.1145
            18.7090 18.5701 19.3660 21.5171 17.5042 17.8716 16.3554 17.4617 18.1623 16.5641
            17.7547 18.0193 23.8355 29.4481 16.3864 16.0560 16.1543 18.5507 18.1343 17.3883
            17.7422 17.3012 16.7657 17.6874 17.9067 16.8301 16.2719 18.3709 19.0318 16.7315
            """),
            "as published earlier": _rows("""
            0.9979 -1.9449 -2.5613 -2.2110 -0.9323 -2.2726 -3.2468 -2.0122 -1.0021 -1.2764
            -1.0876 -1.2358 3.9385 6.2152 -0.3695 -2.3285 -1.2907 -1.8238 -1.9941 -2.2098
            -0.6923 -1.6793 -1.1660 -2.0469 -0.7369 -1.4101 -1.4091 -3.1694 -1.8383 -1.1952
            3.0525 1.9178 3.7016 0.9263 0.3397 1.9584 2.1347 0.3482 1.3773 0.2153
            0.2798 0.8360 9.0936 11.4944 -0.3575 -0.9442 -0.1246 1.3869 0.9846 1.7243
            0.9150 1.0823 0.4313 1.5742 0.2566 -0.1401 -1.3019 0.4967 0.6941 0.7214
            """),
        },
        "text": "Certainly! Bananas and dragonfruits can be combined in various delicious ways. "
        "Here are some ideas for incorporating these fruits into your",
    },
    "Phi-3-mini-128k-instruct": {
        "logits": {
            "as published now": _rows("""
            10.6076 10.6499 14.0601 19.8499 15.1787 19.3717 19.9782 17.0394 15.7875 18.1403
            19.2748 12.6627 20.2804 24.5362 18.8105 15.3394 12.1219 15.9941 19.0679 16.4936
            17.0505 16.8738 17.3090 16.6572 16.8754 16.6912 15.1627 18.8721 19.6017 18.5513
            16.2141 18.7298 17.4216 21.9312 17.7606 17.6177 16.7766 17.9859 18.4132 17.4505
            18.6385 18.5396 23.6260 28.7443 16.1817 15.5148 16.0035 18.6652 18.3087 17.2960
            17.8223 17.7776 16.8686 17.4093 17.8037 17.2544 16.7231 18.6195 19.6784 16.6647
            """),
            "as published earlier": _rows("""
            1.8478 -0.5709 -1.6792 -1.2133 -0.7809 -0.8817 -2.0969 -1.1191 -0.7731 -1.0483
            -0.5961 -1.3067 3.1325 6.9442 -0.4803 -0.9154 -1.3085 -1.0822 -1.1433 -0.7660
            -0.8531 -0.9150 -0.6179 -1.6153 -0.2239 -1.3207 -1.1187 -2.4795 -1.4733 -0.4931
            3.5839 2.4722 3.7130 1.2032 0.7356 2.7777 2.5256 0.9157 1.6431 0.3533
            0.5100 1.3512 8.9873 10.9815 0.3530 0.1473 0.2051 1.8553 1.5988 2.2268
            1.1897 1.2829 0.7894 1.8895 0.7666 0.4122 -0.9316 0.9936 1.2722 0.8263
            """),
        },
        "text": "Certainly! Bananas and dragonfruits can be combined in various delicious and "
        "nutritious ways. Here are some creative and healthy",
    },
}
FORM = {"input_ids": INPUT_IDS, "messages": MESSAGES, "prompt": PROMPT}


def published_for(config: Config, folder: Path) -> tuple[str, Facts]:
    """Name the model and return what was published of it, by its sizes and its RoPE factors."""
    sizes = (
        config.model_type,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.vocab_size,
    )
    rope = config.rope_parameters
    if sizes == ("phi3", 3072, 32, 32, 32064):
        if config.max_position_embeddings == 4096 and rope.rope_type == "default":
            return "Phi-3-mini-4k-instruct", FORM | PUBLISHED["Phi-3-mini-4k-instruct"]
        # short_factor[0]: 1.05 in April 2024, 1.1 today, 1.0 in Phi-3.5
        if rope.rope_type == "longrope" and rope.short_factor[0] in (1.05, 1.1):
            return "Phi-3-mini-128k-instruct", FORM | PUBLISHED["Phi-3-mini-128k-instruct"]
    raise NpllmValueError(
        f"{folder}: is neither Phi-3-mini-4k-instruct nor Phi-3-mini-128k-instruct, the only "
        "models with published numbers: phi3, d_model 3072, 32 layers, 32 heads, n_vocab 32064, "
        "no RoPE scaling or longrope with a short_factor that begins with 1.05 or 1.1; "
        f"got {', '.join(map(str, sizes))}, {rope.rope_type}"
    )


def read_expected(path: str) -> Facts:
    """Read other expected numbers: {"logits": {name: rows}, "input_ids": [...], "messages": [...],
    "text": ..., "prompt": ...}.
    """
    expected = read_json(path)
    logits, ids = expected.get("logits"), expected.get("input_ids", INPUT_IDS)
    shapes = (
        {np.asarray(rows, dtype=object).shape for rows in logits.values()}
        if isinstance(logits, dict)
        else set()
    )
    if (
        not shapes
        or any(len(shape) != 2 or 0 in shape for shape in shapes)
        or not isinstance(ids, list)
    ):
        raise NpllmValueError(
            f'{path}: must be {{"logits": {{name: rows of numbers}}, "input_ids": [...]}}, and for '
            'the text "messages" and "text"'
        )
    return FORM | {"prompt": None, "text": None} | expected


def compare_logits(model: npllm.Model, expected: Facts) -> list[Facts]:
    """Compare the first rows of logits with every published version; returns one row of the table
    for each.
    """
    hidden = model.model(np.array([expected["input_ids"]]))
    n_row = max(len(rows) for rows in expected["logits"].values())
    logits = to_numpy(model.lm_head(hidden[:, :n_row]))[0].astype(np.float64)
    return [
        _compare(name, logits, np.array(rows, dtype=np.float64))
        for name, rows in expected["logits"].items()
    ]


def _compare(name: str, logits: np.ndarray, want: np.ndarray) -> Facts:
    got = logits[: want.shape[0], : want.shape[1]]
    if got.shape != want.shape:
        raise NpllmValueError(
            f"expected logits are {list(want.shape)}, but the model gives {list(got.shape)}"
        )
    error, allowed = np.abs(got - want), TOLERANCE["atol"] + TOLERANCE["rtol"] * np.abs(got)
    worst = int(np.argmax(np.where(np.isnan(error), math.inf, error - allowed)))
    return {
        "check": f"logits, {name}",
        "error": float(error.flat[worst]),
        "allowed": float(allowed.flat[worst]),
        "verdict": "agrees" if (error <= allowed).all() else "differs",
    }


def compare_text(model: npllm.Model, expected: Facts) -> Facts:
    """Check that the published answer is the greedy one.

    The error is the largest margin between the best logit and that of the published token.
    """
    row = {"check": "greedy answer", "error": None, "allowed": NEAR_TIE}
    if expected["text"] is None or model.tokenizer is None:
        return row | {"verdict": "skipped: no text to compare, or no tokenizer.json"}
    prompt = model.tokenizer.encode_chat(expected["messages"])
    if (
        expected["prompt"] is not None
        and model.tokenizer.decode(prompt, skip_special_tokens=False) != expected["prompt"]
    ):
        return row | {
            "verdict": "skipped: this folder's chat template writes another prompt than the "
            "published one"
        }
    answer = model.tokenizer.encode(expected["text"], add_special_tokens=False)
    hidden = model.model(np.array([prompt + answer]))
    logits = to_numpy(model.lm_head(hidden[:, len(prompt) - 1 : -1]))[0].astype(np.float64)
    lack = logits.max(axis=-1) - logits[np.arange(len(answer)), answer]
    if (lack <= NEAR_TIE).all():
        return row | {"error": float(lack.max()), "verdict": "agrees"}
    at = int(np.argmax(~(lack <= NEAR_TIE)))
    ours = model.tokenizer.decode([*answer[:at], int(logits[at].argmax())])
    return row | {"error": float(lack[at]), "verdict": f"differs, at token {at}: {ours[-60:]!r}"}


def check(model: npllm.Model, expected: Facts) -> Facts:
    """Compare everything; the model agrees when one published version of the logits does and the
    text does not differ.
    """
    logits, text = compare_logits(model, expected), compare_text(model, expected)
    agrees = any(row["verdict"] == "agrees" for row in logits) and not text["verdict"].startswith(
        "differs"
    )
    return {"checks": [*logits, text], "agrees": agrees}


@click.command()
@click.argument("path")
@click.option(
    "--expected", "expected_file", type=click.Path(), help="Other published numbers: a json file."
)
@click.option("--backend", type=click.Choice(BACKENDS), default="numpy", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(path: str, expected_file: str | None, backend: str, as_json: bool) -> None:
    """Check npllm on Microsoft's own weights in the folder PATH."""
    try:
        folder = checkpoint_folder(path)
        config = Config.from_json(folder)
        name, expected = (
            (folder.name, read_expected(expected_file))
            if expected_file
            else published_for(config, folder)
        )
        result = {"model": name, "folder": str(folder)} | check(
            npllm.load(folder, backend=backend), expected
        )
    except NpllmError as error:
        click.echo(f"check_real_phi3: {error}", err=True)
        sys.exit(1)
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False, indent=2))
    else:
        click.echo(f"{name}\n{'check':<32} {'error':>10} {'allowed':>10}  verdict")
        for row in result["checks"]:
            error = "-" if row["error"] is None else f"{row['error']:.2e}"
            click.echo(f"{row['check']:<32} {error:>10} {row['allowed']:>10.2e}  {row['verdict']}")
        click.echo("agrees with Transformers" if result["agrees"] else "DIFFERS from Transformers")
    sys.exit(0 if result["agrees"] else 1)


if __name__ == "__main__":
    main()
