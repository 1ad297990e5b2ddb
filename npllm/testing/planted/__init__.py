"""Planted bugs: wrong implementations to try a test suite on.

Belongs here: functions with the signature of an operation that are wrong in one way.  Does not: the
float64 answer of an option (forms/), which they check.
"""

from npllm.testing.planted import attention, faults, masks, rope, rows, sampling
from npllm.testing.planted.bug import BUGS, TESTED_AS, Bug, plant, run

__all__ = ["TESTED_AS", "Bug", "bugs", "plant", "run"]

bugs = BUGS
"""Name -> Bug."""

_ = (attention, faults, masks, rope, rows, sampling)  # importing them is what lists the bugs
