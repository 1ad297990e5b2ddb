"""Spellings of older files, and what they are called today.  The one table of them."""

__all__ = ["ARCHITECTURES", "POOLINGS", "ROPE_TYPES", "TENSOR_ENDINGS", "modern_tensor_name"]

# config.json, `architectures`.
ARCHITECTURES = {"LLaMAForCausalLM": "LlamaForCausalLM"}  # early 2023

# config.json, `rope_scaling.type` of model_type phi3.
ROPE_TYPES = {"su": "longrope", "yarn": "longrope"}  # April 2024

# Endings of tensor names: TensorFlow's terms in BERT files of before 2020.
TENSOR_ENDINGS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

# 1_Pooling/config.json of sentence-transformers before 5.0: one flag for each mode.
POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def modern_tensor_name(name: str) -> str:
    """Return the name of a tensor as files have it today."""
    for old, new in TENSOR_ENDINGS.items():
        if name.endswith("." + old):
            return name.removesuffix(old) + new
    return name
