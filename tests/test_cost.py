"""The formulas of npllm.analysis.cost against a run that counts, number by number, and against what
is known of real checkpoints.
"""

import json
import math

import family
import numpy as np
import pytest
import tiny
from gguf_files import write_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from optional import invoke

import npllm
from npllm.analysis import cost
from npllm.checkpoints.phi3_layout import expected_shapes

WINDOWS = st.sampled_from([None, 1, 2, 3, 4, 6, 40])


@st.composite
def contents(draw):
    """A config.json of any shape: MHA, GQA and MQA, tied or not, windows, partial RoPE, Llama with
    biases.
    """
    n_kv_head, group, d_head = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        4 * draw(st.integers(1, 2)),
    )
    changes = {
        "num_key_value_heads": n_kv_head,
        "num_attention_heads": n_kv_head * group,
        "head_dim": d_head,
        "hidden_size": draw(st.integers(1, 24)),
        "intermediate_size": draw(st.integers(1, 20)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(8, 40)),
        "tie_word_embeddings": draw(st.booleans()),
        "sliding_window": draw(WINDOWS),
        "torch_dtype": draw(st.sampled_from(["float32", "bfloat16", "float64"])),
        "partial_rotary_factor": draw(st.sampled_from([1.0, 0.5])),
    }
    if draw(st.booleans()):
        changes |= {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "sliding_window": ...,
            "partial_rotary_factor": 1.0,
            "attention_bias": draw(st.booleans()),
            "mlp_bias": draw(st.booleans()),
            "original_max_position_embeddings": ...,
        }
    return tiny.config_dict(**changes)


def counted(content):
    """A model that counts, and its counts."""
    ops, costs = cost.counting_ops()
    model = family.model(content, content["torch_dtype"])
    return npllm.Model(model.config, model.params, ops=ops), costs


def ids_of(config, n_batch, n_seq):
    return np.random.default_rng(0).integers(0, config.vocab_size, (n_batch, n_seq))


@settings(max_examples=40)
@given(content=contents(), n_batch=st.integers(1, 3), n_seq=st.integers(1, 12), data=st.data())
def test_a_pass_without_cache_costs_what_the_formula_says(content, n_batch, n_seq, data):
    model, costs = counted(content)
    n_logits = data.draw(st.integers(1, n_seq))
    model(ids_of(model.config, n_batch, n_seq), logits_to_keep=n_logits)
    assert costs == cost.forward_cost(model.config, n_seq, n_batch=n_batch, n_logits=n_logits)


@pytest.mark.parametrize("dtype", ["int8", "int4", "bfloat16"])
def test_rounded_weights_count_as_they_are_held(tmp_path, dtype):
    sizes = {"hidden_size": 64, "intermediate_size": 256, "torch_dtype": "float32"}
    model = npllm.load(tiny.write_folder(tmp_path, **sizes), dtype=dtype)
    check_counts(model, dtype=dtype)
    odd = npllm.load(tiny.write_folder(tmp_path / "odd"), dtype=dtype)
    check_counts(odd, dtype=dtype)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ["phi3", "llama"])
def test_the_weights_of_a_gguf_file_count_as_it_stores_them(tmp_path, arch, tied):
    kinds = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q8_0", "output": "F16"}
    path, found = write_tiny(
        tmp_path / "x.gguf", arch, lambda name: kinds.get(name.split(".")[-2], "Q4_K"), tied=tied
    )
    check_counts(npllm.load(path), weights=cost.gguf_weight_bytes(path))
    facts = json.loads(invoke(["cost", "-m", str(path), "--context", "9", "--json"]).stdout)
    assert facts["weight_bytes"] == sum(raw.nbytes for raw, _, _ in found.values())
    as_float = ["cost", "-m", str(path), "--context", "9", "--json", "--dtype", "float32"]
    facts = json.loads(invoke(as_float).stdout)
    assert facts["weight_bytes"] == 4 * sum(wide.size for _, wide, _ in found.values())


def check_counts(model, **how):
    """Count a prefill and a decode step of a model, and compare with the formulas."""
    ops, costs = cost.counting_ops()
    counting = npllm.Model(model.config, model.params, ops=ops)
    cache, ids = counting.new_cache(2), ids_of(model.config, 2, 8)
    counting(ids[:, :7], cache=cache, logits_to_keep=1)
    assert costs == cost.prefill_cost(model.config, 7, n_batch=2, **how)
    costs.clear()
    counting(ids[:, 7:], cache=cache)
    assert costs == cost.decode_cost(model.config, 7, n_batch=2, **how)


