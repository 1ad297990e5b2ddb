"""Golden bundles: tiny checkpoints with every intermediate value in float64, as plain folders.

A port's test in another language reads the folder without npllm: `golden("gqa").folder` says where
it is, and docs/testing.md what the files hold.
"""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from npllm.errors import NpllmValueError

__all__ = ["BUNDLES", "Golden", "golden"]

Array = Any

FOLDER = Path(__file__).parent / "bundles"

BUNDLES = (
    "mha",
    "gqa",
    "mqa",
    "window",
    "longrope_short",
    "longrope_long",
    "partial_rotary",
    "tied",
    "llama3_rope",
    "bert",
)
"""Names of the bundles."""


@dataclass(frozen=True)
class Golden:
    """A bundle.

    Parameters
    ----------
    name : str
    folder : Path
        Holds config.json and model.safetensors (a checkpoint in float32), values.safetensors
        (float64; `input_ids` int64) and index.json.
    """

    name: str
    folder: Path = field(repr=False)

    @cached_property
    def index(self) -> dict[str, Any]:
        """Names of the values with axes, formula and shape; the versions that made them."""
        return json.loads((self.folder / "index.json").read_text(encoding="utf-8"))

    @cached_property
    def values(self) -> dict[str, Array]:
        """Every value by name: float64 arrays, `input_ids` int64."""
        from safetensors.numpy import load_file

        return dict(load_file(self.folder / "values.safetensors"))


def golden(name: str) -> Golden:
    """Return a golden bundle.

    Parameters
    ----------
    name : str
        "mha", "gqa", "mqa", "window", "longrope_short", "longrope_long", "partial_rotary", "tied",
        "llama3_rope" or "bert".

    Returns
    -------
    golden : Golden

    Raises
    ------
    NpllmValueError
        For another name.

    Notes
    -----
    Made by scripts/make_golden_bundles.py from the definitions in float64, with the constants of
    RoPE rounded to float32.  Its logits were compared with those of Transformers in float64, which
    also rounds cos and sin to float32; the difference is in `index["compared with"]`.
    """
    if name not in BUNDLES:
        raise NpllmValueError(f"golden bundles are {', '.join(BUNDLES)}; got {name!r}")
    return Golden(name, FOLDER / name)
