#!/usr/bin/env python
"""Mutate valid checkpoint folders and load them: only NpllmError may come out, nothing may hang, no
memory beyond the files' size.

    python scripts/fuzz.py --n 200000 --seed 0 [--minutes 10] [--jobs 2]
    python scripts/fuzz.py --mode gguf --n 50000      # or hub, tokenizer: see fuzz_files.py
    python scripts/fuzz.py --mode template --n 50000  # see fuzz_templates.py
    python scripts/fuzz.py --seed 0 --only 4711 --keep folder      # one case again; leaves its files in `folder`

A case is a function of (seed, number): a folder of the family, scaled down, with one file mutated
once to three times, at the level of bytes or of what the file means.  Every case reads the headers,
loads the folder, runs one forward pass, encodes, decodes and renders the chat template.  It fails
when anything but an NpllmError comes out, when it takes longer than LIMIT_SECONDS, or when memory
grows by more than LIMIT_BYTES beyond what its files hold.
"""

import argparse
import collections
import contextlib
import copy
import faulthandler
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

import npllm
from npllm.checkpoints.finite import find_nonfinite
from npllm.checkpoints.phi3_layout import expected_shapes
from npllm.checkpoints.safetensors import read_entries
from npllm.decoding import GenerationConfig

LIMIT_SECONDS = 20.0  # a chat template alone may take five
LIMIT_BYTES = 200 << 20
N_VOCAB = 320
SIZES = {
    "BF16": 2,
    "F16": 2,
    "F32": 4,
    "F64": 8,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "U8": 1,
    "BOOL": 1,
}

# The published shapes with every ratio and feature kept and the sizes scaled down:
# (heads, kv heads, d_head, rope type, partial_rotary_factor, rope_theta, window, tied, dtype)
PUBLISHED = {
    "Phi-3-mini-4k": (4, 4, 8, None, 1.0, 10000.0, 5, False, "bfloat16"),
    "Phi-3-mini-128k": (4, 4, 8, "longrope", 1.0, 10000.0, 64, False, "bfloat16"),
    "Phi-3-mini-128k-april": (4, 4, 8, "su", 1.0, 10000.0, 64, False, "float32"),
    "Phi-3.5-mini": (4, 4, 8, "longrope", 1.0, 10000.0, 64, False, "float16"),
    "Phi-3-medium-4k": (4, 1, 8, None, 1.0, 10000.0, 5, False, "bfloat16"),
    "Phi-3-medium-128k": (4, 1, 8, "su", 1.0, 10000.0, 32, False, "bfloat16"),
    "phi-4": (4, 1, 8, None, 1.0, 250000, None, False, "bfloat16"),
    "Phi-4-reasoning": (4, 1, 8, None, 1.0, 500000, None, False, "float32"),
    "Phi-4-mini-instruct": (3, 1, 16, "longrope", 0.75, 10000.0, 64, True, "bfloat16"),
}
LLAMA_ROPE = {
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "linear": {"type": "linear", "factor": 2.0},
    "default": None,
}

