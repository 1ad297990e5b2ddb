"""npllm.checkpoints.safetensors: safetensors become views of the mapped file, or the error says
everything that is wrong.
"""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from close import close
from tiny import (
    config_dict,
    model,
    random_ids,
    weights,
    write_folder,
    write_json,
    write_safetensors,
)

import npllm
from npllm import Config
from npllm.checkpoints.phi3_layout import expected_shapes, load_params
from npllm.checkpoints.safetensors import read_entries
from npllm.errors import NpllmError, NpllmOSError, NpllmValueError

LEAVES = {
    "input_layernorm": "input_layernorm",
    "qkv_proj": "self_attn.qkv_proj",
    "o_proj": "self_attn.o_proj",
    "post_attention_layernorm": "post_attention_layernorm",
    "gate_up_proj": "mlp.gate_up_proj",
    "down_proj": "mlp.down_proj",
}
INDEX = "model.safetensors.index.json"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "sliding_window": ...}


def load(folder, **options):
    return load_params(folder, Config.from_json(folder), **options)


def by_name(params):
    """Params as in the file: tensor name -> array."""
    named = {
        f"model.layers.{number}.{LEAVES[field]}.weight": getattr(layer, field)
        for number, layer in enumerate(params.layers)
        for field in LEAVES
    }
    return named | {
        "model.embed_tokens.weight": params.embed_tokens,
        "model.norm.weight": params.norm,
        "lm_head.weight": params.lm_head,
    }


