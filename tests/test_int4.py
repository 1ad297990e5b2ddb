"""dtype="int4": matrices in 4 bits, in the block format that their width allows."""

import json

import numpy as np
import optional
import pytest
from close import close
from tiny import config_dict, random_ids, weights, write_folder

import npllm
from npllm import kernels, ops
from npllm.arrays import DTYPES
from npllm.errors import NpllmError, NpllmValueError
from npllm.quantized.block_packing import quantize_blocks
from npllm.quantized.block_weight import BlockWeight
from npllm.quantized.dtypes import NAMES, check_dtype, int4_format, matrix_bytes, quantize_int4
from npllm.quantized.int8 import Int8Weight, quantize

SETS = {
    s.name: s
    for s in (ops.reference, ops.blockwise, kernels.tiled_ops(), kernels.compiled_ops())
    if s
}
SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("d_in", "wanted"), [(256, "Q4_K"), (3072, "Q4_K"), (576, "Q4_1"), (32, "Q4_1"), (40, None)]
)
def test_the_width_chooses_the_format(d_in, wanted):
    assert int4_format(d_in) == wanted
    x = normal(6, d_in)
    packed = quantize_int4(x)
    want = quantize(x) if wanted is None else quantize_blocks(x, wanted)
    np.testing.assert_array_equal(packed.widened(), want.widened())
    assert packed.nbytes == matrix_bytes(6, d_in, "int4")
    assert quantize(x).nbytes == matrix_bytes(6, d_in, "int8")


@pytest.mark.parametrize("dtype", DTYPES)
def test_float_matrices_take_their_bytes(dtype):
    assert matrix_bytes(3, 5, dtype) == np.zeros((3, 5), DTYPES[dtype]).nbytes


def test_what_is_packed_in_that_format_stays():
    packed = quantize_blocks(normal(4, 256), "Q4_K")
    assert quantize_int4(packed) is packed
    other = quantize_blocks(normal(4, 256), "Q6_K")
    want = quantize_blocks(other.widened(), "Q4_K")
    np.testing.assert_array_equal(quantize_int4(other).blocks, want.blocks)


def test_an_error_of_four_bits():
    """With a scale and a minimum for 32: 7 % of normal numbers; one scale alone has 8 %."""
    x = normal(64, 1024)
    error = np.sqrt(np.mean((quantize_int4(x).widened() - x) ** 2))
    assert error < 0.072
    assert np.sqrt(np.mean((quantize_blocks(x, "Q4_0").widened() - x) ** 2)) > 0.08


@pytest.mark.parametrize("name", SETS)
def test_a_loaded_model_computes_with_the_rounded_matrices(tmp_path, name):
    folder = write_folder(tmp_path, **SIZES)
    rounded = {
        key: quantize_int4(x).widened() if x.ndim == 2 else x
        for key, x in weights(config_dict(**SIZES)).items()
    }
    ids = random_ids(2, 12)
    twin = write_folder(tmp_path / "rounded", tensors=rounded, **SIZES)
    want = npllm.load(twin, dtype="float64")(ids)
    model = npllm.load(folder, dtype="int4", ops=SETS[name], activations="float32")
    formats = [
        x.format for x in (model.params.layers[0].qkv_proj, model.params.layers[0].down_proj)
    ]
    assert formats == ["Q4_1", "Q4_K"]
    close(model(ids), want, dtype="float32", times=8)


def test_a_split_llama_folder_and_odd_widths_load(tmp_path):
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "sliding_window": ...}
    model = npllm.load(write_folder(tmp_path, **llama), dtype="int4")
    layer = model.params.layers[0]
    assert isinstance(layer.qkv_proj, BlockWeight) and isinstance(layer.down_proj, Int8Weight)
    assert model.params.norm.dtype == np.float32
    assert model.generate(random_ids(1, 4), max_new_tokens=2).shape == (1, 6)


def test_nan_in_a_checkpoint_names_file_and_tensor(tmp_path):
    tensors = weights(config_dict(**SIZES))
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = np.nan
    folder = write_folder(tmp_path, tensors=tensors, **SIZES)
    words = r"model.safetensors: model.layers.1.mlp.down_proj.weight: .*NaN or infinity .*inspect"
    with pytest.raises(NpllmError, match=words):
        npllm.load(folder, dtype="int4")


@pytest.mark.parametrize("dtype", ["int3", 4, "Q4_K"])
def test_another_name_lists_all(dtype):
    with pytest.raises(NpllmValueError, match=r"float64, int8, int4, got"):
        check_dtype(dtype)
    for name in (None, *NAMES):
        check_dtype(name)


def test_the_commands_take_it(tmp_path):
    folder = str(write_folder(tmp_path, **SIZES))
    errors = optional.invoke(["inspect", "-m", folder, "--int4", "--json"])
    found = json.loads(errors.stdout)["int4_errors"]
    assert 0.05 < found["layer 1"]["down_proj"] < 0.08
    assert "int4 error" in optional.invoke(["inspect", "-m", folder, "--int4"]).stdout
    options = ["--dtype", "int4", "--context", "8", "--json"]
    facts = json.loads(optional.invoke(["cost", "-m", folder, *options]).stdout)
    model = npllm.load(folder, dtype="int4")
    held = [x for layer in model.params.layers for x in layer if x is not None]
    held += [model.params.embed_tokens, model.params.norm, model.params.lm_head]
    assert facts["weight_bytes"] == sum(x.nbytes for x in held)


@pytest.mark.slow
@pytest.mark.weights
def test_the_default_model_in_4_bits(default_folder, default_model):
    """Its weights are in Q4_1: of its matrices those of 576 columns lose little more."""
    model = npllm.load(default_folder, dtype="int4")
    assert model.params.layers[0].qkv_proj.format == "Q4_1"
    assert model.params.layers[0].down_proj.format == "Q4_K"
    ids = np.array([model.tokenizer.encode("The capital of France is")])
    logits, plain = model(ids)[0, -1], default_model(ids)[0, -1]
    assert logits.argmax() == plain.argmax()
    assert np.sqrt(np.mean((logits - plain) ** 2)) < 0.3 * np.std(plain)