PHI3_TEMPLATE = """\
{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\\n' + message['content'] +
'<|end|>\\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] ==
'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{
'<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
TOOL_TEMPLATE = """{{- bos_token }}{%- set ns = namespace(last=messages|length - 1) %}
{%- macro show(x) %}{% for k, v in x.items() %}{{ k ~ '=' ~ (v|tojson) }}{{ ', ' if not loop.last }}{% endfor %}{% endmacro %}
{% for message in messages[::-1] %}{% if message.role == 'user' and not message.content.startswith('<') %}
{% set ns.last = loop.index0 %}{% break %}{% endif %}{% endfor %}
{% for message in messages %}{% if message['role'] not in ['user', 'assistant', 'system'] %}
{{ raise_exception('unknown role') }}{% endif %}{{ '<|' + message.role + '|>' + message.content|trim + '<|end|>' }}
{% if loop.first %}{{ show({'a': [1, 2], 'n': ns.last}) }}{% endif %}{% endfor %}"""
TEMPLATES = (
    PHI3_TEMPLATE,
    TOOL_TEMPLATE,
    "{% for message in messages %}{{ message['content'] }}{% endfor %}",
)
SNIPPETS = [
    snippet.strip()
    for snippet in """
    {{ ''.__class__.__mro__ }} ¦ {{ cycler.__init__.__globals__ }} ¦ {{ messages.append(1) }} ¦
    {{ messages|attr('pop') }} ¦ {{ 'a' * 10**9 }} ¦ {{ '{0.__class__}'.format(1) }} ¦ {% for i in range(1000) %} ¦
    {% endfor %} ¦ {% if true %} ¦ {% endif %} ¦ {{ 9**(9**9) }} ¦ {{ '%99999d' % 1 }} ¦
    {% set messages = messages + messages %} ¦ {{ messages * 100000 }} ¦ {{ messages|tojson(indent=4) }} ¦
    {{ [[1]] * 3 }} ¦ {{ 1 // 0 }} ¦ {{ 5 % 0 }} ¦ {{ messages|map(attribute='role')|join(',') }} ¦
    {{ messages|sort(attribute='role') }} ¦ {{ namespace() }} ¦ {{ x.y.z }} ¦ {{ loop }} ¦ {{ self }} ¦
    {% set ns.last = ns.last ~ ns.last %} ¦ {% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }} ¦ {{ varargs }} ¦
    {% include 'a' %} ¦ {% block b %} ¦ {% endblock %} ¦ {% raw %} ¦ {% endraw %} ¦ {% filter upper %} ¦ {% endfilter %} ¦
    {% call f() %} ¦ {% endcall %} ¦ {% set z %} ¦ {% endset %} ¦ {#  ¦ #} ¦ {% ¦ %} ¦ {{ ¦ }} ¦
    {{ 'abc'|replace('', 'x' * 1000) }} ¦ {{ messages|groupby('role') }} ¦ {{ messages[0].content[::-1] }} ¦ {% break %} ¦
    {{ dict(a=messages) }} ¦ {% continue %} ¦ {{ messages|selectattr('role', 'equalto', 'user')|list|length }} ¦
    {{ 1e999|int }} ¦ {{ 'a'|int(base=99) }} ¦ {{ strftime_now('%Y') }} ¦ {{ ''|first }} ¦ {{ caller() }} ¦
    {{ 'x'.join(messages) }} ¦ {{ messages|items }} ¦ {{ messages|first|dictsort }} ¦ {{ -'a' }} ¦ {{ 1 in 2 }} ¦
    {{ messages|indent(9999) }} ¦ \ud800 ¦ \0 ¦ {{ range(10**9) }} ¦ {{ joiner(1)(2) }} ¦ {{ cycler()() }} ¦
    {{ messages|default('x', true)|max }} ¦ {% set messages = none %} ¦ {{ 'é' ~ '\U0001f642' }}
""".split("¦")
]
STRINGS = [
    "",
    "x",
    "..",
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "model.safetensors",
    "model.bin",
    "x\0y",
    "\ud800",
    "\x1b[31m",
    "n" * 300,
    "y" * 70000,
    "phi3",
    "llama",
    "longrope",
    "su",
    "yarn",
    "dynamic",
    "linear",
    "llama3",
    "default",
    "bfloat16",
    "float16",
    "float64",
    "int8",
    "silu",
    "F8_E4M3",
    "I64",
    "F32",
    "BF16",
    "F16",
    "F64",
    "Phi3ForCausalLM",
    "LlamaForTokenClassification",
    "<unk>",
    "</s>",
    "Ġ",
    "▁",
    "{{",
    "🙂",
]
NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    256,
    319,
    320,
    321,
    2**24,
    2**24 + 1,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    10**400,
    -(10**400),
    0.0,
    -0.0,
    0.5,
    1.0,
    1.5,
    1e-300,
    1e-9,
    1e9,
    1e30,
    1e300,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
]


def nasty(rng):
    """Draw a value that a careless reader would stumble over."""
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(NUMBERS)
    if kind < 0.6:
        return rng.choice(STRINGS)
    if kind < 0.8:
        return rng.choice(
            [
                None,
                True,
                False,
                [],
                {},
                [[]],
                [None],
                {"": None},
                [0, 1.5, "x"],
                {"a": {"b": []}},
                {"content": 5},
            ]
        )
    if kind < 0.9:
        value = rng.choice([[], {}, 1, "x"])
        for _ in range(rng.choice([3, 30, 150, 200, 900, 950, 980, 990])):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    return [rng.choice(NUMBERS) for _ in range(rng.randrange(20))]


# ----------------------------------------------------------------------------------------------- valid folders


def phi3_config(name):
    """Scale a published config down."""
    n_head, n_kv_head, d_head, rope_type, fraction, theta, window, tied, dtype = PUBLISHED[name]
    rope = None
    if rope_type:
        n = int(d_head * fraction) // 2
        rope = {
            "type": rope_type,
            "short_factor": [1.0 + 0.01 * i for i in range(n)],
            "long_factor": [1.0 + i for i in range(n)],
        }
    return {
        "_name_or_path": name,
        "architectures": ["Phi3ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_phi3.Config"},
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": n_head * d_head,
        "initializer_range": 0.02,
        "intermediate_size": 24,
        "max_position_embeddings": 256 if rope else 64,
        "model_type": "phi3",
        "num_attention_heads": n_head,
        "num_hidden_layers": 1,
        "num_key_value_heads": n_kv_head,
        "original_max_position_embeddings": 8 if rope else 64,
        "pad_token_id": 2,
        "partial_rotary_factor": fraction,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": rope,
        "rope_theta": theta,
        "sliding_window": window,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "transformers_version": "4.40.2",
        "use_cache": True,
        "attention_bias": False,
        "vocab_size": N_VOCAB,
    }


def llama_config(rope):
    """Make a Llama-style config, with biases and a head_dim of its own for some."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8 if rope == "yarn" else None,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA_ROPE[rope],
        "attention_bias": rope == "linear",
        "mlp_bias": rope == "linear",
        "tie_word_embeddings": rope == "llama3",
        "bos_token_id": 1,
        "eos_token_id": [2, 5],
        "hidden_act": "silu",
        "vocab_size": N_VOCAB,
        "torch_dtype": "bfloat16",
    }


def new_form(config):
    """Spell a config as Transformers 5 does."""
    config = dict(config)
    rope = config.pop("rope_scaling") or {"rope_type": "default"}
    config["rope_parameters"] = {
        **rope,
        "rope_type": rope.get("rope_type", rope.get("type")),
        "rope_theta": config.pop("rope_theta"),
        "partial_rotary_factor": config.pop("partial_rotary_factor", 1.0),
    }
    config["dtype"] = config.pop("torch_dtype")
    return config


def byte_bpe():
    """Make a byte-level tokenizer like phi-4's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        **{letter: i + 3 for i, letter in enumerate(alphabet)},
    }
    merges = [("h", "i"), ("Ġ", "t"), ("Ġt", "h"), ("a", "n")]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_bpe():
    """Make a tokenizer with byte fallback like Phi-3's."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": i + 3 for i in range(256)}}
    for letter in "▁thiaes":
        vocab[letter] = len(vocab)
    merges = [("h", "i"), ("▁", "t")]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def tokenizer_json(number):
    """Text of one of the two tokenizers, with the special tokens of the family."""
    tokenizer = (byte_bpe, sentencepiece_bpe)[number % 2]()
    names = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer.add_special_tokens(
        [
            AddedToken(name, rstrip=number % 2 == 1 and "|" in name, normalized=False)
            for name in names
        ]
    )
    return tokenizer.to_str()


def write_safetensors(tensors):
    """Bytes of a safetensors file: {name: (dtype, shape, bytes)} in this order."""
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [start, start + len(data)],
        }
        start += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return (
        len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values())
    )


