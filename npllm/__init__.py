"""npllm: the Phi-3 family of language models as plain NumPy and CuPy functions, with formulas
in the docstrings.

    import npllm
    model = npllm.load()                    # the default checkpoint, fetched on first use
    print(model.generate("The capital of France is"))

Names of axes, the same in every docstring and error message:

    n_batch, n_seq       sequences; tokens of this call
    n_ctx                visible keys: cached tokens and those of this call
    n_head, n_kv_head    query heads; key/value heads
    n_layer, n_vocab     layers; tokens of the vocabulary
    d_model, d_head      width of the residual stream; of a head
    d_ff                 width of the feed-forward network
    d_rope               rotated part of a head
    d_rank               rank of a LoRA adapter: width between its two factors
    n_pos, n_label       rows of a position table; classes of a classifier
    n_group, n_split     key/value heads after pooling; parts of a result

In config.json: num_attention_heads, num_key_value_heads, num_hidden_layers, vocab_size,
hidden_size, head_dim, intermediate_size, d_head * partial_rotary_factor, max_position_embeddings,
num_labels.

`n_` counts things, `d_` is the width of a vector.  Queries, keys and values are [n_batch, n_head,
n_seq, d_head]: heads before positions.  Weights are [d_out, d_in], as in the checkpoint.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npllm import ops
    from npllm.analysis import cost, packing, score, steps
    from npllm.config import BertConfig, Config
    from npllm.decoding import beam
    from npllm.decoding.sampler_chain import next_token_distribution
    from npllm.encoder import Encoder
    from npllm.errors import NpllmError
    from npllm.loading import load
    from npllm.merge_to_folder import merge
    from npllm.model import Model
    from npllm.page.explain import explain
    from npllm.pipelines import pipeline
    from npllm.quantize_to_gguf import quantize
    from npllm.text.tokenizer import Tokenizer
    from npllm.tracing.comparison.compare import compare
    from npllm.tracing.record import trace
    from npllm.tracing.trace import Trace

__version__ = "0.1.0"

__all__ = [
    "BertConfig",
    "Config",
    "Encoder",
    "Model",
    "NpllmError",
    "Tokenizer",
    "Trace",
    "beam",
    "compare",
    "cost",
    "explain",
    "load",
    "merge",
    "next_token_distribution",
    "ops",
    "packing",
    "pipeline",
    "quantize",
    "score",
    "steps",
    "trace",
]

# Public names -> the module that each is imported from at its first use: `import npllm` takes
# no time and `npllm.ops` needs neither tokenizers nor safetensors.
_PUBLIC = {
    "BertConfig": "config.bert_config",
    "Config": "config.config",
    "Encoder": "encoder",
    "Model": "model",
    "NpllmError": "errors",
    "Tokenizer": "text.tokenizer",
    "Trace": "tracing.trace",
    "compare": "tracing.comparison.compare",
    "explain": "page.explain",
    "load": "loading",
    "merge": "merge_to_folder",
    "next_token_distribution": "decoding.sampler_chain",
    "pipeline": "pipelines",
    "quantize": "quantize_to_gguf",
    "trace": "tracing.record",
}
_LIGHT = ("arrays", "errors", "ops", "testing")  # modules that are used without a model
_REPORT = (
    "analysis.inspect",
    "analysis.machine",
    "analysis.predictions",
    "analysis.speed",
    "analysis.steps",
    "cli.layout",
)
_GGUF = (
    *("config", "finite", "header", "layout", "metadata", "read_back", "rope", "sentencepiece"),
    *("sources", "tokenizer", "vocabulary", "weights"),
)
# Modules that have moved: the old path -> the new one, or those that a split module's names are in.
_MOVED: dict[str, str | tuple[str, ...]] = {
    "bert_config": "config.bert_config",
    "int8": "quantized.int8",
    "checkpoint": "checkpoints",
    "upload": "checkpoints.upload",
    "fetch": "checkpoints.fetch",
    "convert": "checkpoints.gguf.convert",
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
    "language_model": "model",
    "causal_lm": "forward_pass",
    "portable": "model_base",
    "decision": "finite_scores",
    "testing.judging": ("testing.within_budget", "testing.libraries"),
    "testing.judgement": "testing.diagnosis_status",
    "cache_owner": "cache.owner",
    "cache_state": "cache.state",
    "report": _REPORT,
    "analysis.report": _REPORT,
    "checkpoints.ggml_types": "checkpoints.gguf.ggml_types",
    "checkpoints.gguf_types": "checkpoints.gguf.tensor_types",
    "checkpoints.write_gguf": "checkpoints.gguf.writer",
    "checkpoints.convert_gguf": "checkpoints.gguf.convert",
    **{f"checkpoints.gguf_{name}": f"checkpoints.gguf.{name}" for name in _GGUF},
    **{
        f"kernels.{name}": f"kernels.cpu.{name}"
        for name in ("tiled", "compiled", "gemm", "gemv", "attention", "simd")
    },
    "kernels.parts": "kernels.cpu.dispatch",
    "kernels.cpu.parts": "kernels.cpu.dispatch",
    "quantization": "quantize_to_gguf",
    "decoding.sampling": "decoding.sampler_chain",
    "checkpoints.phi3_sources": "checkpoints.phi3_tensor_names",
    "models.rotations": "models.rope_tables",
    "testing.models": "testing.arithmetic_models",
    "testing.row_budgets": "testing.reduction_budgets",
    "testing.entry_budgets": "testing.elementwise_budgets",
    "ops.mask.dense": "ops.mask.causal_and_window",
    "analysis.cost.kv_cache": "analysis.cost.cache_bytes",
    "analysis.cost.weights": "analysis.cost.weight_bytes",
}


class _MovedModules:
    """Import a module under its old path: the same module object, imported at the first use."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002 - the protocol's signature
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """Claim the old paths."""
        moved = fullname.removeprefix("npllm.") in _MOVED and fullname.startswith("npllm.")
        loader: Any = self
        return importlib.util.spec_from_loader(fullname, loader) if moved else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module at the new path; its own spec is kept, since the import system
        overwrites it.
        """
        new = _MOVED[spec.name.removeprefix("npllm.")]
        if isinstance(new, tuple):
            return _SplitModule(spec.name, new)
        module = importlib.import_module("npllm." + new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec; its code has run already."""
        if not isinstance(module, _SplitModule) and module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state


class _SplitModule(ModuleType):
    """The old path of a module that was split: looks each name up in the new modules."""

    def __init__(self, name: str, new: tuple[str, ...]) -> None:
        super().__init__(name, f"Moved to {', '.join(f'npllm.{path}' for path in new)}.")
        self._new = new

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):
            for path in self._new:
                module = importlib.import_module(f"npllm.{path}")
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def __getattr__(name: str) -> Any:
    """Import a public name, or a module, at its first use."""
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"npllm.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    if name in _MOVED:
        return importlib.import_module(f"npllm.{name}")
    if name.startswith("_") or importlib.util.find_spec(f"npllm.{name}") is None:
        raise AttributeError(f"module 'npllm' has no attribute {name!r}")
    asks = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
    if (
        asks not in ("importlib", "npllm") and name not in _LIGHT
    ):  # `import` and npllm need it alone
        for module in _PUBLIC.values():  # a user's npllm.models.phi3 is there without an import
            importlib.import_module(f"npllm.{module}")
    return importlib.import_module(f"npllm.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.meta_path.append(_MovedModules())  # type: ignore[arg-type]
