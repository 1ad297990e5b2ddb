"""A kernel in a file of its own, so that its code is kept for the processes that count threads."""

import numpy as np
from numba import get_num_threads, prange

from npllm.kernels.cpu.launching import kernel


@kernel(parallel=True)
def count(n):
    """The largest number of threads that an iteration sees."""
    x = np.zeros(n, np.int64)
    for i in prange(n):
        x[i] = get_num_threads()
    return x.max()