def random_tensors(config, seed):
    """Tensors of the size that a config asks for."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in expected_shapes(config).items():
        x = (
            np.ones(shape, np.float32)
            if name.endswith("norm.weight")
            else rng.normal(0, 0.3, shape).astype(np.float32)
        )
        if config.dtype == "bfloat16":
            tensors[name] = "BF16", shape, (x.view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            tensors[name] = (
                {"float16": "F16", "float32": "F32"}[config.dtype],
                shape,
                x.astype(config.dtype).tobytes(),
            )
    return tensors


def make_folder(config, number):
    """Files of a valid folder: {name: bytes}."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = random_tensors(npllm.Config.from_json(config), number)
    eos = {
        "eos_token_id": [2, 6],
        "pad_token_id": 2,
        "bos_token_id": 1,
        "transformers_version": "4.40.2",
    }
    sampling = (
        {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
        if number % 3 == 0
        else {}
    )
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>" if number % 2 else {"content": "</s>", "lstrip": False},
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "add_bos_token": bool(number % 2),
        "model_max_length": 1e30,
        "added_tokens_decoder": {
            "2": {
                "content": "</s>",
                "lstrip": False,
                "normalized": False,
                "rstrip": True,
                "single_word": False,
                "special": False,
            }
        },
    }
    template = TEMPLATES[number % 3]
    files = {
        "config.json": json.dumps(config, indent=2).encode(),
        "generation_config.json": json.dumps(eos | sampling).encode(),
        "tokenizer.json": tokenizer_json(number).encode(),
    }
    if number % 4 == 3:
        files["chat_template.jinja"] = template.encode()
    else:
        named = [{"name": "default", "template": template}, {"name": "tool_use", "template": "x"}]
        settings["chat_template"] = named if number % 4 == 2 else template
    files["tokenizer_config.json"] = json.dumps(settings).encode()
    if number % 3 != 1:
        return files | {"model.safetensors": write_safetensors(tensors)}
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    files |= {
        file: write_safetensors({name: tensors[name] for name in names})
        for file, names in shards.items()
    }
    return files | {"model.safetensors.index.json": json.dumps(index).encode()}


