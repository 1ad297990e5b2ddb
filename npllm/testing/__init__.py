"""What npllm offers to people who test their own code: budgets, verdicts, conventions.

Here belongs what judges an implementation of an operation: its budget, the float64 answer, the
verdict, the diagnosis.  The operations themselves do not belong here, and nothing here needs pytest
or Hypothesis.
"""

import importlib
from typing import Any

_WHERE = {
    "Budget": "budgets",
    "budget": "budgets",
    "gold": "exact",
    "Verdict": "verdicts",
    "verdict": "verdicts",
    "where": "location",
    "adapt": "adapters",
    "Convention": "registry",
    "conventions": "registry",
    "Diagnosis": "diagnosis",
    "diagnose": "diagnosis",
    "Probe": "probe_inputs",
    "PROBES": "probe_inputs",
    "write_probes": "probes",
    "Bug": "planted",
    "bugs": "planted",
    "under_test": "mutation",
    **dict.fromkeys(
        (
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
        ),
        "laws",
    ),
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    """Import what is asked for, and nothing before it is."""
    if name not in _WHERE:
        raise AttributeError(
            f"module 'npllm.testing' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    return getattr(importlib.import_module(f"npllm.testing.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
