"""LoRA adapter folders as PEFT writes them, with random factors.  Shares no code with npllm."""

import json
from pathlib import Path

import numpy as np
from tiny import write_safetensors

FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def sizes(config):
    """Leaf of a module -> (d_out, d_in), in both namings."""
    d, d_ff = config["hidden_size"], config["intermediate_size"]
    d_head = d // config["num_attention_heads"]
    d_kv = config["num_key_value_heads"] * d_head
    return {
        "qkv_proj": (d + 2 * d_kv, d),
        "q_proj": (d, d),
        "k_proj": (d_kv, d),
        "v_proj": (d_kv, d),
        "o_proj": (d, d),
        "gate_up_proj": (2 * d_ff, d),
        "gate_proj": (d_ff, d),
        "up_proj": (d_ff, d),
        "down_proj": (d, d_ff),
        "embed_tokens": (config["vocab_size"], d),
        "lm_head": (config["vocab_size"], d),
    }


def module_name(leaf, layer):
    """The whole name of a module."""
    if leaf == "lm_head":
        return leaf
    if leaf == "embed_tokens":
        return f"model.{leaf}"
    half = "self_attn" if leaf in ("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"model.layers.{layer}.{half}.{leaf}"


def factors(config, leaves=FUSED, rank=4, seed=0, layers=None, dtype=np.float32):
    """Draw the tensors of an adapter: name -> array.  `rank`: a number, or a function of leaf and
    layer.
    """
    rng, tensors = np.random.default_rng(seed), {}
    n_layer = config["num_hidden_layers"]
    for layer in range(n_layer) if layers is None else layers:
        for leaf in leaves:
            r = rank(leaf, layer) if callable(rank) else rank
            d_out, d_in = sizes(config)[leaf]
            name = f"base_model.model.{module_name(leaf, layer)}"
            a, b = (0.3 * rng.standard_normal(s) for s in ((r, d_in), (d_out, r)))
            if leaf == "embed_tokens":
                tensors[f"{name}.lora_embedding_A"] = b.T.astype(dtype).copy()
                tensors[f"{name}.lora_embedding_B"] = a.T.astype(dtype).copy()
            else:
                tensors[f"{name}.lora_A.weight"] = a.astype(dtype)
                tensors[f"{name}.lora_B.weight"] = b.astype(dtype)
    return tensors


def split_of(config, tensors):
    """The same adapter in Llama's naming: B cut into the rows of each part, A repeated."""
    parts = {"qkv_proj": SPLIT[:3], "gate_up_proj": SPLIT[4:6]}
    split = {}
    for name, x in tensors.items():
        leaf = next((leaf for leaf in parts if f".{leaf}." in name), None)
        if leaf is None:
            split[name] = x
            continue
        first = 0
        for part in parts[leaf]:
            n = sizes(config)[part][0]
            rows = x[first : first + n].copy() if ".lora_B." in name else x
            split[name.replace(leaf, part)] = rows
            first += n
    return split


def write_adapter(path, tensors, leaves=FUSED, **settings):
    """Write an adapter folder; a setting of `...` leaves its key out."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "bias": "none",
        "target_modules": list(leaves),
        "inference_mode": True,
        "use_dora": False,
    } | settings
    kept = {key: value for key, value in content.items() if value is not ...}
    (path / "adapter_config.json").write_text(json.dumps(kept), encoding="utf-8")
    if tensors is not None:
        write_safetensors(path / "adapter_model.safetensors", tensors)
    return path
