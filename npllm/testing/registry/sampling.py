"""Conventions of the sampler, and of turning ids into text."""

from npllm.testing.registry.convention import Convention, Option

__all__ = ["ENTRIES"]

SAMPLER = ("sampler",)

ENTRIES = [
    Convention(
        "C15",
        "Order of the sampler's filters",
        {
            "temperature first": Option("Temperature, top-k, top-p, min-p (Transformers)."),
            "temperature last": Option("Top-k, top-p, min-p, temperature (llama.cpp).", SAMPLER),
            "top-p before top-k": Option("Temperature, top-p, top-k, min-p.", SAMPLER),
            "min-p first": Option("Temperature, min-p, top-k, top-p.", SAMPLER),
        },
        SAMPLER,
        "support",
        "Temperature, top-k, top-p, min-p.",
        "sglang#36173",
    ),
    Convention(
        "C16",
        "Boundary of top-p, ties of top-k",
        {
            "at least p": Option(
                "The smallest set whose mass is at least p; ties with the k-th logit are kept."
            ),
            "at most p": Option("The largest set whose mass is at most p.", SAMPLER),
            "more than p": Option("The smallest set whose mass is more than p.", SAMPLER),
            "ties in top-k cut": Option("Exactly k tokens, the lower id first.", SAMPLER),
        },
        SAMPLER,
        "support",
        "The token that reaches p is kept, and the set ends there; ties are kept.",
        "flashinfer#2202",
    ),
    Convention(
        "C17",
        "Renormalisation after filters",
        {
            "softmax of what is left": Option(
                "Each filter sees the distribution that the one before it left."
            ),
            "filters see the whole": Option(
                "Each filter sees the probabilities before any filter.", SAMPLER
            ),
            "not renormalised": Option(
                "The probabilities that are left are not divided by their sum.", SAMPLER
            ),
        },
        SAMPLER,
        "support",
        "Filters act on logits, so that each softmax renormalises.",
        "sglang#36173",
    ),
    Convention(
        "C20",
        "Text of a stream",
        {
            "whole-prefix difference": Option(
                "What decode(all ids) adds; held back while a character is incomplete."
            ),
            "token by token": Option(
                "Each id is decoded alone: spaces are lost, characters broken.", ("detokenize",)
            ),
            "incomplete shown": Option(
                "An incomplete character is shown as U+FFFD, and the whole one is lost.",
                ("detokenize",),
            ),
        },
        ("detokenize",),
        "text",
        "A stream shows the difference of whole-prefix decodes.",
        "ferrox#124",
    ),
]
"""Conventions of this file."""
