"""What is measured or counted of a model: scores, costs, times, plots, reports.

Belongs here: functions that return numbers for a reader.  Does not: layout on a terminal (cli/),
correctness (testing/).
"""

import importlib
import importlib.util
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """Import a module of this folder at its first use: `npllm.analysis.score`."""
    if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
