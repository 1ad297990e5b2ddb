"""Which values of a run a trace keeps: by name, by layer, by position."""

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from npllm.arguments import check_integer
from npllm.config.strict_json import quote
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.models.taps import PAIRS
from npllm.tracing.graph import graph
from npllm.tracing.index import layer_of

__all__ = ["Selection"]

Array = Any

PAIR_ENDS = tuple(name.rpartition(".")[2] for name in PAIRS)  # "mask", "weights"


class Selection:
    """What a trace keeps of a run.

    Parameters
    ----------
    n_layers, n_prompt, n_steps : int
        Of the run: layers, tokens of the prompt, forward passes.
    names : str or sequence of str, optional
        Names or patterns; None: all but `npllm.models.taps.PAIRS`.
    layers : int or sequence of int, optional
        None: all.  Values outside of the layers are kept in any case.
    tokens : int or sequence of int, optional
        Positions in the sequence, prompt and new tokens; negative ones count from the end of the
        prompt.  None: all.

    Attributes
    ----------
    has_pairs : bool
        Whether masks or attention weights are wanted.

    Raises
    ------
    NpllmValueError
        For a layer or position that the run does not have, and a name that matches no value.
    """

    def __init__(
        self,
        n_layers: int,
        n_prompt: int,
        n_steps: int,
        *,
        names: Any = None,
        layers: Any = None,
        tokens: Any = None,
    ) -> None:
        self._n_prompt, last = n_prompt, n_layers - 1
        self._layers = {
            check_integer("layers", n, 0, last) for n in _listed(layers, range(last + 1))
        }
        self._patterns = None if names is None else list(map(_text, _listed(names, ())))
        self._tokens = None
        if tokens is not None:
            most = n_prompt + n_steps - 2
            kept = [check_integer("tokens", n, -n_prompt, most) for n in _listed(tokens, ())]
            self._tokens = np.array(sorted({n + n_prompt * (n < 0) for n in kept}), dtype=np.int64)
        known = _known(n_layers, n_steps > 1)
        for pattern in self._patterns or ():
            _check_pattern(pattern, known, n_steps)
        self.has_pairs = any(_is_pair(pattern) for pattern in self._patterns or ())

    def wants(self, node: str, step: int) -> bool:
        """Tell whether a value of a step is kept."""
        layer = layer_of(node)
        if layer is not None and layer not in self._layers:
            return False
        if self._patterns is None:
            return not _is_pair(node)
        return any(_matches(pattern, node, step) for pattern in self._patterns)

    def places(self, n_past: int, n_seq: int) -> Array | None:
        """Return which of the n_seq positions of a step are kept; None: all of them."""
        if self._tokens is None:
            return None
        places = self._tokens - n_past
        return places[(places >= 0) & (places < n_seq)]


def _listed(given: Any, default: Sequence[Any]) -> Sequence[Any]:
    """A list of what was given alone, or in a sequence or array; the default for None."""
    if given is None:
        return default
    given = given.tolist() if hasattr(given, "tolist") else given
    return list(given) if isinstance(given, list | tuple | range | set) else [given]


def _text(pattern: Any) -> str:
    if not isinstance(pattern, str):
        raise NpllmTypeError(f"names must be names or patterns, got {quote(pattern)}")
    return pattern


def _known(n_layers: int, cached: bool) -> list[str]:
    """Names of all values of a step."""
    pairs = [name.replace(".N.", f".{n}.") for n in range(n_layers) for name in PAIRS]
    return [*graph(n_layers, cached=cached), *pairs]


def _is_pair(name: str) -> bool:
    """Tell whether a name or pattern asks for a table of n_seq x n_ctx: by its last word."""
    return name.partition("@")[0].endswith(PAIR_ENDS)


def _matches(pattern: str, node: str, step: int) -> bool:
    """Tell whether a name or pattern means a value: in all steps, or in the one behind "@"."""
    if _is_pair(node) and not _is_pair(pattern):
        return False
    return fnmatchcase(node, pattern) or fnmatchcase(f"{node}@{step}", pattern)


def _check_pattern(pattern: str, known: list[str], n_steps: int) -> None:
    """Raise for a name or pattern that means no value of the run."""
    if any(_matches(pattern, node, step) for step in range(n_steps) for node in known):
        return
    near = get_close_matches(pattern, known, 3, 0.0)
    raise NpllmValueError(
        f"names has {quote(pattern)}, which matches no value of {n_steps} step(s); "
        f"values are called {', '.join(near)}"
    )
