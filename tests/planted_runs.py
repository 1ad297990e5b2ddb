"""Runs of tiny models with one mistake in one operation of one layer, recorded by a tap."""

from collections import Counter

import numpy as np

import npllm
from npllm import ops, testing

CALLS = {"rms_norm": 2, "linear": 4, "apply_rope": 2, "attention": 1, "swiglu": 1, "add": 2}
"""Calls of an operation in a layer, in the order of `npllm.models.phi3`."""


def once(right, wrong, calls):
    """An operation that is wrong in some of its calls, counted from 0."""
    count = Counter()

    def op(*args, **options):
        number = count["n"]
        count["n"] += 1
        return (wrong if number in calls else right)(*args, **options)

    return op


def run(model, ids, **options):
    """Every value that a tap sees."""
    values = {}

    def tap(name, x):
        values[name] = np.array(x)
        return x

    model(ids, tap=tap, **options)
    return values


def wrong_run(bundle, op, fn, calls, base=ops.reference):
    """Record a bundle's tokens with a wrong operation in some calls."""
    golden = testing.golden(bundle)
    replaced = base.replace(**{op: once(getattr(base, op), fn, calls)})
    model = npllm.load(golden.folder, ops=replaced)
    return run(model, golden.values["input_ids"])


def right_run(bundle, **options):
    """Record a bundle's tokens in float32, or as options say."""
    golden = testing.golden(bundle)
    return run(npllm.load(golden.folder, **options), golden.values["input_ids"])
