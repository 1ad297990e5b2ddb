"""Every operation a second time, with each convention as a fork: what `diagnose` tries one by one.

Belongs here: plain NumPy formulas in float64 that take the options as an argument.  Does not: any
code of `npllm.ops`, with which the forms share nothing but the mathematics.
"""

from npllm.testing.forms.common import EXACT, Answer, Array, Choice, NotApplicableError, Work
from npllm.testing.forms.table import OPS, Op, evaluate, op_named, prepare

__all__ = [
    "EXACT",
    "OPS",
    "Answer",
    "Array",
    "Choice",
    "NotApplicableError",
    "Op",
    "Work",
    "evaluate",
    "op_named",
    "prepare",
]
