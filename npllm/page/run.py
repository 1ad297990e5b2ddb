"""The traced run that the page shows, and how long a prompt may be."""

from typing import Any, NamedTuple

import numpy as np

from npllm.arguments import check_integer
from npllm.decoding.prompt import read_prompt
from npllm.encoder import Encoder
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.model import Model
from npllm.tracing.record import trace
from npllm.tracing.trace import Trace

__all__ = ["MOST_BYTES", "Run", "most_tokens", "record"]

Array = Any

MOST_BYTES = 6_000_000  # of a page
MOST_TOKENS = 64  # labels of a figure that a reader can still tell apart
ROOM = 1_500_000  # bytes of a page that do not depend on the length of the prompt

EVERY_LAYER = ("residual", "self_attn.o_proj", "self_attn.weights", "mlp.down_proj")
ONE_LAYER = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.q",
    "self_attn.k",
    "self_attn.v",
    "self_attn.heads",
    "mlp.swiglu",
)


class Run(NamedTuple):
    """A prompt, and the trace of the model on it."""

    model: Model
    prompt: str  # the text; of a conversation, or of ids, what they decode to
    ids: list[int]  # n_seq
    layer: int  # whose values are shown in full
    n_new: int  # tokens that were decoded greedily
    trace: Trace

    def text(self, token: int) -> str:
        """The text of a token; its id where there is no tokenizer."""
        tokenizer = self.model.tokenizer
        return tokenizer.token_text(token) if tokenizer else str(int(token))

    def token(self, token: Any) -> dict[str, Any]:
        """A token as the page holds it."""
        return {"id": int(token), "text": self.text(int(token))}

    def value(self, name: str) -> Array:
        """A value of step 0 without its axis n_batch, in float64."""
        return np.asarray(self.trace[name][0], np.float64)

    def of_layer(self, name: str, layer: int | None = None) -> Array:
        """A value of a layer, by default of the one that is shown in full."""
        return self.value(f"model.layers.{self.layer if layer is None else layer}.{name}")

    def logits(self, step: int = 0) -> Array:
        """The logits behind the last token of a step: float32 [n_vocab]."""
        return self.trace["lm_head" if step == 0 else f"lm_head@{step}"][0, -1]


def most_tokens(config: Any) -> int:
    """Count the tokens of the longest prompt that a page of less than 6 MB holds.

        bytes = n_layer * n_head * n**2 / 2 * 3 + n * (3 * d_model + 3 * d_qkv) * 7 + n_vocab * 7

    Parameters
    ----------
    config : Config

    Returns
    -------
    n : int
        At most 64.
    """
    heads = config.num_hidden_layers * config.num_attention_heads
    d_qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    wide = 3 * config.hidden_size + 3 * d_qkv + 10 * config.num_hidden_layers
    free = MOST_BYTES - ROOM - 7 * config.vocab_size
    sizes = range(1, MOST_TOKENS + 1)
    fitting = [n for n in sizes if 1.5 * heads * n * n + 7 * wide * n <= free]
    return min(max([1, *fitting]), config.context_length - 1)


def record(model: Any, prompt: Any, layer: int | None, n_new: int) -> Run:
    """Trace a prompt, and the tokens that the model continues it with.

    Raises
    ------
    NpllmTypeError, NpllmValueError
        For an encoder, several prompts, a prompt that is too long, a layer that does not exist.
    """
    _check_model(model)
    n_layer = model.config.num_hidden_layers
    layer = n_layer // 2 if layer is None else layer
    layer = check_integer("layer", layer, 0, n_layer - 1)
    found = read_prompt(model, prompt)
    if len(found.ids) != 1:
        raise NpllmValueError(f"a page shows one prompt, got {len(found.ids)}")
    ids = found.ids[0].tolist()
    _check_length(model.config, len(ids))
    n_most = model.config.context_length - len(ids)
    n_new = min(check_integer("max_new_tokens", n_new, 1, 32), n_most)
    traced = trace(model, found.ids, names=_names(n_layer, layer), max_new_tokens=n_new)
    return Run(model, _text_of(model, prompt, ids), ids, layer, n_new, traced)


def _check_model(model: Any) -> None:
    if isinstance(model, Encoder):
        raise NpllmTypeError(
            "the page explains a causal language model, and this is an encoder, which predicts no "
            "next token: give a Phi-3 or Llama checkpoint; model.embed(texts) uses an encoder"
        )
    if not isinstance(model, Model):
        raise NpllmTypeError(
            f"explain takes a Model, as npllm.load gives one, got {type(model).__name__}"
        )


def _check_length(config: Any, n: int) -> None:
    n_most = most_tokens(config)
    if n > n_most:
        heads = config.num_hidden_layers * config.num_attention_heads
        raise NpllmValueError(
            f"the prompt must have at most {n_most} tokens, so that the page with the attention of "
            f"{heads} heads stays below {MOST_BYTES // 10**6} MB, got {n}: shorten it"
        )


def _names(n_layer: int, layer: int) -> list[str]:
    """Names of the values that the page shows; all but the logits of step 0 only."""
    every = [f"model.layers.*.{name}@0" for name in EVERY_LAYER]
    one = [f"model.layers.{layer}.{name}@0" for name in ONE_LAYER]
    outputs = [f"model.layers.{n}@0" for n in range(n_layer)]
    return ["model.embed_tokens@0", *outputs, *every, *one, "model.norm@0", "lm_head"]


def _text_of(model: Any, prompt: Any, ids: list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    if model.tokenizer is None:
        return " ".join(map(str, ids))
    return model.tokenizer.decode(ids, skip_special_tokens=False)
