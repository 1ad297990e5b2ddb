"""How many bytes attention moves between slow and fast memory: the count that FlashAttention is
about.
"""

from typing import Any

from npllm.errors import NpllmValueError

__all__ = ["attention_io"]


def attention_io(
    n: int,
    d: int,
    block: int | tuple[int, int] | None = None,
    sram: int = 100_000,
    itemsize: int = 4,
) -> dict[str, Any]:
    """Count the bytes that one unmasked head moves between slow and fast memory.

        naive   = (4 * n * d + 4 * n**2) * itemsize    q, k, v, y once; s and w written and read
        flash_1 = (2 * n * d + ceil(n / b_k) * (3 * n * d + 4 * n)) * itemsize
        flash_2 = (2 * n * d + n + ceil(n / b_q) * 2 * n * d) * itemsize

    Parameters
    ----------
    n : int
        Queries, and as many keys.
    d : int
        Width of a head.
    block : int or tuple of two int, optional
        Queries and keys of a block: both alike, or (b_q, b_k).  Default: the largest that
        FlashAttention's rule allows in `sram`, b_k = ceil(sram / (4 * d * itemsize)), b_q =
        min(b_k, d).
    sram : int
        Bytes of fast memory, where no block is given.
    itemsize : int
        Bytes of a number.

    Returns
    -------
    counts : dict
        "naive", "flash_1" and "flash_2" in bytes, and the "block" they are for.

    Raises
    ------
    NpllmValueError
        When a size is below 1.

    Notes
    -----
    `blockwise_attention(..., moved=...)` counts the same bytes while it runs.  flash_1 fetches q
    and, to and fro, the running sum, row maximum and row sum for every block of keys; flash_2 keeps
    them, and writes y and the log-sum-exp once.

    Source: "FlashAttention" (Dao et al. 2022), theorem 2 and algorithm 1; "FlashAttention-2" (Dao
    2023), algorithm 1.
    """
    if block is None:
        b_k = -(-sram // max(1, 4 * d * itemsize))
        block = min(b_k, d), b_k
    blocks = (block, block) if isinstance(block, int) else tuple(block)
    if min(n, d, itemsize, *blocks) < 1:
        raise NpllmValueError(
            "n, d, itemsize and both blocks must be at least 1, "
            f"got {n}, {d}, {itemsize} and {blocks}"
        )
    q_visits, k_visits = -(-n // blocks[0]), -(-n // blocks[1])
    return {
        "naive": (4 * n * d + 4 * n * n) * itemsize,
        "flash_1": (2 * n * d + k_visits * (3 * n * d + 4 * n)) * itemsize,
        "flash_2": (2 * n * d + n + q_visits * 2 * n * d) * itemsize,
        "block": blocks,
    }