def write_shards(folder, tensors, n=3, **changes):
    """Write the tensors round robin into n files, and the index."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config_dict(**changes))
    files = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    weight_map = {name: files[i % n] for i, name in enumerate(tensors)}
    for file in files:
        write_safetensors(
            folder / file, {name: x for name, x in tensors.items() if weight_map[name] == file}
        )
    write_json(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return weight_map


def mapped(x):
    """Whether an array is a view, at any depth, of a mapped file."""
    while x is not None:
        if (
            isinstance(x, np.memmap) and x._mmap is not None
        ):  # a copy is of that type, too, but holds no map
            return True
        x = getattr(x, "base", None)
    return False


# ----------------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_every_tensor_lands_in_its_own_field_in_the_stored_dtype(tmp_path, dtype):
    tensors = weights(dtype=dtype)
    got = by_name(load(write_folder(tmp_path, tensors=tensors)))
    assert got.keys() == tensors.keys()
    for name, x in tensors.items():
        close(got[name], x, times=0)


def test_shards_are_read_as_one(tmp_path):
    tensors = weights()
    write_shards(tmp_path, tensors)
    for name, x in by_name(load(tmp_path)).items():
        close(x, tensors[name], times=0)


def test_tensors_are_read_only_views_of_the_mapped_file(tmp_path):
    params = load(write_folder(tmp_path, dtype=ml_dtypes.bfloat16))
    for name, x in by_name(params).items():
        assert mapped(x) and not x.flags.writeable, name
        with pytest.raises(ValueError, match="read-only"):
            x[0] = 0


def test_loading_copies_nothing(tmp_path):
    write_folder(tmp_path, vocab_size=30_000, dtype=ml_dtypes.bfloat16)
    config = Config.from_json(tmp_path)
    load_params(tmp_path, config)
    tracemalloc.start()
    params = load_params(tmp_path, config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < params.embed_tokens.nbytes / 4, f"{peak} bytes allocated"


def test_every_tensor_is_mapped_by_itself(tmp_path):
    params = load(write_folder(tmp_path))
    assert not np.shares_memory(params.embed_tokens, params.lm_head)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.float64])
def test_a_tensor_at_an_odd_byte_is_copied_not_misread(tmp_path, dtype):
    tensors = weights(dtype=dtype)
    write_folder(tmp_path, tensors=tensors)
    write_safetensors(tmp_path / "model.safetensors", tensors, pad=False)
    assert all(entry.start % np.dtype(dtype).itemsize for entry in read_entries(tmp_path).values())
    for name, x in by_name(load(tmp_path)).items():
        close(x, tensors[name], times=0)
        assert x.flags.aligned and not mapped(x)


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("asked", ["bfloat16", "float16", "float32", "float64"])
def test_dtype_converts_every_tensor(tmp_path, stored, asked):
    tensors = weights(dtype=stored)
    got = by_name(load(write_folder(tmp_path, tensors=tensors), dtype=asked))
    dtype = {"bfloat16": ml_dtypes.bfloat16}.get(asked, asked)
    for name, x in tensors.items():
        close(got[name], x.astype(dtype), times=0)
        assert mapped(got[name]) == (np.dtype(dtype) == np.dtype(stored))


@pytest.mark.parametrize("asked", ["int4", "float8", "", 5, ["float32"]])
def test_an_unknown_dtype_is_refused_before_anything_is_read(tmp_path, asked):
    with pytest.raises(
        NpllmValueError,
        match="dtype must be one of bfloat16, float16, float32, float64, int8, int4, got",
    ):
        load_params(tmp_path / "no such folder", None, dtype=asked)


def test_tensors_may_have_different_dtypes(tmp_path):
    tensors = weights() | {"model.norm.weight": weights(dtype=np.float16)["model.norm.weight"]}
    params = load(write_folder(tmp_path, tensors=tensors))
    assert (params.norm.dtype, params.embed_tokens.dtype) == (np.float16, np.float32)


# ------------------------------------------------------------------------------------------------------------------- tied weights


def test_a_tied_model_uses_the_embedding_twice(tmp_path):
    params = load(write_folder(tmp_path, tie_word_embeddings=True))
    assert params.lm_head is params.embed_tokens


def test_an_untied_model_without_lm_head_is_refused(tmp_path):
    tensors = weights()
    del tensors["lm_head.weight"]
    with pytest.raises(
        NpllmValueError,
        match=r"missing: lm_head\.weight.*only where config\.json says tie_word_embeddings: true",
    ):
        load(write_folder(tmp_path, tensors=tensors))


# ----------------------------------------------------------------------------------------------------- split projections, and heads


def test_split_projections_are_fused_in_the_order_q_k_v_and_gate_up(tmp_path):
    tensors = weights(config_dict(**LLAMA))
    params = load(write_folder(tmp_path, tensors=tensors, **LLAMA))
    for number, layer in enumerate(params.layers):
        at = f"model.layers.{number}."
        close(
            layer.qkv_proj,
            np.concatenate([tensors[f"{at}self_attn.{x}_proj.weight"] for x in "qkv"]),
            times=0,
        )
        close(
            layer.gate_up_proj,
            np.concatenate([tensors[f"{at}mlp.{x}_proj.weight"] for x in ("gate", "up")]),
            times=0,
        )


def test_a_split_checkpoint_and_its_fused_form_are_the_same_model(tmp_path):
    split = npllm.load(write_folder(tmp_path / "llama", **LLAMA))
    fused = npllm.load(
        write_folder(
            tmp_path / "phi3",
            tensors={name: np.array(x) for name, x in by_name(split.params).items()},
        )
    )
    ids = random_ids(2, 9)
    close(split(ids), fused(ids), times=0)


def test_biases_are_fused_as_well(tmp_path):
    changes = LLAMA | {"attention_bias": True, "mlp_bias": True}
    tensors = weights(config_dict(**changes))
    layer = load(write_folder(tmp_path, tensors=tensors, **changes)).layers[1]
    at = "model.layers.1."
    close(
        layer.qkv_bias,
        np.concatenate([tensors[f"{at}self_attn.{x}_proj.bias"] for x in "qkv"]),
        times=0,
    )
    close(
        layer.gate_up_bias,
        np.concatenate([tensors[f"{at}mlp.{x}_proj.bias"] for x in ("gate", "up")]),
        times=0,
    )
    close(layer.o_bias, tensors[at + "self_attn.o_proj.bias"], times=0)
    close(layer.down_bias, tensors[at + "mlp.down_proj.bias"], times=0)


# --------------------------------------------------------------------------------------------------------------- what does not fit


def test_one_error_lists_everything_that_is_wrong(tmp_path):
    tensors = weights()
    del tensors["model.norm.weight"]
    tensors["model.norm.wait"] = np.ones(32, np.float32)
    tensors["model.layers.0.mlp.down_proj.weight"] = np.ones((32, 41), np.float32)
    tensors["model.layers.1.self_attn.o_proj.weight"] = np.ones((32, 32), np.int64)
    with pytest.raises(NpllmValueError) as caught:
        load(write_folder(tmp_path, tensors=tensors))
    for part in (
        "missing: model.norm.weight",
        "unknown: model.norm.wait",
        str(tmp_path),
        "wrong shape: model.layers.0.mlp.down_proj.weight must be [32, 40], got [32, 41]",
        "model.layers.1.self_attn.o_proj.weight is I64",
    ):
        assert part in str(caught.value)


def test_a_transposed_square_or_not_shape_is_compared_axis_by_axis(tmp_path):
    tensors = weights()
    tensors["lm_head.weight"] = np.ascontiguousarray(tensors["lm_head.weight"].T)
    with pytest.raises(NpllmValueError, match=r"lm_head.weight must be \[61, 32\], got \[32, 61\]"):
        load(write_folder(tmp_path, tensors=tensors))


def test_a_long_list_of_problems_is_cut(tmp_path):
    with pytest.raises(NpllmValueError, match="and 24 more") as caught:
        load(
            write_folder(
                tmp_path,
                tensors={"x": np.ones(1, np.float32)},
                num_hidden_layers=5,
                tie_word_embeddings=True,
            )
        )
    assert len(str(caught.value)) < 1500


def test_a_layer_too_many_is_unknown(tmp_path):
    write_folder(tmp_path, tensors=weights(config_dict(num_hidden_layers=3)))
    with pytest.raises(NpllmValueError, match=r"unknown: model\.layers\.2\."):
        load(tmp_path)


def test_expected_shapes_are_those_of_the_fields():
    shapes = expected_shapes(Config.from_json(config_dict(head_dim=10)))
    assert shapes["model.layers.1.self_attn.qkv_proj.weight"] == ((4 + 2 * 2) * 10, 32)
    assert shapes["model.layers.1.self_attn.o_proj.weight"] == (32, 40)
    assert shapes["model.layers.0.mlp.gate_up_proj.weight"] == (80, 32)
    assert len(shapes) == 3 + 2 * 6


# ------------------------------------------------------------------------------------------------------------------------ bad files


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = write_folder(tmp_path) / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(
        NpllmOSError,
        match=r"model\.safetensors: is not a readable safetensors file .*download complete",
    ):
        load(tmp_path)


def test_bytes_after_the_last_tensor_are_refused(tmp_path):
    path = write_folder(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(NpllmOSError, match="not a readable safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize("length", [2**62, 2**31, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path, length):
    path = write_folder(tmp_path) / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(NpllmOSError, match="not a readable safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"x": 3}',
        b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}',
        b'{"x": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path, header):
    write_folder(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {"x": np.ones(1, np.float32)}, header=header)
    with pytest.raises(NpllmOSError, match="not a readable safetensors file"):
        load(tmp_path)


def test_a_name_that_stands_twice_in_the_header_is_refused(tmp_path):
    write_folder(tmp_path)
    entry = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    header = f'{{"lm_head.weight": {entry}, "lm_head.weight": {entry}}}'.encode()
    write_safetensors(tmp_path / "model.safetensors", {"x": np.ones(1, np.float32)}, header=header)
    with pytest.raises(NpllmOSError, match=r"'lm_head\.weight' twice|not a readable"):
        read_entries(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(NpllmOSError, match=f"neither model.safetensors nor {INDEX}$"):
        read_entries(tmp_path)
    with pytest.raises(NpllmOSError, match="no such folder"):
        read_entries(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "weights.pkl"]
)
def test_pickles_are_refused_with_the_reason(tmp_path, name):
    write_json(tmp_path / "config.json", config_dict())
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(
        NpllmOSError,
        match=rf"{name} may hold Python pickles, which can run any code .* are refused",
    ):
        npllm.load(tmp_path)


# ------------------------------------------------------------------------------------------------------------------------- the index


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "",
        ".",
        "..",
        "./model-1.safetensors",
        "sub/../model-1.safetensors",
    ],
)
def test_an_index_may_only_name_files_of_its_own_folder(tmp_path, name):
    folder = tmp_path / "folder"
    weight_map = write_shards(folder, weights())
    (folder / "sub").mkdir()
    for place in (
        tmp_path / "outside.safetensors",
        folder / "sub" / "model.safetensors",
        folder / "model-1.safetensors",
    ):
        write_safetensors(place, weights())
    write_json(folder / INDEX, {"weight_map": weight_map | {"lm_head.weight": name}})
    with pytest.raises(NpllmValueError, match="may only name files of its own folder") as caught:
        load(folder)
    assert repr(name) in str(caught.value)


def test_a_shard_may_be_a_link(tmp_path):
    write_shards(tmp_path / "folder", weights())
    blob = tmp_path / "blob"
    shard = tmp_path / "folder" / "model-00002-of-00003.safetensors"
    shard.rename(blob)
    shard.symlink_to(blob)
    close(
        by_name(load(tmp_path / "folder"))["model.norm.weight"],
        weights()["model.norm.weight"],
        times=0,
    )


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path, weights())
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(NpllmOSError, match=r"model-00002-of-00003\.safetensors: no such file"):
        load(tmp_path)


def test_a_tensor_that_its_shard_does_not_hold_is_named(tmp_path):
    weight_map = write_shards(tmp_path, weights())
    write_json(
        tmp_path / INDEX,
        {"weight_map": weight_map | {"lm_head.wait": weight_map["lm_head.weight"]}},
    )
    with pytest.raises(NpllmValueError, match=r"do not hold: lm_head\.wait in model-"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": "x"}, {"weight_map": None}],
)
def test_an_index_without_a_weight_map_is_refused(tmp_path, content):
    write_json(tmp_path / INDEX, content)
    with pytest.raises(NpllmValueError, match="weight_map"):
        read_entries(tmp_path)


@pytest.mark.parametrize("name", [5, None, ["a"], {"a": 1}, "a\0b"])
def test_an_index_with_a_file_that_is_no_name_is_refused(tmp_path, name):
    write_json(tmp_path / INDEX, {"weight_map": {"lm_head.weight": name}})
    with pytest.raises(NpllmError):
        read_entries(tmp_path)


def test_a_single_file_wins_over_an_index(tmp_path):
    write_folder(tmp_path)
    (tmp_path / INDEX).write_text("no json")
    assert len(read_entries(tmp_path)) == len(weights())


# --------------------------------------------------------------------------------------------------------------------- whole models


def test_a_loaded_model_computes_like_the_one_made_of_arrays(tmp_path):
    ids = random_ids(2, 7)
    close(npllm.load(write_folder(tmp_path))(ids), model()(ids), times=0)


def test_storage_in_16_bits_is_widened_exactly(tmp_path):
    ids = random_ids(1, 7)
    write_folder(tmp_path, dtype=ml_dtypes.bfloat16)
    stored, wide = (
        npllm.load(tmp_path, dtype=dtype, ops=npllm.ops.reference) for dtype in (None, "float32")
    )
    assert stored.params.embed_tokens.dtype == ml_dtypes.bfloat16
    close(stored(ids), wide(ids), times=0)
    close(npllm.load(tmp_path)(ids), wide(ids), times=1)  # kernels add up in an order of their own


def test_a_folder_that_is_missing_is_an_oserror(tmp_path):
    with pytest.raises(NpllmOSError, match="neither a folder nor a fetched checkpoint"):
        npllm.load(tmp_path / "nowhere")


def test_a_config_that_is_missing_is_an_oserror(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", weights())
    with pytest.raises(NpllmOSError, match=r"config\.json"):
        npllm.load(tmp_path)


def test_the_headers_say_where_each_tensor_stands(tmp_path):
    tensors = weights()
    path = write_folder(tmp_path, tensors=tensors) / "model.safetensors"
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    for name, entry in read_entries(tmp_path).items():
        assert data[entry.start : entry.stop] == tensors[name].tobytes()
        assert list(entry.shape) == header[name]["shape"]


def test_names_from_before_the_folders_can_still_be_imported():
    import npllm.checkpoint as old

    from npllm.checkpoints import finite, phi3_layout, safetensors
    from npllm.models import params

    assert safetensors.Params is old.Params is params.Params
    assert safetensors.LayerParams is old.LayerParams is params.LayerParams
    assert old.load_params is phi3_layout.load_params
    assert old.expected_shapes is phi3_layout.expected_shapes
    assert old.find_nonfinite is finite.find_nonfinite
