"""Whether a recorded value is what flowed: its operation and those that read it are asked.

only the producer disagrees            the operation is wrong
producer and readers disagree, and     the tensor never flowed: the wrong place was recorded,
the readers agree with the answer      or only a part of it
nobody that reads it is changed by     harmless
the right value in its place
"""

from typing import Any

from npllm.tracing.graft import NONE, NotRecordedError, Run, Without
from npllm.tracing.steps import key_of

__all__ = ["agrees", "flow", "readers", "rotation_keys"]

Array = Any

MOST = 3  # readers that are asked


def flow(run: Run, name: str, t: int, is_readable: bool = True) -> str:
    """Ask the readers of a value that its own operation disagrees with.

    Parameters
    ----------
    run : Run
    name : str
    t : int
    is_readable : bool
        False where the recorded value does not even have the right shape.

    Returns
    -------
    answer : str
        "wrong", "wrong capture" or "harmless".
    """
    found = readers(run, name, t)
    if not found:
        return "wrong"
    key = frozenset([key_of(name, t)])
    with_ours = all(agrees(run, one, t, key) for one in found)
    if not with_ours:
        return "wrong"
    if not is_readable:
        return "wrong capture"
    return "harmless" if all(agrees(run, one, t) for one in found) else "wrong capture"


def readers(run: Run, name: str, t: int) -> list[str]:
    """Name the nearest recorded values that are made from a value, in the same step."""
    nodes, reached, found = run.graphs[t], {name}, []
    for other, node in nodes.items():
        if reached.intersection(node.inputs):
            if run.has(other, t):
                found.append(other)
            else:
                reached.add(other)
        if len(found) == MOST:
            break
    return found


def agrees(run: Run, name: str, t: int, without: Without = NONE) -> bool:
    """Tell whether a value is right for its inputs, some of which are computed anew."""
    try:
        exact = run.exact(name, t, without)
    except NotRecordedError:
        return False
    kept = dict(run.orders)
    _, one, _ = run.ordered(name, t, exact)
    run.orders = kept
    return one is not None and one.status != "wrong"


def rotation_keys(layer: int, t: int) -> Without:
    """Name the values of a layer that depend on positions, of all steps up to t."""
    front = f"model.layers.{layer}.self_attn."
    names = [f"{front}{leaf}" for leaf in ("q", "k", "cached_k")]
    names += ["model.rotary_emb.cos", "model.rotary_emb.sin"]
    return frozenset(key_of(name, step) for name in names for step in range(t + 1))
