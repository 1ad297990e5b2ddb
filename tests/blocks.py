"""Random blocks of the formats of GGUF: any bytes, with scales of a chosen kind."""

import numpy as np

from npllm.quantized.block_formats import FORMATS
from npllm.quantized.block_weight import BlockWeight

# Format -> where the float16 numbers of a block begin.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
KINDS = {
    "usual": lambda rng, n: rng.normal(0, 0.02, n),
    "zero": lambda rng, n: rng.choice([0.0, -0.0], n),
    "subnormal": lambda rng, n: rng.integers(-1023, 1024, n) * 2.0**-24,
    "largest": lambda rng, n: rng.choice([-65504.0, 65504.0], n),
    "any finite": lambda rng, n: rng.uniform(-16, 16, n) * 2.0 ** rng.integers(-24, 12, n),
}
FORMAT_NAMES = list(FORMATS)


def random_blocks(name, n_rows, n_blocks, seed=0, kind="usual"):
    """uint8 [n_rows, n_blocks * bytes of a block], every scale and minimum of the given kind."""
    rng, layout = np.random.default_rng(seed), FORMATS[name]
    blocks = rng.integers(0, 256, (n_rows, n_blocks, layout.n_bytes), dtype=np.uint8)
    for start in HALVES[name]:
        values = KINDS[kind](rng, n_rows * n_blocks).astype(np.float16)
        blocks[..., start : start + 2] = values.view(np.uint8).reshape(n_rows, n_blocks, 2)
    return blocks.reshape(n_rows, -1)


def random_weight(name, d_out, d_in, seed=0, kind="usual"):
    """A read-only matrix in blocks, as one of a mapped file is."""
    blocks = random_blocks(name, d_out, d_in // FORMATS[name].n_entries, seed, kind)
    blocks.flags.writeable = False
    return BlockWeight(blocks, name)
