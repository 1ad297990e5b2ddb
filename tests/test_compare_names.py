"""Values under other programs' names, in files, and the text of llama-eval-callback."""

import numpy as np
import planted_runs
import pytest

import npllm
from npllm import testing
from npllm.errors import NpllmError, NpllmOSError
from npllm.testing import bugs

GQA = testing.golden("gqa")
BUG = bugs["swiglu: C7 up first"]


def wrong():
    return planted_runs.wrong_run("gqa", BUG.op, BUG.fn, {1})


def test_a_folder_of_arrays_has_the_tokens_of_the_gold(tmp_path):
    for name, x in wrong().items():
        np.save(tmp_path / f"{name}.npy", x)
    found = npllm.compare(tmp_path, GQA)
    assert [row.name for row in found.wrong] == ["model.layers.1.mlp.swiglu"], str(found)
    np.savez(tmp_path / "all.npz", **planted_runs.right_run("gqa"))
    assert npllm.compare(tmp_path / "all.npz", GQA).status == "same"


def test_names_of_another_program_are_mapped():
    """mlx-lm's names of the same modules."""
    from npllm.tracing.readers.name_maps import name_map

    values = {}
    rows = {row.ours: row for row in name_map("mlx_lm").rows if not row.op}
    for name, x in wrong().items():
        parts = name.split(".")
        number = next((part for part in parts if part.isdigit()), "")
        row = rows.get(".".join("N" if part.isdigit() else part for part in parts))
        if row is not None and len(row.axes) == x.ndim:
            values[row.theirs.replace("N", number)] = x
    assert len(values) > 10
    found = npllm.compare(values, GQA, names="mlx_lm")
    assert len(found.rows) > 10
    assert found.status == "differs"


def test_a_mapping_of_which_no_name_is_known_is_an_error():
    with pytest.raises(NpllmError, match="none of its names is in the map"):
        npllm.compare({"h.0.attn": np.zeros((2, 9, 16), np.float32)}, GQA)


def test_an_unknown_map_and_an_empty_folder_are_errors(tmp_path):
    with pytest.raises(NpllmError, match="names must be"):
        npllm.compare({"h.0": np.zeros(3)}, GQA, names="other")
    with pytest.raises(NpllmOSError):
        npllm.compare(tmp_path, GQA)
    with pytest.raises(NpllmOSError, match="holds no index"):
        npllm.compare(GQA, tmp_path)
