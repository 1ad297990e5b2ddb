"""The predictions of docs/gpu are those of scripts/gpu/predict.py, and its bytes are counted."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))
from gpu import predict  # noqa: E402

DATA = json.loads((predict.CONFIGS / "phi-3-mini.json").read_text(encoding="utf-8"))


def test_the_file_and_the_table_are_what_the_formula_gives():
    found = predict.predictions()
    text = (ROOT / "docs/gpu/predictions.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(json.dumps(found))
    page = (ROOT / "docs/gpu/README.md").read_text(encoding="utf-8")
    for one in found["predictions"].values():
        assert f" {one['tokens_per_second']:,.0f} " in page


@pytest.mark.parametrize("n_ctx", [0, 127, 128, 4000])
def test_bytes_and_launches_of_a_step(n_ctx):
    """Weights but the table, once; float32 keys and values within the window; seven kernels."""
    found = predict.kernels(DATA, n_ctx)
    weights = sum(one.n_bytes * one.n_times for one in found if one.kernel == "linear")
    d, d_ff, n_layer, n_vocab = 3072, 8192, 32, 32064
    assert weights == 2 * (n_layer * (4 * d * d + 3 * d * d_ff) + n_vocab * d)
    keys = next(one for one in found if one.label == "attention")
    assert keys.n_bytes * n_layer == 2 * n_layer * min(n_ctx + 1, 2047) * d * 4
    merged = n_ctx + 1 > 128
    assert sum(one.n_times for one in found) == n_layer * (7 if merged else 6) + 2


def test_a_kernel_with_few_blocks_or_many_registers_is_slower():
    """And no product is faster than a copy of its bytes."""
    device = predict.DEVICES[0]
    product = next(one for one in predict.kernels(DATA, 128) if one.label == "gate_up")
    few = product._replace(n_blocks=40)
    assert predict.seconds(few, device) > predict.seconds(product, device)
    small = device._replace(registers=16384)
    assert predict.seconds(product, small) > predict.seconds(product, device)
    assert predict.seconds(product, device) > product.n_bytes / device.copy
