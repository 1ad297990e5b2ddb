"""Folders that compressed-tensors quantised beside the library itself, and beside Transformers.

NPLLM_REQUIRE_LIVE=1 makes it an error that one of them is missing.
"""

import os

import numpy as np
import pytest
import tiny
from close import close
from quantised_folders import LLAMA, SCHEMES, settings, write_pair
from safetensors.numpy import save_file

import npllm
from npllm.checkpoints.packed_layers import packed_layers
from npllm.checkpoints.packed_values import read_layer
from npllm.checkpoints.safetensors import read_header
from npllm.checkpoints.tensor_files import TensorFiles
from npllm.config.config import Config

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]

try:
    import torch
    import transformers
    from compressed_tensors.compressors.naive_quantized import IntQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme
except ImportError as error:
    if os.environ.get("NPLLM_REQUIRE_LIVE") == "1":
        raise
    pytest.skip(f"compressed-tensors is not installed ({error})", allow_module_level=True)

transformers.logging.set_verbosity_error()
COMPRESSED = {
    name: scheme.but(scale=np.float32)
    for name, scheme in SCHEMES.items()
    if not scheme.is_gptq and not scheme.act_order
}
# compressed-tensors 0.20 gives the empty model zero points of another shape than those it writes.
UNREADABLE = ("pack asymmetric", "pack channel")


@pytest.mark.parametrize("layout", [{}, LLAMA], ids=["phi3", "llama"])
@pytest.mark.parametrize("name", [x for x in COMPRESSED if x not in UNREADABLE])
def test_transformers_computes_the_same_logits(tmp_path, name, layout):
    packed, _ = write_pair(tmp_path, COMPRESSED[name], **layout)
    ids = tiny.random_ids(2, 12)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids)).logits.numpy()
    close(npllm.load(packed, ops="reference")(ids), want, times=2)


@pytest.mark.parametrize("d_in", [64, 90, 96])
@pytest.mark.parametrize("name", COMPRESSED)
def test_what_the_library_writes_has_the_values_that_it_reads(tmp_path, name, d_in):
    scheme = COMPRESSED[name]
    content = settings(scheme)
    parsed = QuantizationScheme(**content["config_groups"]["group_0"])
    size = scheme.group or d_in
    if d_in % size:
        pytest.skip("the library wants whole groups")
    rng = np.random.default_rng(d_in)
    shape = (1,) if scheme.one_scale else (61, d_in // size)
    low = 2 ** (scheme.bits - 1)
    state = {
        "weight": torch.from_numpy(rng.standard_normal((61, d_in)).astype(np.float32)),
        "weight_scale": torch.from_numpy(rng.uniform(0.1, 1, shape).astype(np.float32)),
    }
    if not scheme.symmetric:
        zeros = rng.integers(-low, low, shape).astype(np.int8)
        state["weight_zero_point"] = torch.from_numpy(zeros)
    is_stream = scheme.format == "pack-quantized"
    library = PackedQuantizationCompressor if is_stream else IntQuantizationCompressor
    written = library.compress(state, parsed)
    want = library.decompress(written, parsed)["weight"].numpy()

    path, matrix = tmp_path / "model.safetensors", "model.layers.0.mlp.x.weight"
    prefix = matrix.removesuffix("weight")
    save_file({prefix + leaf: x.numpy() for leaf, x in written.items()}, path)
    config = Config.from_json(tiny.config_dict(quantization_config=content))
    layers = packed_layers(read_header(path), {matrix: (61, d_in)}, config.quantization)
    assert layers[matrix].parts.keys() - {"weight_g_idx"} == layers[matrix].entries.keys()
    for leaf, entry in layers[matrix].entries.items():
        part = layers[matrix].parts[leaf]
        assert (entry.shape, entry.dtype in part.dtypes) == (part.shape, True)
    ours = read_layer(layers[matrix], TensorFiles()).widened()
    np.testing.assert_array_equal(ours, want)
