"""What the cases of `fuzz.py --mode` share."""

import json
from typing import Any

import fuzz

INTEGERS = [
    0,
    1,
    2,
    3,
    7,
    31,
    32,
    255,
    4096,
    2**16,
    10**6,
    2**31,
    2**32 - 1,
    2**40,
    2**63,
    2**64 - 1,
]


def to_json(data: Any) -> bytes:
    """Write JSON, half surrogate pairs and deep nesting included."""
    try:
        return json.dumps(data).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b'{"model": ' + b"[" * 5000


def checked(step: Any) -> str:
    """Run a step, and name the outcome; the message of an NpllmError must be printable."""
    error = fuzz.attempt(step)
    return fuzz.category(error)