@settings(max_examples=40)
@given(
    content=contents(),
    n_batch=st.integers(1, 3),
    n_prompt=st.integers(1, 20),
    chunk=st.integers(1, 20),
    n_new=st.integers(1, 4),
)
def test_prefill_and_decode_cost_what_the_formulas_say(content, n_batch, n_prompt, chunk, n_new):
    model, costs = counted(content)
    cache, ids = model.new_cache(n_batch), ids_of(model.config, n_batch, n_prompt + n_new)
    with family.prefill_chunk(chunk):
        model(ids[:, :n_prompt], cache=cache, logits_to_keep=1)
    assert costs == cost.prefill_cost(model.config, n_prompt, n_batch=n_batch, chunk=chunk)
    for n_past in range(n_prompt, n_prompt + n_new):
        costs.clear()
        model(ids[:, n_past : n_past + 1], cache=cache)
        assert costs == cost.decode_cost(model.config, n_past, n_batch=n_batch)


@settings(max_examples=20)
@given(content=contents(), n_batch=st.integers(1, 2), n=st.integers(1, 8))
def test_producing_n_tokens_costs_what_the_closed_sums_say(content, n_batch, n):
    model, costs = counted(content)
    ids, cache = ids_of(model.config, n_batch, n), model.new_cache(n_batch)
    for i in range(n):
        model(ids[:, i : i + 1], cache=cache)
    cached = cost.total(costs).flops
    costs.clear()
    for i in range(n):
        model(ids[:, : i + 1], logits_to_keep=1)
    assert (cached, cost.total(costs).flops) == cost.uncached_flops(
        model.config, n, n_batch=n_batch
    )
    assert n == 1 or cached < cost.total(costs).flops


@given(content=contents())
def test_parameters_are_those_of_the_checkpoint(content):
    config = npllm.Config.from_json(content)
    counts, parts = (
        cost.parameter_counts(config),
        dict.fromkeys(("embedding", "attention", "mlp", "norms", "lm_head"), 0),
    )
    for name, shape in expected_shapes(config).items():
        part = next(
            part
            for part, key in (
                ("norms", "norm"),
                ("attention", "self_attn"),
                ("mlp", "mlp"),
                ("lm_head", "lm_head"),
                ("embedding", "embed_tokens"),
            )
            if key in name
        )
        parts[part] += math.prod(shape)
    assert counts == parts


@given(n_seq=st.integers(1, 30), n_past=st.integers(0, 30), window=WINDOWS)
def test_visible_pairs_are_those_of_the_mask(n_seq, n_past, window):
    rule = npllm.ops.mask.causal() if window is None else npllm.ops.mask.sliding_window(window)
    i, j = np.arange(n_past, n_past + n_seq)[:, None], np.arange(n_past + n_seq)[None, :]
    assert cost.visible_pairs(n_seq, n_past, window) == rule(i, j).sum()


@settings(max_examples=30)
@given(content=contents(), n_batch=st.integers(1, 3), n=st.integers(1, 40))
def test_the_kv_cache_holds_what_the_formula_says(content, n_batch, n):
    """At the last step attention is given the keys and values of every token that the last query
    sees.
    """
    model, held = family.model(content, content["torch_dtype"]), []

    def attention(q, k, v, **options):
        held.append(k.nbytes + v.nbytes)
        return npllm.ops.attention(q, k, v, **options)

    model = npllm.Model(
        model.config, model.params, ops=npllm.ops.reference.replace(attention=attention)
    )
    cache, ids = model.new_cache(n_batch), ids_of(model.config, n_batch, n)
    if n > 1:
        model.model(ids[:, :-1], cache=cache)
    held.clear()
    model.model(ids[:, -1:], cache=cache)
    itemsize = 8 if content["torch_dtype"] == "float64" else 4
    assert sum(held) == cost.kv_cache_bytes(
        model.config, n, n_batch=n_batch, window=model.config.sliding_window, itemsize=itemsize
    )
    assert sum(held) <= cache.n_bytes


