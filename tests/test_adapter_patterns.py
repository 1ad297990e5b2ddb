"""Regular expressions of an adapter: usual ones are matched, those of unbounded time ended."""

import time
from pathlib import Path

import pytest

from npllm import NpllmError
from npllm.checkpoints.adapters import patterns
from npllm.checkpoints.adapters.patterns import matching_names

FILE = Path("adapter_config.json")
QKV, O_PROJ, LM_HEAD = (
    "model.layers.0.self_attn.qkv_proj",
    "model.layers.1.self_attn.o_proj",
    "lm_head",
)
NAMES = (QKV, O_PROJ, LM_HEAD)
USUAL = {
    r".*\.(qkv_proj|o_proj)": {QKV, O_PROJ},
    r"model\.layers\.\d+\.self_attn\..*": {QKV, O_PROJ},
    r"^(?!.*layers\.1).*(?:qkv_proj|o_proj).*": {QKV},
    r"(?:.*?(?:layers|text).*?(?:self_attn|mlp).*?(?:qkv_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:qkv_proj|down_proj)))": {QKV},
    r"lm_head": {LM_HEAD},
    r"lm.head": {LM_HEAD},
    r"qkv_proj": set(),
}
ENDLESS = (r"(a+)+b", r"(.*)*x", r"(.|.)" * 30 + "Z", ".*" * 12 + "!")


def test_usual_expressions_match_whole_names():
    found = matching_names(FILE, USUAL, NAMES)
    assert {text: set(names) for text, names in found.items()} == USUAL


def test_an_end_begins_behind_a_dot():
    cases = {
        "qkv_proj": {QKV},
        r"layers\.0\..*": {QKV},
        "kv_proj": set(),
        "qkv": set(),
        ".*": {*NAMES},
    }
    found = matching_names(FILE, cases, NAMES, ends=True)
    assert {text: set(names) for text, names in found.items()} == cases


@pytest.mark.parametrize("pattern", ENDLESS)
def test_an_expression_that_takes_too_long_is_ended(pattern, monkeypatch):
    monkeypatch.setattr(patterns, "DEADLINE", 0.5)
    start = time.monotonic()
    with pytest.raises(NpllmError, match=r"adapter_config.json: .*more than 0.5 s"):
        matching_names(FILE, ["a" * 100, pattern], [QKV, "a" * 40])
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("pattern", ["(", "*a", "[z-a]", "a{99999999999}", "(" * 5000])
def test_what_does_not_compile_is_refused(pattern):
    with pytest.raises(NpllmError, match="no regular expression") as caught:
        matching_names(FILE, [pattern], NAMES)
    assert len(str(caught.value)) < 500


def test_too_long_expressions_are_refused_and_many_names_need_no_process(monkeypatch):
    with pytest.raises(NpllmError, match="too long"):
        matching_names(FILE, ["(a)" * 400_000], NAMES)
    monkeypatch.setattr(patterns, "PROGRAM", "raise SystemExit")
    many = [rf"model\.layers\.{n}\.self_attn.qkv_proj" for n in range(500)]
    assert matching_names(FILE, many, NAMES)[many[0]] == {QKV}
    with pytest.raises(NpllmError, match="no process"):
        matching_names(FILE, ["(a)"], NAMES)
