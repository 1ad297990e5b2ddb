"""From logits to token ids: options, prompt, sampling, the loop, beam search.

Belongs here: whatever decides the next token.  Does not: filters as array functions (ops/sampling),
text (text/).
"""

from npllm.decoding.generation_config import GenerationConfig

__all__ = ["GenerationConfig"]
