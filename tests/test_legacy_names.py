"""Old spellings, and heads above an encoder: the same model as with today's names alone."""

import os
import warnings

import numpy as np
import pytest
import tiny
from close import close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_encoder import CONFIG, tensors, write
from test_llama import LLAMA

import npllm
from npllm.checkpoints import bert_layout
from npllm.config import legacy_names
from npllm.config.bert_config import BertConfig
from npllm.config.config import Config
from npllm.errors import NpllmValueError

WEIGHTS = tensors(BertConfig.from_json(CONFIG))
HEADS = {
    "cls.predictions.bias": np.zeros(16),
    "cls.predictions.decoder.weight": np.zeros((16, 12)),
    "cls.predictions.transform.LayerNorm.gamma": np.zeros(12),
    "cls.seq_relationship.weight": np.zeros((2, 12)),
}
CLASSIFIER = {"classifier.weight": np.zeros((3, 12)), "classifier.bias": np.zeros(3)}
OWN_HEAD = {"linear.weight": np.zeros((8, 12)), "crf.transitions": np.zeros((3, 3))}


def old(name):
    """The spelling of TensorFlow."""
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    )


def load(folder, weights):
    """Load an encoder; return it and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = npllm.load(write(folder, weights=weights))
    return model, [str(warning.message) for warning in caught]


def same(model, wanted):
    close(model.embed(["the cat"]), wanted.embed(["the cat"]), times=0)


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_gamma_and_beta_are_weight_and_bias(tmp_path, prefix):
    renamed = {prefix + old(name): x for name, x in WEIGHTS.items()}
    assert any("gamma" in name for name in renamed)
    model, warned = load(tmp_path / "old", renamed)
    assert warned == []
    same(model, load(tmp_path / "new", WEIGHTS)[0])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), prefix=st.sampled_from(["", "bert."]))
def test_any_mixture_of_spellings_gives_the_same_names(data, prefix):
    names = list(WEIGHTS)
    spelled = {prefix + (old(n) if data.draw(st.booleans()) else n): n for n in names}
    entries, head = bert_layout.split_off_head(dict.fromkeys(spelled))
    assert head == []
    assert list(bert_layout.rename_entries(entries)) == names


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("bert.", HEADS),
        ("bert.", CLASSIFIER),
        ("bert.", OWN_HEAD),
        ("", HEADS),
        ("", CLASSIFIER),
        ("", {"qa_outputs.weight": np.zeros((2, 12))}),
    ],
)
def test_a_head_is_left_out_and_one_line_says_so(tmp_path, prefix, head):
    weights = {prefix + name: x for name, x in WEIGHTS.items()}
    model, warned = load(tmp_path / "head", weights | head)
    (line,) = warned
    assert "not used: " in line and line.endswith(
        "they are a head of the model, and an encoder has none"
    )
    assert sorted(head)[0] in line and "\n" not in line
    same(model, load(tmp_path / "body", WEIGHTS)[0])


def test_a_head_of_its_own_without_the_prefix_is_unknown(tmp_path):
    with pytest.raises(NpllmValueError, match=r"unknown: crf\.transitions, linear\.weight"):
        load(tmp_path, WEIGHTS | OWN_HEAD)


@pytest.mark.parametrize(
    "names", [("embeddings.LayerNorm.gamma", ""), ("bert.embeddings.LayerNorm.bias", "bert.")]
)
def test_two_spellings_of_one_tensor_are_ambiguous(tmp_path, names):
    extra, prefix = names
    weights = {prefix + name: x for name, x in WEIGHTS.items()}
    twice = extra.removeprefix(prefix) if prefix else extra
    with pytest.raises(NpllmValueError, match=r"the tensors do not fit config.json; .*unknown"):
        load(tmp_path, weights | {twice: np.zeros(12)})


def test_a_file_of_a_head_alone_misses_the_encoder(tmp_path):
    with pytest.raises(NpllmValueError, match=r"missing: embeddings.LayerNorm.bias"):
        load(tmp_path, CLASSIFIER)


# --- config.json


def test_early_llama_names_its_architecture_otherwise():
    content = LLAMA | {"architectures": ["LLaMAForCausalLM"], "pad_token_id": -1}
    config = Config.from_json(content)
    assert config.architectures == ("LlamaForCausalLM",) and config.head == "lm"
    assert config.pad_token_id is None
    assert config == Config.from_json(LLAMA | {"pad_token_id": None})


@pytest.mark.parametrize("reader", [Config, BertConfig])
@pytest.mark.parametrize("pad", [-2, 1.5, True, "x"])
def test_other_padding_ids_are_still_refused(reader, pad):
    content = LLAMA if reader is Config else CONFIG
    with pytest.raises(NpllmValueError, match="pad_token_id"):
        reader.from_json(content | {"pad_token_id": pad})
    assert reader.from_json(content | {"pad_token_id": -1}).pad_token_id is None


@pytest.mark.parametrize("name", legacy_names.ROPE_TYPES)
def test_old_rope_types_are_longrope(name):
    rope = {"type": name, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    content = tiny.config_dict(rope_scaling=rope)
    wanted = tiny.config_dict(rope_scaling=rope | {"type": "longrope"})
    assert Config.from_json(content) == Config.from_json(wanted)


def test_no_old_name_is_a_name_of_today():
    for table in (
        legacy_names.ARCHITECTURES,
        legacy_names.ROPE_TYPES,
        legacy_names.TENSOR_ENDINGS,
        legacy_names.POOLINGS,
    ):
        assert not set(table) & set(table.values())


@pytest.mark.live
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head", [{}, HEADS, CLASSIFIER], ids=["none", "cls", "classifier"])
def test_transformers_reads_the_same_model(tmp_path, head):
    if os.environ.get("NPLLM_REQUIRE_LIVE") != "1":
        pytest.importorskip("torch")
    import torch
    import transformers

    weights = {old(f"bert.{name}"): x for name, x in WEIGHTS.items()} | head
    folder = write(tmp_path, weights=weights)
    theirs = transformers.BertModel.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    model = npllm.load(folder)
    ids = np.array([[2, 5, 6, 3]])
    with torch.no_grad():
        wanted = theirs(torch.as_tensor(ids)).last_hidden_state.numpy()
    close(model(ids), wanted, times=64)
