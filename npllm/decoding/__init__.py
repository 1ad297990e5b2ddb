"""From logits to token ids: options, prompt, sampling, the loop, beam search.

Belongs here: whatever decides the next token.  Does not: filters as array functions (ops/), text
(text/).
"""

from npllm.decoding.beam import Beams, beam_search, beam_texts
from npllm.decoding.details import Answer, GenerateOutput, StreamStep, Token
from npllm.decoding.generation_config import Constraints, GenerationConfig, Sampling
from npllm.decoding.loop import Generation, generate_tokens, last_logits, start
from npllm.decoding.options import Options, resolve_options, resolve_sampling
from npllm.decoding.prompt import Prompt, is_chat, read_prompt
from npllm.decoding.sampler_chain import (
    FILTER_ORDERS,
    choose,
    filter_logits,
    next_token_distribution,
    uniforms,
)
from npllm.decoding.sequences import Sequences, seen_tokens

__all__ = [
    "FILTER_ORDERS",
    "Answer",
    "Beams",
    "Constraints",
    "GenerateOutput",
    "Generation",
    "GenerationConfig",
    "Options",
    "Prompt",
    "Sampling",
    "Sequences",
    "StreamStep",
    "Token",
    "beam_search",
    "beam_texts",
    "choose",
    "filter_logits",
    "generate_tokens",
    "is_chat",
    "last_logits",
    "next_token_distribution",
    "read_prompt",
    "resolve_options",
    "resolve_sampling",
    "seen_tokens",
    "start",
    "uniforms",
]
