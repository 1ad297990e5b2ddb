"""Old module paths still import, and give the objects at the new paths."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import npllm

ROOT = Path(__file__).resolve().parents[1]
MOVED = {  # a sample of the table, written out: old path, name in it, new path
    "npllm.bert_config": ("BertConfig", "npllm.config.bert_config"),
    "npllm.checkpoint": ("phi3_layout", "npllm.checkpoints"),
    "npllm.fetch": ("fetch", "npllm.checkpoints.fetch"),
    "npllm.tokenizer": ("Tokenizer", "npllm.text.tokenizer"),
    "npllm.beam": ("beam_search", "npllm.decoding.beam"),
    "npllm.score": ("windows", "npllm.analysis.score"),
    "npllm.cost": ("counting_ops", "npllm.analysis.cost"),
    "npllm.language_model": ("Model", "npllm.model"),
    "npllm.causal_lm": ("CausalLM", "npllm.forward_pass"),
    "npllm.testing.judgement": ("output_status", "npllm.testing.diagnosis_status"),
    "npllm.profile": ("machine_limits", "npllm.analysis.profiling"),
    "npllm.kernels.tiled": ("TILED", "npllm.kernels.cpu.tiled"),
    "npllm.decoding.sampling": ("choose", "npllm.decoding.sampler_chain"),
    "npllm.testing.row_budgets": ("linear_budget", "npllm.testing.reduction_budgets"),
    "npllm.kernels.parts": ("linear", "npllm.kernels.cpu.dispatch"),
    "npllm.quantization": ("quantize", "npllm.quantize_to_gguf"),
    "npllm.ops.mask.dense": ("sliding_window", "npllm.ops.mask.causal_and_window"),
    "npllm.analysis.cost.kv_cache": ("kv_cache_bytes", "npllm.analysis.cost.cache_bytes"),
}
SPLIT = {  # of npllm.report
    "checkpoint_facts": "npllm.analysis.inspect",
    "int8_errors": "npllm.analysis.inspect",
    "machine_facts": "npllm.analysis.machine",
    "peak_memory": "npllm.analysis.machine",
    "next_tokens": "npllm.analysis.predictions",
    "score_facts": "npllm.analysis.predictions",
    "attention_rows": "npllm.analysis.steps",
    "compare_sets": "npllm.analysis.speed",
    "generate_timed": "npllm.analysis.speed",
    "speed": "npllm.analysis.speed",
    "cost_lines": "npllm.cli.layout",
    "profile_lines": "npllm.cli.layout",
    "set_lines": "npllm.cli.layout",
}


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_is_the_module_at_the_new_one(old):
    name, new = MOVED[old]
    module = importlib.import_module(new)
    assert importlib.import_module(old) is module
    assert module.__name__ == module.__spec__.name == new
    assert hasattr(module, name)


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("old", ["npllm.report", "npllm.analysis.report"])
def test_a_split_module_finds_each_name_where_it_went(old, name):
    if SPLIT[name].startswith("npllm.cli"):
        pytest.importorskip("click")
    found = getattr(importlib.import_module(old), name)
    assert found is getattr(importlib.import_module(SPLIT[name]), name)
    assert found.__module__ == SPLIT[name]


def test_a_name_that_is_nowhere_is_named_with_the_old_path():
    with pytest.raises(AttributeError, match=r"module 'npllm.report' has no attribute 'nonsense'"):
        importlib.import_module("npllm.report").nonsense  # noqa: B018
    with pytest.raises(ImportError, match="nonsense"):
        from npllm.report import nonsense  # noqa: F401
    with pytest.raises(AttributeError, match=r"module 'npllm' has no attribute 'nonsense'"):
        npllm.nonsense  # noqa: B018


def test_a_path_that_never_existed_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"npllm\.nonsense"):
        importlib.import_module("npllm.nonsense")


def test_old_paths_work_before_the_new_ones_are_imported():
    """In a process of their own, in which `import npllm` alone ran."""
    code = "import npllm\nprint(npllm.report.peak_memory() > 0, npllm.profile.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "npllm.analysis.profiling"]
