"""npllm: the Phi-3 family of language models as plain NumPy and CuPy functions, with the
mathematics in the open.

    import npllm
    model = npllm.load()               # the default checkpoint, fetched on first use
    print(model.generate("The capital of France is"))

The words for axes, the same in every docstring and error:

    n_batch, n_seq       sequences; tokens of this call
    n_ctx                keys visible: cached + this call
    n_head, n_kv_head    query heads; key/value heads     (num_attention_heads, num_key_value_heads)
    n_layer, n_vocab     layers; entries of the vocabulary (num_hidden_layers, vocab_size)
    d_model, d_head      width of the residual stream; of a head (hidden_size, head_dim)
    d_ff                 width of the feed-forward network (intermediate_size)
    d_rope               rotated part of a head (d_head * partial_rotary_factor)
    n_pos, n_label       rows of a position table; classes (max_position_embeddings, num_labels)
    n_group, n_split     key/value heads after pooling; parts of a result

In brackets: the names in config.json.

`n_` counts things, `d_` is the width of a vector.  Queries, keys and values are [n_batch, n_head,
n_seq, d_head]: heads before positions.  Weights are [d_out, d_in], as in the checkpoint.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from typing import Any

from npllm import ops
from npllm.analysis import cost, packing, score, steps
from npllm.config import BertConfig, Config
from npllm.decoding import beam
from npllm.decoding.sampling import next_token_distribution
from npllm.encoder import Encoder
from npllm.errors import NpllmError
from npllm.model import Model, load, pipeline
from npllm.text.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "BertConfig",
    "Config",
    "Encoder",
    "Model",
    "NpllmError",
    "Tokenizer",
    "beam",
    "cost",
    "load",
    "next_token_distribution",
    "ops",
    "packing",
    "pipeline",
    "score",
    "steps",
]

# Modules that have moved: the old path, as it was imported, and where it is now.
_MOVED = {
    "bert_config": "config.bert_config",
    "int8": "quantized.int8",
    "checkpoint": "checkpoints",
    "upload": "checkpoints.upload",
    "fetch": "checkpoints.fetch",
    "convert": "checkpoints.convert_gguf",
    "tokenizer": "text.tokenizer",
    "template": "text.chat_template",
    "generate": "decoding",
    "beam": "decoding.beam",
    "score": "analysis.score",
    "packing": "analysis.packing",
    "steps": "analysis.steps",
    "cost": "analysis.cost",
    "profile": "analysis.profiling",
    "plots": "analysis.plots",
    "cache_owner": "cache.owner",
    "cache_state": "cache.state",
    "report": "analysis.report",
    **{
        f"kernels.{name}": f"kernels.cpu.{name}"
        for name in ("tiled", "compiled", "gemm", "gemv", "attention", "simd", "parts")
    },
}


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import a module under its old path: the same module object, imported when it is asked for."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:  # noqa: ARG002 - the protocol's signature
        """Claim the old paths."""
        moved = fullname.removeprefix("npllm.") in _MOVED and fullname.startswith("npllm.")
        return importlib.util.spec_from_loader(fullname, self) if moved else None

    def create_module(self, spec: Any) -> Any:
        """Return the module itself; its own spec is kept, since the import system overwrites it."""
        module = importlib.import_module("npllm." + _MOVED[spec.name.removeprefix("npllm.")])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: Any) -> None:
        """Put the module's own spec back; it has run already."""
        module.__spec__ = module.__spec__.loader_state


def __getattr__(name: str) -> Any:
    if name in _MOVED:
        return importlib.import_module(f"npllm.{name}")
    raise AttributeError(f"module 'npllm' has no attribute {name!r}")


sys.meta_path.append(_MovedModules())
