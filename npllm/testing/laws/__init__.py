"""Laws: what must hold for any input, checked on cases drawn by Hypothesis.

Belongs here: how a case becomes arrays, what is held against the output, what a failure says.  Does
not: the drawing of cases (`npllm.testing.strategies`, the only file that imports Hypothesis).
"""

from npllm.testing.laws.broken import LawBroken
from npllm.testing.laws.checks import (
    Report,
    check,
    check_attention,
    check_linear,
    check_rms_norm,
    check_rope,
    check_sampler,
    check_swiglu,
    replay,
)
from npllm.testing.laws.decoder import check_decoder
from npllm.testing.laws.subjects import SUBJECTS

__all__ = [
    "SUBJECTS",
    "LawBroken",
    "Report",
    "check",
    "check_attention",
    "check_decoder",
    "check_linear",
    "check_rms_norm",
    "check_rope",
    "check_sampler",
    "check_swiglu",
    "replay",
]
