"""The sections of the page, in the order of the chapter."""

from collections.abc import Callable
from typing import Any, NamedTuple

from npllm.page.data import block, heads, masks, packed, positions, prediction, streams, text
from npllm.page.run import Run

__all__ = ["SECTIONS", "Section"]


class Section(NamedTuple):
    """A section: its heading, what it refers to, and the function that gives its numbers."""

    name: str  # of the template, of the script, of the entry in the data, and of the link
    title: str
    figures: str  # of the chapter
    functions: tuple[str, ...]
    docs: str  # page and heading under docs/
    data: Callable[[Run], dict[str, Any]]


SECTIONS = (
    Section(
        "pipeline",
        "Pipeline",
        "3-1",
        ("npllm.pipeline", "npllm.Model.generate"),
        "chapter.md#pipeline",
        text.pipeline,
    ),
    Section(
        "autoregression",
        "Autoregression: one token at a time",
        "3-2, 3-3",
        ("npllm.Model.stream", "npllm.analysis.score.score"),
        "chapter.md#autoregression",
        text.autoregression,
    ),
    Section(
        "forward",
        "Forward pass: the three parts",
        "3-4",
        ("npllm.models.phi3.forward",),
        "chapter.md#forward-pass",
        text.forward,
    ),
    Section(
        "tokens",
        "Tokenizer and embedding",
        "3-4, 3-5",
        ("npllm.Tokenizer.encode", "npllm.ops.embed"),
        "chapter.md#tokenizer-and-embedding",
        text.tokens,
    ),
    Section(
        "tree",
        "Module tree",
        "print(model)",
        ("npllm.models.module_tree.describe",),
        "chapter.md#module-tree",
        text.tree,
    ),
    Section(
        "logits",
        "Logits and distribution",
        "3-6",
        ("npllm.ops.lm_head", "npllm.ops.softmax"),
        "chapter.md#logits-and-distribution",
        prediction.logits,
    ),
    Section(
        "decoding",
        "Decoding: greedy, temperature, top-k, top-p, beam search",
        "3-7",
        ("npllm.next_token_distribution", "npllm.ops.sample", "npllm.decoding.beam.beam_search"),
        "chapter.md#decoding-greedy-temperature-top-k-top-p",
        prediction.decoding,
    ),
    Section(
        "streams",
        "Parallel streams and context length",
        "3-8, 3-9",
        ("npllm.Model.model", "npllm.ops.mask.causal"),
        "chapter.md#parallel-streams-and-context-length",
        streams.streams,
    ),
    Section(
        "cache",
        "KV cache",
        "3-10",
        ("npllm.cache.KVCache", "npllm.analysis.cost.kv_cache_bytes"),
        "chapter.md#kv-cache",
        streams.cache,
    ),
    Section(
        "block",
        "Block: the residual stream and the logit lens",
        "3-11, 3-12",
        ("npllm.models.phi3.decoder_layer", "npllm.tracing.lens.lens"),
        "chapter.md#block",
        block.block,
    ),
    Section(
        "feedforward",
        "Feed-forward network as memory",
        "3-12",
        ("npllm.models.phi3.mlp_block", "npllm.ops.swiglu"),
        "chapter.md#feed-forward-network-as-memory",
        block.feedforward,
    ),
    Section(
        "attention",
        "Attention step by step",
        "3-14 to 3-21",
        ("npllm.ops.attention", "npllm.analysis.steps.attention_steps"),
        "chapter.md#attention-step-by-step",
        heads.attention,
    ),
    Section(
        "heads",
        "Heads: all layers and heads",
        "3-26",
        ("npllm.ops.attention_weights", "npllm.tracing.lens.summarize_attention"),
        "chapter.md#heads-every-head-of-a-layer",
        heads.heads,
    ),
    Section(
        "masks",
        "Local and sparse attention, alternating with full",
        "3-22 to 3-24",
        ("npllm.ops.mask.to_bool", "npllm.Model.with_mask"),
        "chapter.md#local-and-sparse-attention-alternating-with-full",
        masks.masks,
    ),
    Section(
        "sharing",
        "MHA, GQA and MQA",
        "3-26 to 3-28",
        ("npllm.ops.attention", "npllm.analysis.cost.kv_table"),
        "chapter.md#mha-gqa-and-mqa",
        heads.sharing,
    ),
    Section(
        "flash",
        "FlashAttention",
        "no figure",
        ("npllm.ops.blockwise_attention", "npllm.ops.attention_io"),
        "chapter.md#flashattention",
        masks.flash,
    ),
    Section(
        "norms",
        "Pre-norm, RMSNorm and SwiGLU against post-norm, LayerNorm and ReLU",
        "3-29, 3-30",
        ("npllm.ops.rms_norm", "npllm.ops.swiglu", "npllm.models.transformer.encoder_layer"),
        "chapter.md#pre-norm-rmsnorm-and-swiglu-against-post-norm-layernorm-and-relu",
        block.norms,
    ),
    Section(
        "rope",
        "Positions: RoPE as rotation matrices",
        "3-32, 3-33",
        ("npllm.ops.apply_rope", "npllm.ops.rope_tables", "npllm.ops.rotation_matrix"),
        "chapter.md#positions-rope-as-rotation-matrices",
        positions.rope,
    ),
    Section(
        "packing",
        "Packing",
        "3-31",
        ("npllm.analysis.packing.pack", "npllm.ops.mask.documents"),
        "chapter.md#packing",
        packed.packing,
    ),
    Section(
        "other_heads",
        "Other heads and encoder-only models",
        "no figure",
        (
            "npllm.models.heads.classify_sequence",
            "npllm.models.heads.classify_tokens",
            "npllm.ops.mask.bidirectional",
        ),
        "chapter.md#encoder-only-models",
        streams.other_heads,
    ),
)
