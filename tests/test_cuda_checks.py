"""The CUDA kernels under a checker of memory: races, bounds, what nobody wrote, barriers.

Threads run in a drawn order, the lanes of a warp apart from each other, and may be interrupted at
any access (tests/cuda_checks.h).  The kernels are clean; faults planted into copies of them are
each caught.  A failure names the seed, the lines and the threads.
"""

import guard
import kernel_shim
import numpy as np
import pytest
from composed import Composed
from guard import moved
from kernel_shim import KernelFault, checking, needs_gxx

from npllm.kernels import cuda
from npllm.kernels.cuda import launching
from npllm.ops.mask import causal, left_padding

on_cuda = Composed(cuda.CUDA)
pytestmark = [needs_gxx, pytest.mark.usefixtures("on_the_stand_in_apart")]
slow = pytest.mark.slow


def drawn(*shapes):
    """Device arrays of these shapes."""
    rng = np.random.default_rng(0)
    return moved(tuple(rng.standard_normal(shape, dtype=np.float32) for shape in shapes))


def norm_linear():
    x, gain, weight = drawn((3, 4200), (4200,), (9, 4200))
    return on_cuda.norm_linear(x, gain, 1e-5, weight)


def rope_attention():
    return on_cuda.rope_attention(*drawn((2, 3, 3 * 64), (3, 32), (3, 32)), 1, 1)


def chosen(logits):
    """The tokens that choose.cu finds, and where the rows stand afterwards."""
    n_batch, n_vocab = logits.shape
    state, tokens = (
        guard.xp.zeros((4, n_batch), dtype=np.int64),
        guard.xp.zeros((n_batch, 2), dtype=np.int64),
    )
    sizes = np.uint32(n_vocab), np.int64(2)
    launching.launch(
        "choose", (), n_batch, 1024, logits, *(state[i] for i in range(4)), tokens, *sizes
    )
    return guard.xp.concat([state, guard.xp.matrix_transpose(tokens)], axis=0)


