"""Tiny GGUF files of both architectures, with the tensors of a checkpoint folder that computes the
same function.
"""

import json

import numpy as np
import optional
from blocks import FORMAT_NAMES, HALVES, random_blocks
from tiny import byte_level, write_folder

gguf = optional.module("gguf")

D_MODEL, D_FF, N_HEAD, N_KV_HEAD, D_HEAD, N_LAYER = 256, 256, 4, 2, 64, 2
TYPES = ["F32", "F16", "BF16", *FORMAT_NAMES]
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"


def vocabulary():
    """Tokens, types and merges of the byte-level tokenizer of tiny.py."""
    model = json.loads(byte_level().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 6 + [1] * (len(tokens) - 6),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def metadata(arch="phi3", **changes):
    """What the header says; a change of `name_with_dots` to None leaves the key out."""
    content = {
        f"{arch}.block_count": N_LAYER,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": D_MODEL,
        f"{arch}.feed_forward_length": D_FF,
        f"{arch}.attention.head_count": N_HEAD,
        f"{arch}.attention.head_count_kv": N_KV_HEAD,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.dimension_count": D_HEAD,
        f"{arch}.rope.freq_base": 10000.0,
        **({"phi3.attention.sliding_window": 0} if arch == "phi3" else {}),
        **vocabulary(),
    }
    return {key: value for key, value in (content | changes).items() if value is not None}


def shapes(arch, n_vocab, tied=False):
    """GGUF's tensors of the tiny model: name -> shape."""
    d_q, d_kv = N_HEAD * D_HEAD, N_KV_HEAD * D_HEAD
    layer = {"attn_norm": (D_MODEL,), "ffn_norm": (D_MODEL,)}
    if arch == "phi3":
        layer |= {"attn_qkv": (d_q + 2 * d_kv, D_MODEL), "ffn_up": (2 * D_FF, D_MODEL)}
    else:
        layer |= {"attn_q": (d_q, D_MODEL), "attn_k": (d_kv, D_MODEL), "attn_v": (d_kv, D_MODEL)}
        layer |= {"ffn_gate": (D_FF, D_MODEL), "ffn_up": (D_FF, D_MODEL)}
    layer |= {"attn_output": (D_MODEL, d_q), "ffn_down": (D_MODEL, D_FF)}
    found = {"token_embd.weight": (n_vocab, D_MODEL), "output_norm.weight": (D_MODEL,)}
    found |= {} if tied else {"output.weight": (n_vocab, D_MODEL)}
    for number in range(N_LAYER):
        found |= {f"blk.{number}.{name}.weight": shape for name, shape in layer.items()}
    return found


def stored(shape, kind, seed):
    """A random tensor of a type: (as GGUFWriter takes it, float32 values)."""
    rng = np.random.default_rng(seed)
    if len(shape) == 1:
        x = (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32)
        return x, x
    if kind in FORMAT_NAMES:
        n_entries = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
        rows = _scaled(kind, random_blocks(kind, shape[0], shape[1] // n_entries, seed))
        return rows, gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    x = (rng.standard_normal(shape) / 16).astype(np.float32)
    raw = gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind])
    return raw, gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])


def _scaled(kind, rows):
    """Scale random blocks so that their entries have the size of trained ones, 1/16."""
    wide = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    factor = 1 / 16 / np.sqrt(np.mean(wide**2))
    blocks = rows.reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])
    for start in HALVES[kind]:
        half = np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16)
        blocks[:, start : start + 2] = (half * factor).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows.shape)


def tensors(arch, kinds="Q4_K", seed=0, tied=False, n_vocab=None):
    """Every tensor of the tiny model: name -> (stored, float32 values, type).

    kinds: a type, or a function of a tensor's name.
    """
    n_vocab = n_vocab or len(vocabulary()["tokenizer.ggml.tokens"])
    found = {}
    for number, (name, shape) in enumerate(shapes(arch, n_vocab, tied).items()):
        kind = kinds if isinstance(kinds, str) else kinds(name)
        kind = "F32" if len(shape) == 1 else kind
        found[name] = (*stored(shape, kind, 100 * seed + number), kind)
    return found


def write(path, content, found, arch="phi3"):
    """Write a GGUF file with the package gguf."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in content.items():
        _add(writer, key, value)
    for name, (raw, _, kind) in found.items():
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, np.ascontiguousarray(raw), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer, key, value):
    adders = {
        bool: writer.add_bool,
        str: writer.add_string,
        float: writer.add_float32,
        int: writer.add_uint32,
        list: writer.add_array,
    }
    adders[type(value)](key, value)


def write_tiny(path, arch="phi3", kinds="Q4_K", seed=0, tied=False, **changes):
    """Write a whole tiny model; return (path, its tensors)."""
    found = tensors(arch, kinds, seed, tied)
    return write(path, metadata(arch, **changes), found, arch), found


def write_twin(path, found, arch="phi3", **changes):
    """Write the checkpoint folder that computes the same function, in float32."""
    wide = {name: values for name, (_, values, _) in found.items()}
    n_vocab = len(wide["token_embd.weight"])
    tied = "output.weight" not in wide
    ours = {
        "model.embed_tokens.weight": wide["token_embd.weight"],
        "model.norm.weight": wide["output_norm.weight"],
    } | ({} if tied else {"lm_head.weight": wide["output.weight"]})
    for number in range(N_LAYER):
        layer = {
            name.split(".")[2]: values
            for name, values in wide.items()
            if name.startswith(f"blk.{number}.")
        }
        ours |= {
            f"model.layers.{number}.{name}.weight": values
            for name, values in _layer(layer, arch).items()
        }
    sizes = {
        "model_type": arch,
        "architectures": [{"phi3": "Phi3", "llama": "Llama"}[arch] + "ForCausalLM"],
        "vocab_size": n_vocab,
        "hidden_size": D_MODEL,
        "intermediate_size": D_FF,
        "num_hidden_layers": N_LAYER,
        "num_attention_heads": N_HEAD,
        "num_key_value_heads": N_KV_HEAD,
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        **({"sliding_window": ...} if arch == "llama" else {}),
    }
    return write_folder(path, tensors=ours, **sizes | changes)


def _layer(layer, arch):
    """The tensors of a layer under the names of Transformers."""
    ours = {
        "input_layernorm": layer["attn_norm"],
        "post_attention_layernorm": layer["ffn_norm"],
        "self_attn.o_proj": layer["attn_output"],
        "mlp.down_proj": layer["ffn_down"],
    }
    if arch == "phi3":
        return ours | {
            "self_attn.qkv_proj": layer["attn_qkv"],
            "mlp.gate_up_proj": layer["ffn_up"],
        }
    return ours | {
        "self_attn.q_proj": unpermuted(layer["attn_q"]),
        "self_attn.k_proj": unpermuted(layer["attn_k"]),
        "self_attn.v_proj": layer["attn_v"],
        "mlp.gate_proj": layer["ffn_gate"],
        "mlp.up_proj": layer["ffn_up"],
    }


def unpermuted(weight):
    """The rows of each head: the even ones, then the odd ones."""
    order = np.r_[0:D_HEAD:2, 1:D_HEAD:2]
    heads = weight.reshape(-1, D_HEAD, weight.shape[-1])
    return np.ascontiguousarray(heads[:, order].reshape(weight.shape))
