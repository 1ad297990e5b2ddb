"""Regular expressions of an adapter: usual ones are taken, those of unbounded time refused."""

import time
from pathlib import Path

import pytest

from npllm import NpllmError
from npllm.checkpoints.adapters.patterns import check_patterns, matches_end, matches_whole

FILE = Path("adapter_config.json")
NAME = "model.layers.0.self_attn.qkv_proj"
USUAL = (
    r".*\.(qkv_proj|o_proj)",
    r"model\.layers\.\d+\.self_attn\..*",
    r"^(?!.*visual).*(?:q_proj|k_proj|v_proj).*",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:qkv_proj|o_proj)))",
    r"layers\.[+*{?]\.x",
)
ENDLESS = (
    r"(a+)+b",
    r"(.*)*x",
    r"(\w|\d)+!",
    r"(?:.+){1,}z",
    r"((.*)*)x",
    "a" + ".*" * 6 + "!",
    "x?" * 17 + "!",
    "(" * 200 + "a" + ")" * 200 + "*",
    "x" * 4001,
    r"[]a)]*(a+)+b",
)


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_expressions_are_taken(pattern):
    check_patterns(FILE, [pattern])


@pytest.mark.parametrize("pattern", ENDLESS)
def test_an_expression_that_may_take_unbounded_time_is_refused(pattern):
    with pytest.raises(NpllmError, match=r"adapter_config.json: .*list the names") as caught:
        check_patterns(FILE, [pattern])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("pattern", ["(", "*a", "[z-a]", "a{99999999999}", r"(?P<x>a)(?P<x>b)"])
def test_what_does_not_compile_is_refused(pattern):
    with pytest.raises(NpllmError, match="regular expression"):
        check_patterns(FILE, [pattern])


def test_too_many_are_refused():
    with pytest.raises(NpllmError, match="2001"):
        check_patterns(FILE, ["a"] * 2001)


def test_the_slowest_that_is_taken_ends_within_seconds():
    pattern = ".*" * 5 + "!"
    check_patterns(FILE, [pattern])
    start = time.process_time()
    assert not matches_whole(pattern, NAME)
    assert time.process_time() - start < 2  # 3 ms, and a few hundred modules


def test_many_that_repeat_are_refused_and_many_names_are_taken():
    with pytest.raises(NpllmError, match="25 repetitions"):
        check_patterns(FILE, [".*.*.*.*.*!"] * 5)
    check_patterns(FILE, [rf"model\.layers\.{n}\.self_attn\.qkv_proj" for n in range(500)])


def test_an_end_begins_behind_a_dot():
    assert matches_end("qkv_proj", NAME)
    assert matches_end(r"layers\.0\..*", NAME)
    assert not matches_end("kv_proj", NAME)
    assert not matches_end("qkv", NAME)
