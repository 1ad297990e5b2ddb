"""What npllm offers to people who test their own code: adapters, error budgets, verdicts.

Here belongs what judges an implementation of an operation: its budget, the float64 answer, the
verdict.  The operations themselves do not belong here, and nothing here needs pytest or Hypothesis.
"""

import importlib

_WHERE = {
    "Budget": "budgets",
    "budget": "budgets",
    "gold": "exact",
    "Verdict": "verdicts",
    "verdict": "verdicts",
    "where": "location",
    "adapt": "adapters",
}
__all__ = sorted(_WHERE)


def __getattr__(name):
    """Import what is asked for, and nothing before it is."""
    if name not in _WHERE:
        raise AttributeError(
            f"module 'npllm.testing' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    return getattr(importlib.import_module(f"npllm.testing.{_WHERE[name]}"), name)


def __dir__():
    return __all__
