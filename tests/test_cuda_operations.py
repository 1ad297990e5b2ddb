"""How many operations a decode step costs a device: kernels, and functions of CuPy.

Counted on the stand-in (tests/guard.py says what counts) for real configs at their real widths;
kernels are counted and not run, since no count depends on a value.  `pytest -s` prints the counts.
"""

import json
from pathlib import Path

import guard
import ml_dtypes
import numpy as np
import pytest
from guard import moved

import npllm
from npllm.config.config import Config
from npllm.kernels.cuda import decode, launching
from npllm.models.params import LayerParams, Params

MOST_A_TOKEN, MOST_A_LAYER = 500, 12
CONTEXTS = (100, 512, 3500)
CONFIGS = {
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "sliding_window": None,
    },
    "Phi-3-mini-4k": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
    },
}
every_config = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(autouse=True, scope="module")
def _counted():
    with pytest.MonkeyPatch.context() as monkeypatch:
        guard.installed(monkeypatch)
        monkeypatch.setattr(guard, "FILLS", False)
        monkeypatch.setattr(
            launching, "launch", lambda kernel, *_: guard.launched(kernel, lambda: None)
        )
        yield


def zeros(*shape, dtype=ml_dtypes.bfloat16):
    """A weight on the stand-in, of pages that nobody touches."""
    return guard.Array(np.zeros(shape, dtype))


def model_of(name, dtype=ml_dtypes.bfloat16, *, engine=False, **changes):
    """A model of a real config; its layers share their weights.  With the decode engine or without
    it, kernel by kernel, as where it does not apply.
    """
    config = Config.from_json(
        {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": None,
            "torch_dtype": "bfloat16",
            "original_max_position_embeddings": CONFIGS[name]["max_position_embeddings"],
            "rope_scaling": None,
        }
        | CONFIGS[name]
        | changes
    )
    d_model, d_ff, d_kv = (
        config.hidden_size,
        config.intermediate_size,
        config.num_key_value_heads * config.head_dim,
    )
    layer = LayerParams(
        qkv_proj=zeros(d_model + 2 * d_kv, d_model, dtype=dtype),
        o_proj=zeros(d_model, d_model, dtype=dtype),
        gate_up_proj=zeros(2 * d_ff, d_model, dtype=dtype),
        down_proj=zeros(d_model, d_ff, dtype=dtype),
        input_layernorm=zeros(d_model, dtype=dtype),
        post_attention_layernorm=zeros(d_model, dtype=dtype),
    )
    table = zeros(config.vocab_size, d_model, dtype=dtype)
    params = Params(table, (layer,) * config.num_hidden_layers, zeros(d_model, dtype=dtype), table)
    model = npllm.Model(config, params)
    return model if engine else model.on(model.ops.replace(decode_step=None))


def filled(model, n_batch, n_ctx, n_padding=0):
    """A cache as a prompt of n_ctx tokens leaves it, in pieces of 512; the first row is padded."""
    cache, config = model.new_cache(n_batch), model.config
    while cache.n_ctx < n_ctx:
        n = min(512, n_ctx - cache.n_ctx)
        like = guard.Array(
            np.broadcast_to(
                np.float32(0), (n_batch, config.num_key_value_heads, n, config.head_dim)
            )
        )
        for layer in range(config.num_hidden_layers):
            cache.reserve_slots(layer, like, like)
        valid = np.ones((n_batch, cache.n_ctx + n), bool)
        valid[0, :n_padding] = False
        cache.advance(
            np.zeros((n_batch, n), np.int64),
            np.arange(cache.n_ctx, cache.n_ctx + n),
            valid,
            np.zeros(n_batch, np.int64),
        )
    return cache


def counted(model, n_batch=1, n_ctx=100, n_padding=0):
    """Operations of the next token, its logits on the host."""
    cache = filled(model, n_batch, n_ctx, n_padding)
    mask = np.concatenate([cache.valid, np.ones((n_batch, 1), bool)], axis=1)
    guard.OPERATIONS.clear()
    model(np.full((n_batch, 1), 7), attention_mask=mask, cache=cache, logits_to_keep=1).get()
    return dict(guard.OPERATIONS)


@pytest.mark.parametrize(
    ("name", "n_ctx"),
    [
        pytest.param(name, n_ctx, marks=[pytest.mark.slow] * (name != "SmolLM2-135M"))
        for name in CONFIGS
        for n_ctx in CONTEXTS
    ],
)
def test_operations_a_token(name, n_ctx):
    model = model_of(name)
    counts = counted(model, n_ctx=n_ctx)
    n_layer, total = model.config.num_hidden_layers, sum(counts.values())
    print(f"\n{name}, {n_ctx} tokens of context: {total} operations a token, {counts}")
    assert model.ops.name == "cuda", "the default on CuPy"
    assert total <= MOST_A_TOKEN
    assert (
        counts.pop("linear") == 4 * n_layer + 1
        and counts.pop("rope_append") == counts.pop("attend_one") == n_layer
    )
    assert counts.pop("attend_merge", 0) == (n_layer if n_ctx + 1 > 128 else 0)
    assert counts.pop("assign", 0) == (2 * n_layer if n_ctx == 512 else 0), (
        "a cache of a power of two is full: keys and values move"
    )
    assert sum(counts.values()) <= 16, f"around the layers: {counts}"


