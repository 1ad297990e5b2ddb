"""Golden values: what Hugging Face Transformers computed for tiny random models
(scripts/make_golden.py), without torch.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from close import close
from safetensors import safe_open
from tiny import write_folder

import npllm
from npllm import ops

FOLDER = Path(__file__).parent / "golden"
VARIANTS = ["mha", "gqa", "tied", "window"]


class Golden:
    """One file: about (versions, config), and its arrays under the names that the script gave them."""

    def __init__(self, variant, folder):
        with safe_open(FOLDER / f"{variant}.safetensors", framework="np") as file:
            self.about = json.loads(file.metadata()["about"])
            self.arrays = {name: file.get_tensor(name) for name in file.keys()}
        self.config = self.about["config"]
        self.folder = write_folder(folder, tensors=self.under("weight/"), **self.config)
        self.n_layer = self.config["num_hidden_layers"]

    def under(self, prefix):
        return {
            name.removeprefix(prefix): x
            for name, x in self.arrays.items()
            if name.startswith(prefix)
        }

    def model(self, dtype=None, **options):
        return npllm.load(self.folder, dtype=dtype, **options)


@pytest.fixture(scope="module", params=VARIANTS)
def golden(request, tmp_path_factory):
    return Golden(request.param, tmp_path_factory.mktemp(request.param))


dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])
sets = pytest.mark.parametrize(
    "ops_set", [ops.reference, ops.blockwise], ids=["definitions", "blockwise"]
)


def agree(actual, golden, name, dtype):
    """1e-5 of the largest value in float32, 1e-12 in float64."""
    close(actual, golden.arrays[f"{dtype}/{name}"], times=2 if dtype == "float32" else 1)


def test_the_files_say_what_made_them(golden):
    assert (
        golden.about["script"] == "scripts/make_golden.py"
        and golden.about["transformers"]
        and golden.about["torch"]
    )


def test_the_variants_are_what_their_names_say():
    config = {
        variant: json.loads(safe_open(FOLDER / f"{variant}.safetensors", "np").metadata()["about"])[
            "config"
        ]
        for variant in VARIANTS
    }
    assert config["mha"]["num_key_value_heads"] == config["mha"]["num_attention_heads"]
    assert config["gqa"]["num_key_value_heads"] < config["gqa"]["num_attention_heads"]
    assert config["tied"]["tie_word_embeddings"] and config["window"]["sliding_window"] == 4


@sets
@dtypes
def test_logits(golden, dtype, ops_set):
    agree(golden.model(dtype, ops=ops_set)(golden.arrays["ids"]), golden, "logits", dtype)


@sets
@dtypes
def test_logits_through_a_cache(golden, dtype, ops_set):
    m, ids, cut = golden.model(dtype, ops=ops_set), golden.arrays["ids"], golden.about["cut"]
    cache = m.new_cache()
    parts = [m(ids[:, :cut], cache=cache)] + [
        m(ids[:, at : at + 1], cache=cache) for at in range(cut, ids.shape[1])
    ]
    agree(
        np.concatenate(parts, axis=1),
        golden,
        "cached logits" if dtype == "float32" else "logits",
        dtype,
    )


@sets
@dtypes
def test_logits_of_a_left_padded_batch(golden, dtype, ops_set):
    mask, want = golden.arrays["attention mask"], golden.arrays[f"{dtype}/padded logits"]
    got = golden.model(dtype, ops=ops_set)(golden.arrays["padded ids"], attention_mask=mask)
    assert 0 in mask and 1 in mask[:, 0]
    for row in range(len(mask)):
        tokens = mask[row] == 1  # what is computed for padding has no meaning
        close(got[row, tokens], want[row, tokens], times=2 if dtype == "float32" else 1)


def test_weights_stored_in_16_bits_give_the_same_logits(golden):
    m = golden.model()
    assert m.params.embed_tokens.dtype == np.float16
    agree(m(golden.arrays["ids"]), golden, "logits", "float32")


def test_greedy_generation(golden):
    assert golden.about["greedy margin"] > 1e-3, (
        "a near tie could flip on rounding; take another seed"
    )
    n_new = golden.arrays["greedy"].shape[1] - golden.arrays["ids"].shape[1]
    for use_cache in (True, False):
        got = golden.model("float32").generate(
            golden.arrays["ids"], max_new_tokens=n_new, use_cache=use_cache
        )
        close(got, golden.arrays["greedy"])


def test_every_named_value(golden):
    seen, want = {}, golden.under("float32/tap/")
    golden.model("float32")(golden.arrays["ids"], tap=lambda name, x: seen.setdefault(name, x))
    assert want.keys() <= seen.keys() and len(want) > 20
    for name, x in want.items():
        close(seen[name], x, times=2)


# --------------------------------------------------------------------------------------- the ops, each on Transformers' own inputs


def per_layer(golden):
    """For each layer: its weights, and what Transformers computed, by leaf name; `in` is the
    residual stream that came in.
    """
    taps, weights = golden.under("float32/tap/"), golden.under("weight/")
    for number in range(golden.n_layer):
        at = f"model.layers.{number}"
        values = {name[len(at) + 1 :]: x for name, x in taps.items() if name.startswith(at + ".")}
        values |= {
            "in": taps[f"model.layers.{number - 1}" if number else "model.embed_tokens"],
            "out": taps[at],
        }
        yield (
            {name[len(at) + 1 : -7]: x for name, x in weights.items() if name.startswith(at + ".")},
            values,
        )


def test_rms_norm(golden):
    for weight, value in per_layer(golden):
        close(ops.rms_norm(value["in"], weight["input_layernorm"], 1e-5), value["input_layernorm"])
        middle = value["in"] + value["self_attn.o_proj"]
        close(
            ops.rms_norm(middle, weight["post_attention_layernorm"], 1e-5),
            value["post_attention_layernorm"],
        )


def test_linear(golden):
    for weight, value in per_layer(golden):
        for before, leaf in (
            ("input_layernorm", "self_attn.qkv_proj"),
            ("self_attn.attention", "self_attn.o_proj"),
            ("post_attention_layernorm", "mlp.gate_up_proj"),
            ("mlp.swiglu", "mlp.down_proj"),
        ):
            close(ops.linear(value[before], weight[leaf]), value[leaf])


def test_swiglu(golden):
    for _, value in per_layer(golden):
        gate, up = np.split(value["mlp.gate_up_proj"], 2, axis=-1)
        close(ops.swiglu(gate, up), value["mlp.swiglu"])


@dtypes
def test_rope_tables(golden, dtype):
    inv_freq = ops.rope_frequencies(8, golden.config["rope_theta"]).astype(dtype)
    for got, name in zip(
        ops.rope_tables(np.arange(golden.arrays["ids"].shape[1]), inv_freq),
        ("cos", "sin"),
        strict=True,
    ):
        agree(got, golden, "rope/" + name, dtype)


def test_apply_rope(golden):
    cos, sin = golden.arrays["float32/rope/cos"], golden.arrays["float32/rope/sin"]
    _, value = next(per_layer(golden))
    q, k, _ = split(value["self_attn.qkv_proj"], golden.config)
    close(ops.apply_rope(q, cos, sin), value["self_attn.q"])
    close(ops.apply_rope(k, cos, sin), value["self_attn.k"])


@pytest.mark.parametrize("attention", [ops.attention, ops.blockwise_attention])
def test_attention(golden, attention):
    _, value = next(per_layer(golden))
    window = golden.config.get("sliding_window")
    rule = ops.mask.causal() if window is None else ops.mask.sliding_window(window)
    y = attention(*(value[f"self_attn.{x}"] for x in "qkv"), mask=rule)
    close(ops.merge_heads(y), value["self_attn.attention"])


def split(qkv, config):
    """Rows of all q heads, then k, then v; heads before positions."""
    n_head, n_kv_head = config["num_attention_heads"], config["num_key_value_heads"]
    d_head = qkv.shape[-1] // (n_head + 2 * n_kv_head)
    parts = np.split(qkv, [n_head * d_head, (n_head + n_kv_head) * d_head], axis=-1)
    return [
        ops.split_heads(x, n) for x, n in zip(parts, (n_head, n_kv_head, n_kv_head), strict=True)
    ]
