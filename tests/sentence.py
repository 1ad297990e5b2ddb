"""Tiny sentence-transformers folders, the same on any machine: what their files say, and what is
asked of them.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiny
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from npllm.checkpoints import bert_layout
from npllm.config.bert_config import BertConfig

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "cat",
    "sat",
    "on",
    "mat",
    "##s",
    "##ting",
    "a",
    "b",
    "c",
    "d",
    "e",
    "query",
    "The",
    ":",
]
CONFIG = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": len(WORDS),
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "dtype": "float32",
}
TEXTS = ["the cat sat", "a", "The cats", "c d e sat on the mats a b c d e a b c d e", "", "query"]
SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
    "model_max_length": 512,
}
LIBRARY = "sentence_transformers.models."


class Case(NamedTuple):
    """A folder and the calls of it."""

    modules: tuple[str, ...] = (
        "Pooling",
    )  # after the Transformer; "Dense:Tanh:7" is a dense module of 7 outputs, ":0" without bias
    pooling: dict[str, Any] = {"pooling_mode": "mean"}  # noqa: RUF012
    sentence: dict[str, Any] = {"max_seq_length": None, "do_lower_case": False}  # noqa: RUF012
    settings: dict[str, Any] = {}  # noqa: RUF012 - of config_sentence_transformers.json
    tokenizer: dict[str, Any] = {}  # noqa: RUF012 - changes of tokenizer_config.json
    calls: tuple[dict[str, Any], ...] = ({}, {"normalize": True})


PROMPTS = {"prompts": {"query": "query: ", "long": "a b c d e a b c d e a b c d e ", "empty": ""}}
ASKED = (
    {},
    {"prompt_name": "query"},
    {"prompt": "the "},
    {"prompt": ""},
    {"prompt_name": "document"},
    {"prompt_name": "empty"},
    {"prompt_name": "query", "normalize": True},
)
CASES = {
    **{
        mode: Case(pooling={"pooling_mode": mode})
        for mode in ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
    },
    "old flags": Case(
        pooling={
            "word_embedding_dimension": 12,
            "pooling_mode_cls_token": True,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_lasttoken": True,
        }
    ),
    "a list": Case(pooling={"embedding_dimension": 12, "pooling_mode": ["lasttoken", "cls"]}),
    "nothing said": Case(pooling={"word_embedding_dimension": 12}),
    "dense": Case(modules=("Pooling", "Dense:torch.nn.modules.activation.Tanh:16")),
    "dense without bias": Case(modules=("Pooling", "Dense:torch.nn.modules.linear.Identity:5:0")),
    "several": Case(
        modules=(
            "Pooling",
            "Dense:torch.nn.modules.activation.ReLU:9",
            "Normalize",
            "Dense:torch.nn.modules.activation.GELU:7",
            "Dense:torch.nn.modules.activation.SiLU:8",
            "Normalize",
        )
    ),
    "dense of two poolings": Case(
        modules=("Pooling", "Dense:torch.nn.modules.activation.Tanh:4"),
        pooling={"pooling_mode": ["max", "mean"]},
    ),
    "normalize": Case(modules=("Pooling", "Normalize")),
    "prompts": Case(settings=PROMPTS, calls=ASKED),
    "default prompt": Case(settings=PROMPTS | {"default_prompt_name": "query"}, calls=ASKED),
    **{
        f"prompt left out of {mode}": Case(
            settings=PROMPTS | {"default_prompt_name": "query"},
            calls=ASKED,
            pooling={"pooling_mode": mode, "include_prompt": False},
        )
        for mode in ("mean", "cls", "max", "weightedmean", "lasttoken", "mean_sqrt_len_tokens")
    },
    "truncated vectors": Case(modules=("Pooling", "Normalize"), settings={"truncate_dim": 5}),
    "max_seq_length": Case(
        sentence={"max_seq_length": 6, "do_lower_case": False}, tokenizer={"model_max_length": 9}
    ),
    "model_max_length": Case(tokenizer={"model_max_length": 7}),
    "model_max_length beyond the model": Case(
        tokenizer={"model_max_length": 1000000000000000019884624838656}
    ),
    "lower case": Case(sentence={"max_seq_length": 16, "do_lower_case": True}),
}


def tokenizer():
    """A cased WordPiece tokenizer that puts [CLS] and [SEP] around every text."""
    backend = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    backend.normalizer, backend.pre_tokenizer = (
        normalizers.BertNormalizer(lowercase=False),
        pre_tokenizers.BertPreTokenizer(),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.add_special_tokens(WORDS[:5])
    return backend


def drawn(shape, source):
    """Entries of size about 1 / sqrt(d_in), the same on any machine and any version of NumPy."""
    raw = (source.random_raw(int(np.prod(shape))) >> np.uint64(40)).astype(np.float64) / 2**23 - 1
    return (raw.reshape(shape) * (2 / np.sqrt(shape[-1]) if len(shape) == 2 else 0.25)).astype(
        np.float32
    )


def weights():
    """Tensors of the encoder."""
    source = np.random.PCG64(0)
    shapes = bert_layout.expected_shapes(BertConfig.from_json(CONFIG))
    return {
        name: drawn(shape, source) * (3 if "embeddings.weight" in name else 1)
        + np.float32("LayerNorm.weight" in name)
        for name, shape in shapes.items()
    }


def write(folder, case):
    """Write the folder of a case."""
    folder = Path(folder)
    tiny.write_folder(
        folder, tensors=weights(), tokenizer=tokenizer(), settings=SETTINGS | case.tokenizer
    )
    tiny.write_json(folder / "config.json", CONFIG)
    tiny.write_json(folder / "sentence_bert_config.json", case.sentence)
    tiny.write_json(folder / "config_sentence_transformers.json", case.settings)
    modules, width = [{"idx": 0, "name": "0", "path": "", "type": LIBRARY + "Transformer"}], 12
    for number, module in enumerate(case.modules, 1):
        name, *options = module.split(":")
        path = f"{number}_{name}"
        modules.append({"idx": number, "name": str(number), "path": path, "type": LIBRARY + name})
        (folder / path).mkdir(exist_ok=True)
        width = _write_module(folder / path, name, options, width, case)
    tiny.write_json(folder / "modules.json", modules)
    return folder


def _write_module(folder, name, options, width, case):
    """Write one module's files; return how wide its result is."""
    if name == "Pooling":
        tiny.write_json(folder / "config.json", {"word_embedding_dimension": width} | case.pooling)
        modes = case.pooling.get(
            "pooling_mode",
            [x for x in case.pooling if x.startswith("pooling_mode") and case.pooling[x]] or "mean",
        )
        return width * (1 if isinstance(modes, str) else len(modes))
    if name != "Dense":
        return width
    activation, d_out, has_bias = options[0], int(options[1]), options[2:] != ["0"]
    tiny.write_json(
        folder / "config.json",
        {
            "in_features": width,
            "out_features": d_out,
            "bias": has_bias,
            "activation_function": activation,
        },
    )
    source = np.random.PCG64(d_out)
    tensors = {"linear.weight": drawn((d_out, width), source)} | (
        {"linear.bias": drawn((d_out,), source)} if has_bias else {}
    )
    tiny.write_safetensors(folder / "model.safetensors", tensors)
    return d_out