def valid_folders():
    """Every kind of folder: {name: {file: bytes}}."""
    configs = {name: phi3_config(name) for name in PUBLISHED}
    configs |= {
        f"{name} (Transformers 5)": new_form(phi3_config(name))
        for name in ("Phi-3-mini-4k", "Phi-4-mini-instruct")
    }
    configs |= {f"llama {rope}": llama_config(rope) for rope in LLAMA_ROPE}
    for head in ("SequenceClassification", "TokenClassification"):
        configs[head] = {
            **phi3_config("Phi-3-mini-4k"),
            "architectures": ["Phi3For" + head],
            "num_labels": 3,
            "id2label": {"0": "a", "1": "b", "2": "c"},
        }
    return {
        name: make_folder(config, number) for number, (name, config) in enumerate(configs.items())
    }


# ----------------------------------------------------------------------------------------------- mutations


def mutate_bytes(data, rng):
    """Flip, insert, delete, repeat or cut bytes."""
    data, size = bytearray(data), len(data)
    at = rng.randrange(size + 1)
    stop = min(size, at + rng.choice([1, 1, 2, 8, 100]))
    kind = rng.randrange(7)
    if kind == 0 and at < size:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1 and at < size:
        data[at] = rng.randrange(256)
    elif kind == 2:
        data[at:at] = rng.choice(
            [
                b"\0",
                b"\xff",
                b"\xef\xbb\xbf",
                b"{",
                b"[" * 5000,
                b'"',
                b",",
                b"9" * 5000,
                b"NaN",
                bytes(8),
            ]
        )
    elif kind == 3:
        del data[at:stop]
    elif kind == 4:
        data[at:at] = data[at:stop]
    elif kind == 5:
        del data[at:]
    else:
        utf16 = data.decode("utf-8", "ignore").encode("utf-16")
        data = rng.choice([b"", b"\xef\xbb\xbf" + data, utf16, data + bytes(9), data[::-1]])
    return bytes(data)


def places(value, path=()):
    """List the path of everything within a JSON value."""
    found = [path] if path else []
    pairs = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:30])
        if isinstance(value, list)
        else ()
    )
    for key, item in pairs:
        found += places(item, (*path, key))
    return found


def mutate_json(value, rng):
    """Change one place of a JSON value: another value, a near one, away, renamed, moved, or added
    to.
    """
    found = places(value)
    if not found or not isinstance(value, dict):
        return nasty(rng)
    shallow = [path for path in found if len(path) <= 2]
    *way, last = rng.choice(shallow if rng.random() < 0.7 else found)
    holder = value
    for key in way:
        holder = holder[key]
    kind, old = rng.randrange(8), holder[last]
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice([*STRINGS, str(last) + "x", str(last).upper()])] = holder.pop(last)
    elif kind == 2:
        other = rng.choice(found)
        item = value
        with contextlib.suppress(LookupError, TypeError):
            for key in other:
                item = item[key]
            holder[last] = copy.deepcopy(item)
    elif kind == 3 and isinstance(old, int | float):
        real = float(max(-1e300, min(old, 1e300)))
        holder[last] = rng.choice(
            [-old, old + 1, old - 1, old * 2, old * 1000003, bool(old), str(old), [old], real]
        )
    elif kind == 4:
        holder[last] = rng.choice([[old], {"a": old}, str(old), [old, old]])
    elif kind == 5 and isinstance(holder, dict):
        holder[rng.choice(STRINGS)] = nasty(rng)
    else:
        holder[last] = nasty(rng)
    return value