def attention_mma():
    """Two tiles of keys of each head, behind padding; three parts, which take all paths."""
    q, k, v = drawn((2, 2, 18, 64), (2, 1, 40, 64), (2, 1, 40, 64))
    mask = causal() & left_padding(moved(np.array([0, 3])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "has_tensor_cores", lambda: True)
        return cuda.attention(q, k, v, mask=mask)


# kernel -> a call that runs it on several blocks, sizes that fill no tile
CALLS = {
    "rms_norm": lambda: cuda.rms_norm(*drawn((2, 300), (300,)), 1e-5),
    "swiglu": lambda: cuda.swiglu(*drawn((3, 100), (3, 100))),
    "linear": norm_linear,
    "rope_append": rope_attention,
    "attention": lambda: cuda.attention(*drawn((2, 18, 64), (2, 40, 64), (2, 40, 64))),
    "attention_mma": attention_mma,
    "attend_one": lambda: cuda.attention(*drawn((2, 1, 64), (2, 70, 64), (2, 70, 64))),
    "choose": lambda: chosen(drawn((3, 2100))[0]),
    "attend_merge": lambda: cuda.attention(*drawn((1, 1, 64), (1, 300, 64), (1, 300, 64))),
}
FAST = ("no barrier before the sum of the warps",)  # g++ takes seconds for each


@pytest.mark.parametrize(
    "kernel", [name if name in FAST else pytest.param(name, marks=slow) for name in CALLS]
)
def test_a_kernel_is_clean_in_any_order(kernel):
    """Nothing is found, and the result has the bits of the fixed order."""
    want = CALLS[kernel]().get()
    for seed in range(1, 4):
        with checking(seed):
            assert CALLS[kernel]().get().tobytes() == want.tobytes()


# (kernel, text, its replacement, what is found)
RACE, BOUNDS, UNWRITTEN, BARRIER = "race", "out of bounds", "uninitialised", "barrier divergence"
FIRST_OF_TWO = "        __syncthreads();\n        stage<"
SECOND_OF_TWO = "        __syncthreads();\n        for (unsigned at"
PLANTED = {
    "no barrier before the sum of the warps": (
        "rms_norm",
        "    __syncthreads();\n",
        "",
        (RACE, UNWRITTEN),
    ),
    "one entry too many": ("rms_norm", "i < d_model", "i <= d_model", (BOUNDS,)),
    "partial sums of the first warp only": (
        "rms_norm",
        "if (threadIdx.x % 32 == 0)",
        "if (threadIdx.x == 0)",
        (UNWRITTEN,),
    ),
    "a barrier for the first warp only": (
        "rms_norm",
        "    __syncthreads();\n",
        "    __syncthreads();\n    if (threadIdx.x < 32) __syncthreads();\n",
        (BARRIER,),
    ),
    "threads behind the end": ("swiglu", "i < d_ff) store", "i <= d_ff) store", (BOUNDS, RACE)),
    "staged while others still multiply": (
        "linear",
        FIRST_OF_TWO,
        "        stage<",
        (RACE,),
    ),
    "multiplied while others still stage": (
        "linear",
        SECOND_OF_TWO,
        "        for (unsigned at",
        (RACE, UNWRITTEN),
    ),
    "every lane writes the sum of its warp": (
        "linear",
        "if (lane == 0) partial",
        "partial",
        (RACE,),
    ),
    "a row behind the last": ("linear", "if (r < n && i < d_in) v", "if (i < d_in) v", (BOUNDS,)),
    "a head behind the last": (
        "rope_append",
        "if (at >= width) break",
        "if (at > width) break",
        (BOUNDS, RACE),
    ),
    "tiles loaded while others still read": (
        "attention",
        "        __syncthreads();\n        load_tile<T, D>(keys",
        "        load_tile<T, D>(keys",
        (RACE,),
    ),
    "a tile stored while others still multiply": (
        "attention_mma",
        "        __syncthreads();\n        tile.store",
        "        tile.store",
        (RACE,),
    ),
    "a tile multiplied while others still store": (
        "attention_mma",
        "        __syncthreads();\n        // Distances",
        "        // Distances",
        (RACE, UNWRITTEN),
    ),
    "keys of a tile behind the last": (
        "attention_mma",
        "if (at < KEYS && key_of(at) < n)",
        "if (at < KEYS && key_of(at) <= n)",
        (BOUNDS,),
    ),
    "values of a tile behind the last": (
        "attention_mma",
        "if (at < PAIRS && key < n)",
        "if (at < PAIRS && key <= n)",
        (BOUNDS,),
    ),
    "queries behind the last": (
        "attention_mma",
        "bool there = row < n_seq",
        "bool there = row <= n_seq",
        (BOUNDS,),
    ),
    "results behind the last query": (
        "attention_mma",
        "if (row < n_seq) to[",
        "if (row <= n_seq) to[",
        (BOUNDS, RACE),
    ),
    "warps without queries that set a flag": (
        "attention_mma",
        "    if (row < n_seq) {\n        bool bad",
        "    {\n        bool bad",
        (BOUNDS, RACE),
    ),
    "four lanes write one score": (
        "attend_one",
        "if (part == 0) scores",
        "scores",
        (RACE,),
    ),
    "a choice before all warps have found one": (
        "choose",
        "    __syncthreads();\n",
        "",
        (RACE, UNWRITTEN),
    ),
    "keys behind the last": ("attend_one", "if (key < n) keys", "keys", (BOUNDS,)),
    "one warp too many": ("attend_merge", "w < WARPS; ++w", "w <= WARPS; ++w", (BOUNDS,)),
}


def caught(kernel, text, replacement, monkeypatch):
    """What the checker finds in a kernel with one edit, under a few seeds."""
    source = cuda.source(kernel)
    assert source.count(text) >= 1, f"the source of {kernel} has no {text!r}"
    edited = source.replace(text, replacement)

    def launch(name, *arguments):
        kernel_shim.launch(name, *arguments, text=edited if name == kernel else None)

    monkeypatch.setattr(cuda.launching, "launch", launch)
    for seed in range(1, 6):
        try:
            with checking(seed):
                CALLS[kernel]()
        except KernelFault as fault:
            return str(fault)
    return ""


@pytest.mark.parametrize(
    "name", [key if key in FAST else pytest.param(key, marks=slow) for key in PLANTED]
)
def test_a_planted_fault_is_caught(name, monkeypatch):
    """The message says what it is, and names threads and lines of the source."""
    kernel, text, replacement, found = PLANTED[name]
    message = caught(kernel, text, replacement, monkeypatch)
    print(f"{name}: {message}")
    assert message.startswith(found), message
    assert "thread" in message and "`" in message and "(seed " in message


@slow
def test_the_choice_is_the_first_of_the_largest():
    """As NumPy's argmax; -1 where the largest is NaN or infinite, and then the place moves on."""
    logits = np.random.default_rng(0).standard_normal((5, 3000), dtype=np.float32).round(1)
    logits[1], logits[2, 2999], logits[3, [7, 2500]], logits[4] = 0, 9, [np.nan, np.inf], -np.inf
    state = chosen(moved(logits)).get()
    want = logits.argmax(axis=1)
    assert (state[0] == want).all() and (state[1:4] == 1).all()
    assert (state[4] == np.where(np.isfinite(logits.max(axis=1)), want, -1)).all()
