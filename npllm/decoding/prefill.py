"""Reading a prompt in pieces so that its keys have the bits of a reading in one go.

A forward pass sends a prompt through the layers in chunks of PREFILL_CHUNK tokens.  The compiled
set has two kinds of products: of at most FEW_ROWS rows, and of more.  Within a kind a token's bits
do not depend on the tokens that are sent with it.
"""

from npllm.forward_pass import PREFILL_CHUNK
from npllm.kernels import FEW_ROWS

__all__ = ["n_read_together", "n_reusable", "pieces"]


def n_read_together(n_prompt: int) -> int:
    """Count the first tokens of a prompt that stand in chunks of more than FEW_ROWS tokens; the
    rest is a last chunk of few.
    """
    rest = n_prompt % PREFILL_CHUNK
    return n_prompt - rest if rest <= FEW_ROWS else n_prompt


def n_reusable(n_same: int, n_prompt: int) -> int:
    """Count the tokens of a prompt whose keys can be taken from a cache.

    Parameters
    ----------
    n_same : int
        Tokens at the beginning that the cache holds, read in chunks of more than FEW_ROWS.
    n_prompt : int

    Returns
    -------
    n : int
        What is left has at least one token, and can be read in the kinds of chunks in which the
        whole prompt is read.
    """
    together = n_read_together(n_prompt)
    if n_same >= together and together < n_prompt:
        return together
    return max(0, min(n_same, together - FEW_ROWS - 1))


def pieces(n_past: int, n_prompt: int) -> list[tuple[int, int]]:
    """Cut the tokens n_past ... n_prompt - 1 of a prompt into pieces of at most PREFILL_CHUNK: each
    of more than FEW_ROWS tokens, but for the rest that the whole prompt has.

    Parameters
    ----------
    n_past : int
        0, or what `n_reusable` gives.
    n_prompt : int

    Returns
    -------
    cuts : list of (start, stop)
    """
    together, cuts = n_read_together(n_prompt), []
    while n_past < together:
        stop = min(n_past + PREFILL_CHUNK, together)
        if 0 < together - stop <= FEW_ROWS:
            stop = together - FEW_ROWS - 1
        cuts.append((n_past, stop))
        n_past = stop
    return [*cuts, (together, n_prompt)] if together < n_prompt else cuts