def mutate_json_file(data, rng):
    """Mutate a JSON file by its meaning, sometimes by its bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(data, rng)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    try:
        text = json.dumps(mutate_json(value, rng), ensure_ascii=rng.random() < 0.7)
    except RecursionError:
        return b"[" * 100000
    if rng.random() < 0.03:
        text = text.replace(",", rng.choice([', "vocab_size": 7,', ', "": 1,', ", ,", "/**/,"]), 1)
    return text.encode("utf-8", "surrogatepass")


def mutate_template(text, rng):
    """Splice, cut and repeat a template."""
    at = rng.choice([m.start() for m in re.finditer(r"\{[{%]|[}%]\}|\b", text)] or [0])
    stop = min(len(text), at + rng.choice([1, 2, 5, 20, 100]))
    kind = rng.randrange(6)
    if kind <= 2:
        return text[:at] + rng.choice(SNIPPETS) + text[at:]
    if kind == 3:
        return text[:at] + text[stop:]
    if kind == 4:
        return text[:at] + text[at:stop] * rng.choice([2, 3, 50]) + text[stop:]
    words = ["9" * 9, "messages", "'a'", "none", "loop", "ns"]
    return re.sub(
        r"'[^']*'|\w+", lambda match: rng.choice(words) if rng.random() < 0.05 else match[0], text
    )


def mutate_settings(data, rng):
    """Mutate a tokenizer_config.json: mostly its template."""
    try:
        value = json.loads(data)
        template = value["chat_template"]
    except (ValueError, RecursionError, LookupError, TypeError):
        return mutate_json_file(data, rng)
    if rng.random() < 0.4:
        return mutate_json_file(data, rng)
    if isinstance(template, str):
        value["chat_template"] = mutate_template(template, rng)
    elif isinstance(template, list):
        for entry in template:
            if isinstance(entry, dict) and isinstance(entry.get("template"), str):
                entry["template"] = mutate_template(entry["template"], rng)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def mutate_header(data, rng):
    """Change a field of a safetensors header and leave the data as they are."""
    n_header = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + n_header])
        name = rng.choice([name for name in header if name != "__metadata__"])
        entry, body = header[name], data[8 + n_header :]
        kind = rng.randrange(12)
        if kind == 0:
            entry["dtype"] = rng.choice([*SIZES, "f32", "", "F4", "F8_E8M0", nasty(rng)])
        elif kind == 1:
            shape = entry["shape"]
            entry["shape"] = rng.choice(
                [
                    shape[::-1],
                    [],
                    [0],
                    [2**62, 4],
                    [2**64],
                    [-1],
                    [2**32] * 2,
                    [*shape, 1],
                    nasty(rng),
                ]
            )
        elif kind == 2:
            entry["data_offsets"][rng.randrange(2)] += rng.choice(
                [1, -1, 8, -8, 2**31, -(2**31), 2**63, 2**64]
            )
        elif kind == 3:
            offsets = entry["data_offsets"]
            entry["data_offsets"] = rng.choice(
                [offsets[::-1], [0, 0], [0, len(body)], [], [0], [0, 1, 2], nasty(rng)]
            )
        elif kind == 4:
            entry["data_offsets"] = header[rng.choice(list(header))].get("data_offsets", [0, 4])
        elif kind == 5:
            header[rng.choice([*STRINGS, name + "x", "model.embed_tokens.weight"])] = header.pop(
                name
            )
        elif kind == 6:
            del header[name]
        elif kind == 7:
            header["__metadata__"] = rng.choice(
                [None, {}, {"a": 1}, {"format": "x"}, [], "x", nasty(rng)]
            )
        elif kind == 8:
            header[rng.choice(["x", "lm_head.weight", *STRINGS])] = nasty(rng)
        else:
            header = mutate_json(header, rng)
        text = json.dumps(header)
        if rng.random() < 0.1:
            first = re.search(r'"model[^"]*": \{[^}]*\}', text)
            text = text if first is None else text[:-1] + ", " + first[0] + "}"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return mutate_bytes(data, rng)
    text = text.encode("utf-8", "surrogatepass")
    length = len(text)
    if rng.random() < 0.15:
        length = rng.choice(
            [0, 1, length - 1, length + 1, len(data), 2**25 + 1, 2**31, 2**63, 2**64 - 1]
        )
    return length.to_bytes(8, "little") + text + body


def mutate_layout(data, rng):
    """Rewrite a safetensors file so that its header stays true: other order, dtype, shape,
    alignment, tensors or numbers.
    """
    try:
        n_header = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + n_header]), data[8 + n_header :]
        header.pop("__metadata__", None)
        tensors = {
            name: (e["dtype"], e["shape"], body[slice(*e["data_offsets"])])
            for name, e in header.items()
        }
        names = list(tensors)
        name = rng.choice(names)
        dtype, shape, raw = tensors[name]
        kind = rng.randrange(8)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return mutate_bytes(data, rng)
    if kind == 0:
        rng.shuffle(names)
        tensors = {name: tensors[name] for name in names}
    elif kind == 1:
        other = rng.choice([d for d in SIZES if SIZES[d] <= 8])
        tensors[name] = other, shape, bytes(math.prod(shape) * SIZES[other])
    elif kind == 2:
        tensors[name] = (
            dtype,
            rng.choice([shape[::-1], [math.prod(shape)], [1, *shape], [*shape, 1]]),
            raw,
        )
    elif kind == 3:
        other = rng.choice(
            ["x", "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", *STRINGS[:4]]
        )
        tensors = {other: ("U8", [3], b"abc"), **tensors}
    elif kind == 4:
        del tensors[name]
    elif kind == 5:
        tensors[name] = (
            dtype,
            shape,
            rng.choice(
                [b"\xff" * len(raw), b"\x80\x7f" * (len(raw) // 2), rng.randbytes(len(raw))]
            ),
        )
    elif kind == 6:
        tensors[rng.choice(names)] = tensors[name]
    if kind == 7:
        text = data[8 : 8 + n_header] + b" " * rng.randrange(1, 8)
        return len(text).to_bytes(8, "little") + text + body
    with contextlib.suppress(UnicodeEncodeError):
        return write_safetensors(tensors)
    return data


def mutate(files, rng):
    """Mutate a folder; return (kind, {file: bytes})."""
    kind = rng.choices(
        ["config", "weights", "index", "tokenizer", "settings", "template", "generation", "layout"],
        [24, 20, 8, 12, 12, 10, 6, 8],
    )[0]
    weights = [name for name in files if name.endswith(".safetensors")]
    target = {
        "config": "config.json",
        "index": "model.safetensors.index.json",
        "tokenizer": "tokenizer.json",
        "settings": "tokenizer_config.json",
        "template": "chat_template.jinja",
        "generation": "generation_config.json",
    }.get(kind) or rng.choice(weights)
    data = files.get(target)
    if kind == "index" and data is None:
        names = expected_shapes(npllm.Config.from_json(json.loads(files["config.json"])))
        data = json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}).encode()
        files = files | {
            "model.safetensors": None,
            "weights.safetensors": files["model.safetensors"],
        }
        data = data.replace(b"model.safetensors", b"weights.safetensors")
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if kind == "template":
            text = rng.choice(TEMPLATES) if data is None else data.decode("utf-8", "replace")
            data = mutate_template(text, rng).encode("utf-8", "surrogatepass")
            data = mutate_bytes(data, rng) if rng.random() < 0.05 else data
        else:
            change = {
                "weights": mutate_header if rng.random() < 0.8 else mutate_bytes,
                "layout": mutate_layout,
                "settings": mutate_settings,
            }.get(kind, mutate_json_file)
            data = change(data, rng)
    return kind, {**files, target: data}


# ----------------------------------------------------------------------------------------------- one case


class HangError(BaseException):
    """A case took too long."""


def _alarm(*_):
    raise HangError


MESSAGES = [
    {"role": "system", "content": "be nice"},
    {"role": "user", "content": "hi there"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "that 🙂"},
]


def attempt(step):
    """Run a step; return the NpllmError that came out, or None."""
    try:
        step()
    except npllm.NpllmError as error:
        if not str(error).isprintable():
            raise RuntimeError(f"the message cannot be printed safely: {str(error)!a}") from None
        return error
    return None


def use(model, kind):
    """Run everything that depends on the folder's files once."""
    errors = [attempt(lambda: model(np.array([[3, 2, 300] * 4])))]
    if model.tokenizer is not None:
        tokenizer = model.tokenizer
        errors.append(attempt(lambda: tokenizer.decode(tokenizer.encode("this <|end|> hi\n🙂"))))
        errors.append(attempt(lambda: tokenizer.decode(list(range(0, 330, 9)))))
        messages = copy.deepcopy(MESSAGES)
        errors.append(attempt(lambda: tokenizer.encode_chat(messages)))
        if messages != MESSAGES:
            raise RuntimeError("the chat template has changed the conversation")
        if model.config.head == "lm" and kind in ("", "generation", "tokenizer"):
            errors.append(attempt(lambda: model.generate("hi", max_new_tokens=2, seed=0)))
    return [error for error in errors if error is not None]


