"""The seed of a test run, and how much it draws, in one place.

Every run draws the same inputs, so that a failure comes from the change under test.
NPLLM_TEST_SEED=random draws a new seed, NPLLM_TEST_SEED=<number> repeats such a run; `--all` draws
a new one too, unless the variable is set.  pytest's output ends with a seed that was drawn.  Hypothesis
follows: with the fixed seed it is derandomized, any other seed is also its own.
"""

import os
import random

FIXED = 18


_every = False  # --all


def settle_seed(config):
    """Choose the seed of this run; xdist's workers find it in the environment."""
    global _every
    _every = config.getoption("--all")
    default = "random" if config.getoption("--all") else str(FIXED)
    text = os.environ.get("NPLLM_TEST_SEED") or default
    if text == "random":
        text = str(random.SystemRandom().randrange(2**32))
    os.environ["NPLLM_TEST_SEED"] = text
    if run_seed() != FIXED and config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = text


def run_seed():
    """Return the seed of this run: every test that draws without Hypothesis starts from it."""
    return int(os.environ.get("NPLLM_TEST_SEED") or FIXED)


def draws(few, many):
    """How many inputs a test draws: few by default, many with --all."""
    return many if _every else few
