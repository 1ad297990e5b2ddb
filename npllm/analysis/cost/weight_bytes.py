"""Bytes of a model's weights by part: in one type, or as a GGUF file stores them."""

from pathlib import Path

from npllm.analysis.cost.parameters import bias_sizes, linear_shapes, require_lm
from npllm.arrays import DTYPES, dtype_named
from npllm.checkpoints.gguf.layout import layer_kinds
from npllm.checkpoints.gguf.reader import GGUFFile
from npllm.config.config import Config
from npllm.quantized.dtypes import check_dtype, matrix_bytes

__all__ = ["WeightBytes", "activation_bytes", "gguf_weight_bytes", "total_bytes", "weight_bytes"]

WeightBytes = dict[str, int]
"""embedding, lm_head (what a product with it reads, tied or not), norms; and qkv, o, gate_up and
down of all layers together."""
NORMS = ("input_layernorm", "post_attention_layernorm")


def weight_bytes(config: Config, dtype: str | None = None) -> WeightBytes:
    """Count the bytes of all weights in one type.

    Parameters
    ----------
    config : Config
        Of a causal language model.
    dtype : str, optional
        One of `npllm.quantized.dtypes.NAMES`; in "int8" and "int4" norms and biases stay as
        config.json says.  Default: as config.json says.

    Returns
    -------
    n_bytes : dict of str to int
    """
    require_lm(config)
    check_dtype(dtype)
    kind = dtype or config.dtype
    vector = dtype_named(kind if kind in DTYPES else config.dtype).itemsize
    n_layer, biases = config.num_hidden_layers, bias_sizes(config)
    vocabulary = matrix_bytes(config.vocab_size, config.hidden_size, kind)
    return {
        "embedding": vocabulary,
        "lm_head": vocabulary,
        "norms": (2 * n_layer + 1) * config.hidden_size * vector,
        **{
            name: n_layer * (matrix_bytes(d_out, d_in, kind) + biases[name] * vector)
            for name, (d_out, d_in) in linear_shapes(config).items()
        },
    }


def gguf_weight_bytes(path: Path) -> WeightBytes:
    """Count the bytes of all weights of a GGUF file, as it stores them."""
    gguf = GGUFFile(path)
    sizes = {name: x.rows.nbytes for name, x in gguf.tensors.items()}
    by_kind: dict[str, int] = {}
    for name, n in sizes.items():
        if name.startswith("blk."):
            kind = name.split(".")[2]
            by_kind[kind] = by_kind.get(kind, 0) + n
    fields = {
        field.removesuffix("_proj"): sum(by_kind.get(kind, 0) for kind in kinds)
        for field, kinds in layer_kinds(gguf.architecture).items()
    }
    embedding = sizes["token_embd.weight"]
    norms = sum(fields.pop(name) for name in NORMS) + sizes["output_norm.weight"]
    lm_head = sizes.get("output.weight", embedding)
    return {"embedding": embedding, "lm_head": lm_head, "norms": norms, **fields}


def total_bytes(weights: WeightBytes, config: Config) -> int:
    """Add up the bytes of all weights; a matrix that is tied counts once."""
    return sum(weights.values()) - (weights["lm_head"] if config.tie_word_embeddings else 0)


def activation_bytes(config: Config, dtype: str | None) -> int:
    """Return the bytes of a number of an activation: 8 where weights are float64, else 4."""
    return 8 if (dtype or config.dtype) == "float64" else 4