def run_case(folder, kind="", ops=None):
    """Load and use a folder; return (whether the headers were read, the first error or None).

    kind says what was mutated, and leaves out what does not depend on it; "": everything.  ops: the
    set that the model runs on.
    """
    headers = attempt(lambda: read_entries(folder)) is None
    found = []
    error = attempt(lambda: found.append(npllm.load(folder, ops=ops)))
    if error is None:
        errors = use(found[0], kind)
        if kind in ("", "layout", "weights"):
            attempt(lambda: find_nonfinite(folder))
        return headers, errors[0] if errors else None
    configs = []  # the rest of the folder is tried as well
    if attempt(lambda: configs.append(npllm.Config.from_json(folder))) is None:
        attempt(lambda: GenerationConfig.from_folder(folder, configs[0]))
    attempt(lambda: npllm.Tokenizer.from_folder(folder))
    return headers, error


def category(error):
    """Name an error by its type and its first words, without names and numbers."""
    if error is None:
        return "loads and runs"
    text = re.sub(r"^/[^:]*/|'[^']*'|\"[^\"]*\"", "", str(error))
    text = re.sub(r"^[^:/]*: the tensors", "the tensors", text)
    text = re.sub(r"^[^:/]*: holds", "holds", text)
    text = re.sub(r"^(model-0000\d-of-\d+|model|weights).safetensors:", "*.safetensors:", text)
    text = re.sub(r"[-\d.e+]*\d[-\d.e+]*", "#", text).split(";")[0].split("(")[0].split(", got")[0]
    return f"{type(error).__name__}: {text[:70].strip()}"


