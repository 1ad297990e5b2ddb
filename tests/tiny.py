"""Tiny Phi-3 checkpoint folders with fixed random weights, tiny tokenizers, and a model that says
what it is told to.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

import npllm
from npllm.checkpoints.phi3_layout import expected_shapes
from npllm.config.config import Config
from npllm.decoding import GenerationConfig
from npllm.models.params import LayerParams, Params
from npllm.text.tokenizer import Tokenizer as OurTokenizer

CONFIG = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "torch_dtype": "float32",
}
DTYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
}


def config_dict(**changes):
    """Content of a config.json; a change to `...` leaves the key out."""
    return {key: value for key, value in (CONFIG | changes).items() if value is not ...}


def weights(config=None, seed=0, dtype=np.float32):
    """Draw every tensor that a checkpoint of this config.json holds: tensor name -> array."""
    config = Config.from_json(config_dict() if config is None else config)
    rng = np.random.default_rng(seed)
    return {
        name: ((1 if len(shape) == 1 else 0) + 0.3 * rng.standard_normal(shape)).astype(dtype)
        for name, shape in expected_shapes(config).items()
    }


def write_safetensors(path, tensors, *, pad=True, header=None):
    """Write a safetensors file; `pad=False` puts the data at an odd byte, `header` replaces the
    header's text.
    """
    names, entries, stop = {np.dtype(value): key for key, value in DTYPES.items()}, {}, 0
    for name, x in tensors.items():
        start, stop = stop, stop + x.nbytes
        entries[name] = {
            "dtype": names[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [start, stop],
        }
    text = (
        json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
        if header is None
        else header
    )
    text += b" " * (-len(text) % 8 + (0 if pad else 1))
    Path(path).write_bytes(
        len(text).to_bytes(8, "little") + text + b"".join(x.tobytes() for x in tensors.values())
    )


def write_folder(
    path,
    *,
    tensors=None,
    seed=0,
    dtype=np.float32,
    generation=None,
    tokenizer=None,
    settings=None,
    **changes,
):
    """Write a checkpoint folder: config.json, model.safetensors, and what else is given.

    tokenizer: of the tokenizers library; settings: content of tokenizer_config.json; generation: of
    generation_config.json.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    content = config_dict(**changes)
    write_json(path / "config.json", content)
    write_safetensors(
        path / "model.safetensors", weights(content, seed, dtype) if tensors is None else tensors
    )
    if generation is not None:
        write_json(path / "generation_config.json", generation)
    if tokenizer is not None:
        tokenizer.save(str(path / "tokenizer.json"))
        write_json(path / "tokenizer_config.json", settings or {})
    return path


def write_text_folder(path, **changes):
    """The same with the tokenizer `byte_level`, and an answer that never ends by itself."""
    backend = byte_level()
    given = {
        "tokenizer": backend,
        "settings": SETTINGS,
        "generation": {"eos_token_id": [], "pad_token_id": 0},
        "vocab_size": backend.get_vocab_size(),
    }
    return write_folder(path, **given | changes)


def write_json(path, content):
    Path(path).write_text(json.dumps(content), encoding="utf-8")


def model(*, ops=None, seed=0, dtype=np.float32, **changes):
    """A model with random weights that came from no folder; as those of a checkpoint they are
    read-only.
    """
    content = config_dict(**changes)
    config = Config.from_json(content)
    w = weights(content, seed, dtype)
    for x in w.values():
        x.flags.writeable = False
    layers = tuple(
        LayerParams(
            **{
                leaf: w[f"model.layers.{number}.{half}{leaf}.weight"]
                for half, leaves in (
                    ("", ("input_layernorm", "post_attention_layernorm")),
                    ("self_attn.", ("qkv_proj", "o_proj")),
                    ("mlp.", ("gate_up_proj", "down_proj")),
                )
                for leaf in leaves
            }
        )
        for number in range(config.num_hidden_layers)
    )
    embed = w["model.embed_tokens.weight"]
    params = Params(embed, layers, w["model.norm.weight"], w.get("lm_head.weight", embed))
    return npllm.Model(config, params, ops=ops)


def random_ids(n_batch, n_seq, seed=0, n_vocab=CONFIG["vocab_size"]):
    return np.random.default_rng(seed).integers(3, n_vocab, (n_batch, n_seq))


class Counted:
    """A set of ops that counts the calls of each: `calls[name]`."""

    def __init__(self, ops=npllm.ops.blockwise):
        self.calls = {}
        self.ops = ops.replace(
            **{name: self._counted(name, getattr(ops, name)) for name in ops.names()}
        )

    def _counted(self, name, op):
        def counted(*args, **options):
            self.calls[name] = self.calls.get(name, 0) + 1
            return NotImplemented if op is None else op(*args, **options)  # an empty slot declines

        return counted


# ------------------------------------------------------------------------------------------------------------------ tokenizers

SPECIAL = ["<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = """{% for message in messages %}
    {% if message['role'] == 'user' %}
<|user|>{{ message['content'] }}<|end|>
    {%- else %}
<|assistant|>{{ message['content'] }}<|end|>
    {%- endif %}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"""
SETTINGS = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>"},
    "pad_token": None,
    "chat_template": CHAT_TEMPLATE,
}
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ã", "©")]


def byte_level():
    """Six special tokens, every byte (id 6 on), and a few merges: the form of GPT-2's, Phi-4's and
    the default tokenizer.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *map("".join, MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    return tokenizer


def sentencepiece():
    """Byte tokens <0xNN> for what the vocabulary lacks, and ▁ for a space: the form of Phi-3's
    tokenizer.
    """
    pieces = ["▁", *"abcdehlorw", "é", "▁hello", "▁w", "日", "▁本"]
    merges = [("▁", "w"), ("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello")]
    vocab = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{n:02X}>" for n in range(256)),
        *pieces,
        "he",
        "ll",
        "hell",
        "hello",
    ]
    vocab = {token: i for i, token in enumerate(vocab)}
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
    special = [
        AddedToken(token, special=True, normalized=False)
        for token in ("<unk>", "<s>", "</s>", "<|end|>")
    ]
    tokenizer.add_special_tokens(special)
    return tokenizer


class Scripted(npllm.Model):
    """A model that says what it is told to: row r answers `script[r]`, then spaces, whatever the
    prompt.

    generation: content of generation_config.json as GenerationConfig's fields.
    """

    def __init__(self, *script, tokenizer=None, n_ctx=512, **generation):
        self.backend = byte_level() if tokenizer is None else tokenizer
        base = model(
            vocab_size=self.backend.get_vocab_size() + 3,
            num_hidden_layers=1,
            max_position_embeddings=n_ctx,
        )
        ours = OurTokenizer(self.backend, CHAT_TEMPLATE, {"eos_token": "</s>"})
        super().__init__(
            base.config,
            base.params,
            tokenizer=ours,
            generation_config=GenerationConfig(**generation),
        )
        self.script = [self.ids(text) if isinstance(text, str) else text for text in script]
        self.n_calls, self.n_prompt = 0, None

    def ids(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def last_logits(self, ids, valid, cache=None, *, n_keep=1):  # noqa: ARG002 - what a model takes
        n_seen = valid.shape[1]
        self.n_prompt = n_seen if self.n_prompt is None else self.n_prompt
        self.n_calls += 1
        logits = np.zeros((len(ids), self.config.vocab_size), np.float32)
        for row, told in enumerate(self.script[: len(ids)]):
            step = n_seen - self.n_prompt
            logits[row, told[step] if step < len(told) else self.ids(" ")[0]] = 1
        return logits[:, None]
