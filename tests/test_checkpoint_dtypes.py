"""Checkpoints whose tensors are stored in several dtypes: nothing is rounded that nobody asked to
round.
"""

import itertools

import family
import guard
import ml_dtypes
import numpy as np
import pytest
import tiny
from close import close
from hypothesis import given
from hypothesis import strategies as st
from test_llama import LLAMA

from npllm import Config
from npllm.arrays import widest
from npllm.checkpoints import upload
from npllm.checkpoints.phi3_layout import load_params
from npllm.quantized.int8 import quantize

FLOATS = [np.dtype(name) for name in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64)]
BIASED = LLAMA | {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1}
FUSED = {
    "qkv_proj": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "qkv_bias": ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"],
    "gate_up_proj": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "gate_up_bias": ["mlp.gate_proj.bias", "mlp.up_proj.bias"],
}
choice = st.sampled_from(FLOATS)


def mixed(dtypes):
    """Tensors of a Llama layer whose parts have the given dtypes in turn, with values that none of
    the narrower ones holds.
    """
    tensors, turn = family.tensors(BIASED, dtype=np.float64), itertools.cycle(dtypes)
    for name in itertools.chain.from_iterable(FUSED.values()):
        full = f"model.layers.0.{name}"
        dtype = next(turn)
        largest = 1e30 if dtype.itemsize > 2 or dtype.name == "bfloat16" else 6e4
        tensors[full] = (tensors[full] * largest / 8).astype(dtype)
    return tensors


def write(folder, tensors):
    tiny.write_json(folder / "config.json", BIASED)
    tiny.write_safetensors(folder / "model.safetensors", tensors)
    return folder


def as_float64(x):
    return np.asarray(x).astype(np.float64)


@given(st.lists(choice, min_size=1, max_size=4))
def test_the_widest_dtype_holds_every_value_of_all(dtypes):
    wide = widest(dtypes)
    assert wide.isnative
    assert wide in dtypes or {dtype.name for dtype in dtypes} == {"bfloat16", "float16"}
    for dtype in dtypes:
        info = ml_dtypes.finfo(dtype)
        for x in (info.max, info.smallest_subnormal, 1 + as_float64(info.eps)):
            assert as_float64(np.asarray(x, dtype).astype(wide)) == as_float64(np.asarray(x, dtype))


@pytest.mark.parametrize(
    "dtypes", [*itertools.product(FLOATS, repeat=2), *itertools.permutations(FLOATS, 3)], ids=str
)
def test_parts_of_several_dtypes_are_stacked_in_the_widest(tmp_path, dtypes):
    tensors = mixed(dtypes)
    layer = load_params(write(tmp_path, tensors), Config.from_json(BIASED)).layers[0]
    for field, names in FUSED.items():
        parts = [tensors[f"model.layers.0.{name}"] for name in names]
        got = getattr(layer, field)
        assert got.dtype == widest(part.dtype for part in parts)
        close(as_float64(got), np.concatenate([as_float64(part) for part in parts]), times=0)


@pytest.mark.parametrize("dtypes", [*itertools.permutations(FLOATS, 2)], ids=str)
def test_parts_of_several_dtypes_arrive_on_a_device_in_the_widest(tmp_path, dtypes, monkeypatch):
    guard.installed(monkeypatch)
    monkeypatch.setattr(upload, "BUFFER_BYTES", 64)
    folder = write(tmp_path, mixed(dtypes))
    here, there = (
        load_params(folder, Config.from_json(BIASED), xp=xp).layers[0] for xp in (np, guard.xp)
    )
    for field in FUSED:
        close(getattr(there, field), guard.moved(np.array(getattr(here, field))), times=0)


def test_parts_of_several_dtypes_are_quantized_from_the_widest(tmp_path):
    tensors = family.tensors(BIASED)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = (tensors[name] / 2**12).astype(np.float16)
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name] * 1e6  # beyond float16
    layer = load_params(write(tmp_path, tensors), Config.from_json(BIASED), dtype="int8").layers[0]
    parts = [tensors[f"model.layers.0.{part}"].astype(np.float32) for part in FUSED["qkv_proj"]]
    want = quantize(np.concatenate(parts))
    assert (layer.qkv_proj.values == want.values).all() and (
        layer.qkv_proj.scales == want.scales
    ).all()


def test_a_dtype_that_is_asked_for_still_decides(tmp_path):
    layer = load_params(
        write(tmp_path, family.tensors(BIASED) | mixed(FLOATS[::-1])),
        Config.from_json(BIASED),
        dtype="bfloat16",
    ).layers[0]
    assert all(getattr(layer, field).dtype == ml_dtypes.bfloat16 for field in FUSED)