class Worker:
    """Writes folders and runs cases.  Only the files that a case changes are written, and
    afterwards put back.
    """

    def __init__(self, seed, scratch):
        self.seed, self.scratch, self.folders = seed, Path(scratch), valid_folders()
        self.names = sorted(self.folders)
        for name, files in self.folders.items():
            folder = self.scratch / name
            folder.mkdir(parents=True, exist_ok=True)
            for file, data in files.items():
                (folder / file).write_bytes(data)

    def check_valid(self, ops=None):
        """Make sure that what is mutated is valid."""
        for name in self.names:
            headers, error = run_case(self.scratch / name, ops=ops)
            if error is not None or not headers:
                raise SystemExit(f"the folder {name!r} is meant to be valid: {error}")

    def files(self, number):
        """Make the files of a case."""
        rng = random.Random(f"{self.seed} {number}")
        name = rng.choice(self.names)
        return name, *mutate(self.folders[name], rng)

    def write(self, folder, files, before):
        """Write what differs."""
        for file, data in files.items():
            if before.get(file) != data:
                if data is None:
                    (folder / file).unlink(missing_ok=True)
                else:
                    (folder / file).write_bytes(data)
        for file in set(before) - set(files):
            (folder / file).unlink(missing_ok=True)

    def run(self, number):
        """Run one case; return (kind, headers read, error, seconds, bytes grown)."""
        name, kind, files = self.files(number)
        folder, valid = self.scratch / name, self.folders[name]
        self.write(folder, files, valid)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
        try:
            headers, error = run_case(folder, kind)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.write(folder, valid, files)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        grown -= sum(len(data or b"") for data in files.values())
        return kind, headers, error, time.monotonic() - start, grown


