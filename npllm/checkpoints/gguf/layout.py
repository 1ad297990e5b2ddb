"""Which tensors a GGUF file holds, their shapes, and which of them make each weight."""

from npllm.checkpoints.gguf.reader import GGUFFile
from npllm.checkpoints.gguf.rope import ROPE_TENSORS
from npllm.config.config import Config
from npllm.config.strict_json import quote
from npllm.errors import NpllmValueError

__all__ = ["check_tensors", "expected_tensors", "layer_kinds"]

Shape = tuple[int, ...]


def layer_kinds(architecture: str) -> dict[str, list[str]]:
    """List the fields of LayerParams, and the kinds of tensors whose rows they concatenate."""
    is_fused = architecture == "phi3"
    return {
        "input_layernorm": ["attn_norm"],
        "qkv_proj": ["attn_qkv"] if is_fused else ["attn_q", "attn_k", "attn_v"],
        "o_proj": ["attn_output"],
        "post_attention_layernorm": ["ffn_norm"],
        "gate_up_proj": ["ffn_up"] if is_fused else ["ffn_gate", "ffn_up"],
        "down_proj": ["ffn_down"],
    }


def expected_tensors(config: Config, architecture: str) -> dict[str, Shape]:
    """List every tensor that a GGUF file of this configuration holds: name -> shape.

    Parameters
    ----------
    config : Config
    architecture : str
        "phi3", whose projections are fused as in `Params`, or "llama".
    """
    n_vocab, d_model, d_ff = config.vocab_size, config.hidden_size, config.intermediate_size
    d_q = config.num_attention_heads * config.head_dim
    d_kv = config.num_key_value_heads * config.head_dim
    is_fused = architecture == "phi3"
    shapes: dict[str, Shape] = {
        "attn_norm": (d_model,),
        "ffn_norm": (d_model,),
        "attn_qkv": (d_q + 2 * d_kv, d_model),
        "attn_q": (d_q, d_model),
        "attn_k": (d_kv, d_model),
        "attn_v": (d_kv, d_model),
        "attn_output": (d_model, d_q),
        "ffn_gate": (d_ff, d_model),
        "ffn_up": (2 * d_ff if is_fused else d_ff, d_model),
        "ffn_down": (d_model, d_ff),
    }
    kinds = [kind for kinds in layer_kinds(architecture).values() for kind in kinds]
    expected: dict[str, Shape] = {"token_embd.weight": (n_vocab, d_model)}
    expected |= {
        f"blk.{number}.{kind}.weight": shapes[kind]
        for number in range(config.num_hidden_layers)
        for kind in kinds
    }
    expected["output_norm.weight"] = (d_model,)
    return expected | ({} if config.tie_word_embeddings else {"output.weight": (n_vocab, d_model)})


def check_tensors(gguf: GGUFFile, expected: dict[str, Shape]) -> None:
    """Raise if a tensor is missing, unknown or of another shape.

    Parameters
    ----------
    gguf : GGUFFile
    expected : dict of str to tuple of int
        Name of every tensor -> its shape.

    Raises
    ------
    NpllmValueError
    """
    missing = sorted(set(expected) - set(gguf.tensors))
    unknown = sorted(set(gguf.tensors) - set(expected) - set(ROPE_TENSORS))
    if missing or unknown:
        raise NpllmValueError(
            f"{gguf.path}: tensors missing: {quote(missing[:3])}, "
            f"tensors that would be dropped: {quote(unknown[:3])}"
        )
    for name, shape in expected.items():
        if gguf.tensors[name].shape != shape:
            raise NpllmValueError(
                f"{gguf.path}: {name} must be {list(shape)}, got {list(gguf.tensors[name].shape)}"
            )
