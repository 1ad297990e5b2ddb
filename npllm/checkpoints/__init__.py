"""Files and folders of weights to `Params`, and where they come from.

Belongs here: formats, layouts, downloads.
Does not belong here: what is computed with the weights (models/, ops/).
"""

from npllm.checkpoints.finite import find_nonfinite
from npllm.checkpoints.phi3_layout import check_entries, expected_shapes, load_params
from npllm.checkpoints.safetensors import TensorEntry, check_shapes, read_entries
from npllm.checkpoints.tensor_reader import TensorReader
from npllm.models.params import LayerParams, Params

__all__ = [
    "LayerParams",
    "Params",
    "TensorEntry",
    "TensorReader",
    "check_entries",
    "check_shapes",
    "expected_shapes",
    "find_nonfinite",
    "load_params",
    "read_entries",
]