def work(seed, numbers, stop_at, queue, progress, scratch, address_space):
    """Run cases in a process of its own and report what happened."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    signal.signal(signal.SIGALRM, _alarm)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # the tokenizers library writes its panics there
    worker = Worker(seed, scratch)
    worker.check_valid()
    with contextlib.suppress(
        OSError
    ):  # where there is /proc, memory beyond what is mapped now is limited
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + address_space, resource.RLIM_INFINITY))
    counts, failures = collections.Counter(), []
    slowest, most, n, n_headers = (0.0, -1), (0, -1), 0, 0
    for number in numbers:
        if time.monotonic() > stop_at:
            break
        progress.value = number
        try:
            kind, headers, error, seconds, grown = worker.run(number)
        except BaseException as problem:
            failures.append((number, f"{type(problem).__name__}: {problem}"[:300]))
            continue
        if seconds > LIMIT_SECONDS or grown > LIMIT_BYTES:
            failures.append(
                (number, f"took {seconds:.1f} s and {grown >> 20} MiB more than its files")
            )
        slowest, most = max(slowest, (seconds, number)), max(most, (grown, number))
        counts[kind, category(error)] += 1
        n, n_headers = n + 1, n_headers + headers
    queue.put((n, n_headers, counts, failures, slowest, most))


def fuzz(n, seed, minutes, jobs, address_space=1 << 30):
    """Run n cases in `jobs` processes; return their sums and the failures, a process that died
    among them.
    """
    context = multiprocessing.get_context("fork")
    queue, stop_at = context.Queue(), time.monotonic() + 60 * minutes
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as scratch:
        tasks = []
        for job in range(jobs):
            progress = context.Value("q", -1)
            arguments = (
                seed,
                range(job, n, jobs),
                stop_at,
                queue,
                progress,
                f"{scratch}/{job}",
                address_space,
            )
            tasks.append((context.Process(target=work, args=arguments), progress))
            tasks[-1][0].start()
        results, alive = [], list(tasks)
        while alive:
            with contextlib.suppress(Exception):
                results.append(queue.get(timeout=0.5))
            alive = [task for task in alive if task[0].is_alive()]
        while not queue.empty():
            results.append(queue.get())
        dead = [
            (progress.value, f"the process died with exit code {task.exitcode}")
            for task, progress in tasks
            if task.exitcode
        ]
    return results, dead


def report(results, dead, seconds):
    """Write the summary; return the failures."""
    counts, failures = collections.Counter(), list(dead)
    for result in results:
        counts += result[2]
        failures += result[3]
    n, n_headers = sum(result[0] for result in results), sum(result[1] for result in results)
    n_good = sum(count for (_, name), count in counts.items() if name == "loads and runs")
    print(
        f"{n} mutated folders in {seconds:.0f} s ({n / seconds:.0f}/s); {n_headers} ({n_headers / max(n, 1):.0%}) past header "
        f"parsing; {n_good} load and run; {len(failures)} failures"
    )
    if results:
        slowest, most = max(result[4] for result in results), max(result[5] for result in results)
        print(
            f"slowest case {slowest[0]:.2f} s (number {slowest[1]}); largest growth of peak memory {most[0] / 2**20:.0f} MiB "
            f"(number {most[1]})"
        )
    kinds = collections.Counter()
    for (kind, _), count in counts.items():
        kinds[kind] += count
    for kind, count in kinds.most_common():
        good = counts[kind, "loads and runs"]
        print(f"  {kind:10s} {count:7d}, of which {good} load and run, {count - good} are refused")
    what = collections.Counter()
    for (_, name), count in counts.items():
        what[name] += count
    print(f"{len(what)} kinds of outcome, the most frequent:")
    for name, count in what.most_common(40):
        print(f"  {count:7d} {name.encode('ascii', 'backslashreplace').decode()}")
    for number, problem in sorted(failures)[:30]:
        print(f"FAILURE at number {number}: {problem}")
    return failures


def keep(seed, number, folder):
    """Write the files of one case, and run it with its traceback."""
    with tempfile.TemporaryDirectory() as scratch:
        name, kind, files = Worker(seed, scratch).files(number)
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        if data is not None:
            (folder / file).write_bytes(data)
    print(f"case {number}: {name}, {kind}; files in {folder}")
    start = time.monotonic()
    headers, error = run_case(folder)
    print(
        f"headers read: {headers}; {time.monotonic() - start:.2f} s; {type(error).__name__}: {str(error)[:1000]!a}"
    )


def run_mode(name, n, seed, only, minutes):
    """Run the cases of another mode, watched from outside; return whether there were escapes."""
    import fuzz_files
    import fuzz_templates
    from fuzz_watch import watch, write_summary

    module = fuzz_templates if name == "template" else fuzz_files
    cases = module.MODES[name]
    if only is not None:
        with tempfile.TemporaryDirectory() as scratch:
            print(cases(seed, Path(scratch)).run(only))
        return False
    summary = watch(cases, n, seed, *module.LIMITS[name], minutes)
    write_summary(name, summary, seed)
    return bool(summary.failures)


def main():
    """Parse the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=20000, help="number of mutations")
    parser.add_argument("--seed", type=int, help="default: drawn, and printed")
    modes = ["folders", "gguf", "hub", "tokenizer", "template"]
    parser.add_argument("--mode", choices=modes, default="folders")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so long")
    parser.add_argument(
        "--jobs",
        type=int,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        help="processes of the mode folders; the other modes have one",
    )
    parser.add_argument("--only", type=int, help="run this case alone")
    parser.add_argument(
        "--keep", type=Path, default=Path("fuzz-failure"), help="folder for the files of a failure"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().randrange(2**32)
    print(f"seed {arguments.seed}", flush=True)
    if arguments.mode != "folders":
        chosen = arguments.n, arguments.seed, arguments.only, arguments.minutes
        sys.exit(run_mode(arguments.mode, *chosen))
    if arguments.only is not None:
        keep(arguments.seed, arguments.only, arguments.keep)
        return
    start = time.monotonic()
    failures = report(
        *fuzz(arguments.n, arguments.seed, arguments.minutes, arguments.jobs),
        time.monotonic() - start,
    )
    if failures:
        shutil.rmtree(arguments.keep, ignore_errors=True)
        with tempfile.TemporaryDirectory() as scratch:
            _, _, files = Worker(arguments.seed, scratch).files(failures[0][0])
        arguments.keep.mkdir(parents=True)
        for file, data in files.items():
            if data is not None:
                (arguments.keep / file).write_bytes(data)
        print(f"the files of the first failure are in {arguments.keep}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