@pytest.mark.parametrize(
    "name", ["SmolLM2-135M", pytest.param("Phi-3-mini-4k", marks=pytest.mark.slow)]
)
def test_operations_a_token_on_the_engine(name):
    """One graph, whatever the length; the ids there, the logits back, and a copy of them."""
    model = model_of(name, engine=True)
    cache = filled(model, 1, 100)
    for n in range(3):  # eager, captured, replayed
        mask = np.ones((1, 101 + n), bool)
        guard.OPERATIONS.clear()
        model.last_logits(np.full((1, 1), 7), mask, cache).get()
    assert guard.OPERATIONS == {"set": 1, "graph": 1, "astype": 1, "get": 1}
    (plan,) = (plan for draft, plan in decode._PLANS.items() if draft is cache._draft)
    layer = ["linear", "rope_append", "attend_one", "linear", "linear", "linear"]
    n_layer = model.config.num_hidden_layers
    assert plan._graphs["step"].names == ["embed", *layer * n_layer, "linear"]
    assert model.greedy_ids(np.full((1, 1), 7), np.ones((1, 104), bool), cache, 8) is not None
    guard.OPERATIONS.clear()
    model.greedy_ids(np.full((1, 1), 7), np.ones((1, 112), bool), cache, 8)
    assert guard.OPERATIONS == {"set": 1, "graph": 8, "get": 1}, "eight tokens, one wait"


@every_config
@pytest.mark.parametrize(
    ("n_batch", "n_padding", "dtype"),
    [
        (8, 0, ml_dtypes.bfloat16),
        (8, 30, ml_dtypes.bfloat16),
        (16, 30, ml_dtypes.bfloat16),
        (64, 0, np.float16),
        (1, 0, np.float32),
        (16, 0, np.float32),
    ],
)
def test_batches_padding_and_other_weights_cost_no_more(name, n_batch, n_padding, dtype):
    model = model_of(name, dtype)
    counts = counted(model, n_batch, 100, n_padding)
    print(
        f"\n{name}, {n_batch} sequences, {n_padding} slots of padding, {np.dtype(dtype).name}: "
        f"{sum(counts.values())} operations a token"
    )
    assert (
        sum(counts.values()) <= MOST_A_TOKEN
        and sum(counts.values()) / model.config.num_hidden_layers < MOST_A_LAYER
    )


@pytest.mark.parametrize("n_batch", [65, 128])
def test_more_rows_than_the_kernel_takes_widen_in_large_blocks(n_batch):
    """The definition, on a device: 256 MiB of float32 are widened at a time."""
    layers = model_of("SmolLM2-135M", num_hidden_layers=2)
    counts = counted(layers, n_batch, 10)
    assert counts["matmul"] == 2 * 4 + 1, "the table of 49,152 x 576 entries is below 2**26"
    guard.OPERATIONS.clear()
    npllm.ops.linear(zeros(n_batch, 3072, dtype=np.float32), zeros(32064, 3072))
    assert guard.OPERATIONS["matmul"] == -(-32064 // (2**26 // 3072)) == 2


def test_what_counts():
    """Operators, functions, copies and launches do; views, and memory handed out, do not."""
    x = moved(np.arange(12.0, dtype=np.float32).reshape(3, 4))
    xp = guard.xp
    free = [
        lambda: x[1:, :2],
        lambda: x[None],
        lambda: xp.permute_dims(x, (1, 0)),
        lambda: xp.reshape(x, (4, 3)),
        lambda: xp.empty((3,)),
        lambda: xp.ascontiguousarray(x),
        lambda: xp.broadcast_to(x, (2, 3, 4)),
        lambda: xp.expand_dims(x, axis=0),
    ]
    dear = [
        lambda: x + x,
        lambda: 2 * x,
        lambda: -x,
        lambda: x @ xp.permute_dims(x, (1, 0)),
        lambda: xp.exp(x),
        lambda: xp.sum(x),
        lambda: xp.astype(x, xp.float64),
        lambda: xp.concat([x, x]),
        lambda: xp.zeros((2,)),
        lambda: xp.reshape(xp.permute_dims(x, (1, 0)), (12,)),
        lambda: xp.ascontiguousarray(xp.permute_dims(x, (1, 0))),
        lambda: x.__setitem__(0, 1.0),
        lambda: x.get(),
        lambda: moved(np.ones(2)),
        lambda: xp.take(x, moved_ids, axis=0),
        lambda: x[moved_ids],
        lambda: launching.launch("any", ()),
    ]
    moved_ids = moved(np.array([0, 1]))
    for calls, wanted in ((free, 0), (dear, 1)):
        for call in calls:
            guard.OPERATIONS.clear()
            call()
            assert sum(guard.OPERATIONS.values()) == wanted, dict(guard.OPERATIONS)


def test_the_default_config_is_that_of_the_default_checkpoint(default_folder):
    content = json.loads((Path(default_folder) / "config.json").read_text(encoding="utf-8"))
    assert {key: content[key] for key in CONFIGS["SmolLM2-135M"]} == CONFIGS["SmolLM2-135M"]
