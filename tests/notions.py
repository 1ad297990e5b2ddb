"""The twenty notions of the chapter, and the words that the tables of contents have for them."""

IN_PAGE = {
    "pipeline": "Pipeline",
    "autoregression": "Autoregression",
    "forward pass": "Forward pass",
    "tokenizer and embedding": "Tokenizer and embedding",
    "module tree": "Module tree",
    "logits and distribution": "Logits and distribution",
    "decoding": "Decoding: greedy, temperature, top-k, top-p",
    "parallel streams and context length": "Parallel streams and context length",
    "KV cache": "KV cache",
    "block": "Block",
    "feed-forward as memory": "Feed-forward network as memory",
    "attention step by step": "Attention step by step",
    "heads": "Heads",
    "local and sparse attention": "Local and sparse attention, alternating with full",
    "MHA, MQA, GQA": "MHA, GQA and MQA",
    "FlashAttention": "FlashAttention",
    "norms": "Pre-norm, RMSNorm and SwiGLU against post-norm, LayerNorm and ReLU",
    "positions": "Positions: RoPE as rotation matrices",
    "packing": "Packing",
    "other heads": "Other heads and encoder-only models",
}
"""Notion -> its entry in the contents of the explain page."""

IN_SITE = IN_PAGE | {
    "heads": "Heads: every head of a layer",
    "other heads": "Other heads: language model, classifier, tagger",
    "encoder-only models": "Encoder-only models",
}
"""Notion -> its entry in the contents of the documentation site, which has one more."""
