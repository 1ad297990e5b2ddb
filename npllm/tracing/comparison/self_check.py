"""Whether a recorded value is what flowed: its operation and those that read it are asked.

only the producer disagrees            the operation is wrong
producer and readers disagree, and     the tensor never flowed: the wrong place was recorded,
the readers agree with the answer      or only a part of it
nobody that reads it is changed by     harmless
the right value in its place
"""

from typing import Any

from npllm.tracing.comparison.graft import NONE, NotRecordedError, Run, Without
from npllm.tracing.comparison.steps import key_of

__all__ = ["agrees", "cache_keys", "flow", "readers", "rotation_keys"]

Array = Any

MOST = 3  # readers that are asked
PAIRS = {leaf: pair for pair in (["cos", "sin"], ["gate", "up"]) for leaf in pair}
"""Values that are made and read together: both may have been recorded at a wrong place."""

LARGE = 100.0  # budgets from which an error that changes nothing is harmless, and not only small


def flow(run: Run, name: str, t: int, share: float, is_readable: bool = True) -> str:
    """Ask the readers of a value that its own operation disagrees with.

    Parameters
    ----------
    run : Run
    name : str
    t : int
    share : float
        Of the budget, by which it is off.
    is_readable : bool
        False where the recorded value does not even have the right shape.

    Returns
    -------
    answer : str
        "wrong", "wrong capture" or "harmless".
    """
    found = readers(run, name, t)
    front, _, leaf = name.rpartition(".")
    pair = [f"{front}.{other}" for other in PAIRS.get(leaf, ())]
    for names in ([name], pair):
        keys = frozenset(key_of(one, t) for one in names)
        if found and keys and all(agrees(run, one, t, keys) for one in found):
            break
    else:
        return "wrong"
    if not is_readable or not all(agrees(run, one, t) for one in found):
        return "wrong capture"
    return "harmless" if share >= LARGE else "wrong"


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
    return one is not None and one.status == "within"


def rotation_keys(layer: int, t: int) -> Without:
    """Name the values that the scores of a layer in step t depend on, behind the rotation."""
    front = f"model.layers.{layer}.self_attn."
    names = [f"{front}k", f"{front}cached_k", "model.rotary_emb.cos", "model.rotary_emb.sin"]
    past = {key_of(name, step) for name in names for step in range(t + 1)}
    return frozenset(past | {key_of(f"{front}q", t)})


def cache_keys(name: str, t: int) -> Without:
    """Name what the cache held in the steps before t."""
    return frozenset(key_of(name, step) for step in range(t))