@pytest.mark.parametrize(
    ("name", "n_head", "n_kv_head", "n_layer", "parameters"),
    [("phi-3-mini", 32, 32, 32, 3_821_079_552), ("phi-3-medium", 40, 10, 40, 13_960_238_080)],
)
def test_published_sizes(name, n_head, n_kv_head, n_layer, parameters):
    d_model, d_ff = (3072, 8192) if name == "phi-3-mini" else (5120, 17920)
    config = npllm.Config.from_json(
        tiny.config_dict(
            hidden_size=d_model,
            intermediate_size=d_ff,
            num_hidden_layers=n_layer,
            num_attention_heads=n_head,
            num_key_value_heads=n_kv_head,
            vocab_size=32064,
            max_position_embeddings=4096,
            original_max_position_embeddings=4096,
            torch_dtype="bfloat16",
        )
    )
    assert sum(cost.parameter_counts(config).values()) == parameters
    # the rule of thumb: 2 operations for each parameter that multiplies something, a token
    step = cost.total(cost.decode_cost(config, 1))
    assert 1.0 < step.flops / (2 * (parameters - 32064 * d_model)) < 1.01
    assert (
        1.0 < step.bytes / (2 * (parameters - 32064 * d_model)) < 1.01
    )  # each weight read once, in bfloat16
    table = cost.kv_table(config, 4096, itemsize=2)
    assert table["gqa"]["full"] == 2 * n_layer * n_kv_head * d_model // n_head * 4096 * 2
    assert table["mha"]["full"] == table["mqa"]["full"] * n_head


@settings(max_examples=20)
@given(content=contents(), n=st.integers(2, 30))
def test_a_batch_reads_the_weights_once(content, n):
    config = npllm.Config.from_json(content)
    one, eight = (cost.total(cost.decode_cost(config, n, n_batch=b)) for b in (1, 8))
    tables = cost.decode_cost(config, n)["rope_tables"].flops
    assert eight.flops - tables == 8 * (one.flops - tables)
    assert eight.bytes < 8 * one.bytes
    assert eight.intensity > one.intensity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_seq": 0}, "n_seq = 0"),
        ({"n_seq": 3, "n_past": -1}, "n_past = -1"),
        ({"n_seq": 3, "n_logits": 4}, "n_logits = 4"),
        ({"n_seq": 60, "n_past": 5}, "60 new tokens do not fit: the context length .* is 64"),
        ({"n_seq": 1, "n_batch": 0}, "n_batch = 0"),
        ({"n_seq": 1, "dtype": "int3"}, "dtype must be one of"),
    ],
)
def test_impossible_sizes_raise(options, message):
    with pytest.raises(npllm.NpllmError, match=message):
        cost.forward_cost(npllm.Config.from_json(tiny.config_dict()), **options)


def test_a_classifier_is_refused_by_name():
    config = npllm.Config.from_json(
        tiny.config_dict(architectures=["Phi3ForSequenceClassification"])
    )
    with pytest.raises(npllm.NpllmError, match="Phi3ForSequenceClassification"):
        cost.parameter_counts(config)


def test_the_command_works_from_config_json_alone(tmp_path):
    tiny.write_json(tmp_path / "config.json", tiny.config_dict(sliding_window=8))
    for path in (tmp_path, tmp_path / "config.json"):
        result = invoke(["cost", "-m", str(path), "--context", "20", "--batch", "2", "--json"])
        assert result.exit_code == 0, result.output
        facts = json.loads(result.stdout)
        config = npllm.Config.from_json(tmp_path)
        assert facts == json.loads(json.dumps(cost.cost_facts(config, 20, n_batch=2)))
        assert facts["decode_step"]["flops"] < facts["decode_step_uncached"]["flops"]
        assert (
            facts["kv_cache_bytes"]
            == facts["kv_cache"]["gqa"]["window"]
            < facts["kv_cache"]["gqa"]["full"]
            < facts["kv_cache"]["mha"]["full"]
        )
        assert facts["whole_run"]["ratio"] > 1
    result = invoke(["cost", "-m", str(tmp_path), "--context", "20"])
    assert result.exit_code == 0
    for word in (
        "parameters",
        "embedding",
        "prefill",
        "decode",
        "KV cache",
        "MQA",
        "window",
        "FLOPs/byte",
        "uncached",
    ):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--context", "64"], 1),
        (["--context", "0"], 2),
        (["--batch", "0"], 2),
        (["--dtype", "x"], 2),
    ],
)
def test_the_command_refuses_what_does_not_fit(tmp_path, arguments, code):
    tiny.write_json(tmp_path / "config.json", tiny.config_dict())
    result = invoke(["cost", "-m", str(tmp_path), *arguments])
    assert (result.exit_code, result.stdout) == (code, "")
    assert "Traceback" not in result.stderr
    assert code == 2 or "max_position_embeddings = 64" in result.stderr
