"""Put a planted bug in the place of an operation, for a run of the tests of that operation.

NPLLM_PLANTED names a bug of `npllm.testing.bugs`.  The definition runs first, so that what it
refuses stays refused; arrays of other libraries keep its answer.  What the bug raises is a failure.
"""

import functools
import os
import sys

import numpy as np
from hypothesis import Phase, settings

PLANTED = "NPLLM_PLANTED"

FILES = {
    "attention": ("test_ops_attention.py", "test_blockwise.py"),
    "apply_rope": ("test_ops_rope.py",),
    "rope_tables": ("test_ops_rope.py",),
    "rope_frequencies": ("test_ops_frequencies.py",),
    "rms_norm": ("test_ops_norm.py",),
    "swiglu": ("test_ops_feedforward.py",),
    "linear": ("test_ops_linear.py",),
    "qkv_projection": ("test_ops_projections.py",),
    "embed": ("test_ops_embedding.py",),
}
"""The test files of each operation that is one function of `npllm.ops`."""


def plant_named_bug():
    """Plant the bug that the environment names, if it names one."""
    name = os.environ.get(PLANTED)
    if name is None:
        return
    from npllm import ops, testing

    do_not_shrink()
    bug = testing.bugs[name]
    right = getattr(ops, bug.op)
    planted = in_place_of(right, bug.fn)
    for module in [module for key, module in sys.modules.items() if key.startswith("npllm.ops")]:
        if vars(module).get(bug.op) is right:
            setattr(module, bug.op, planted)


def do_not_shrink():
    """A failure is all that is wanted, not the smallest case of it."""
    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("planted", settings.default, phases=phases)
    settings.load_profile("planted")


def in_place_of(right, wrong):
    """The wrong function where all arrays are NumPy's and the right one raises nothing."""

    @functools.wraps(right)
    def called(*arguments, **options):
        answer = right(*arguments, **options)
        values = (*arguments, *options.values())
        is_foreign = any(hasattr(x, "shape") and not isinstance(x, np.ndarray) for x in values)
        return answer if is_foreign else wrong(*arguments, **options)

    return called
