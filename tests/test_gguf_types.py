"""Which type a tensor gets: as llama.cpp's quantiser chooses."""

import pytest

from npllm.checkpoints.gguf.tensor_types import FILE_TYPES, ModelSizes, file_type_named, tensor_type
from npllm.errors import NpllmTypeError, NpllmValueError

WIDE = (4096, 4096)
# Layers of 32 that use_more_bits() of llama-quant.cpp is true for, worked out by hand.
MORE_OF_32 = {*range(4), *range(28, 32), 6, 9, 12, 15, 18, 21, 24, 27}


def kind_of(name, file_type, shape=WIDE, n_layer=32, is_tied=False, shares=True):
    sizes = ModelSizes(n_layer, is_tied, shares)
    return tensor_type(name, shape, FILE_TYPES[file_type], sizes)


@pytest.mark.parametrize(("file_type", "base"), [("q4_k_m", "Q4_K"), ("q5_k_m", "Q5_K")])
@pytest.mark.parametrize("kind", ["attn_v", "attn_qkv", "ffn_down"])
def test_the_m_mixes_give_some_layers_more_bits(file_type, base, kind):
    got = {i for i in range(32) if kind_of(f"blk.{i}.{kind}.weight", file_type) == "Q6_K"}
    assert got == MORE_OF_32
    assert {kind_of(f"blk.{i}.{kind}.weight", file_type) for i in range(32)} == {base, "Q6_K"}


def test_the_s_mix_gives_the_first_layers_more_bits():
    v = [i for i in range(32) if kind_of(f"blk.{i}.attn_v.weight", "q4_k_s") == "Q5_K"]
    down = [
        i for i in range(40) if kind_of(f"blk.{i}.ffn_down.weight", "q4_k_s", n_layer=40) == "Q5_K"
    ]
    assert (v, down) == ([0, 1, 2, 3], [0, 1, 2, 3, 4])
    assert {kind_of(f"blk.{i}.attn_v.weight", "q5_k_s") for i in range(32)} == {"Q5_K"}


def test_value_rows_of_the_70b_model_get_five_bits():
    names = [f"blk.{i}.attn_v.weight" for i in range(80)]
    assert {kind_of(x, "q4_k_m", n_layer=80) for x in names} == {"Q5_K", "Q6_K"}
    assert {kind_of(x, "q4_k_m", n_layer=80, shares=False) for x in names} == {"Q4_K", "Q6_K"}


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_other_matrices_have_the_type_of_the_file(file_type):
    base = FILE_TYPES[file_type].kind
    for name in ("attn_q", "attn_k", "attn_output", "ffn_up", "ffn_gate"):
        assert kind_of(f"blk.7.{name}.weight", file_type) == base
    assert kind_of("token_embd.weight", file_type) == base
    assert kind_of("blk.0.attn_norm.weight", file_type, (4096,)) == "F32"


@pytest.mark.parametrize(
    ("file_type", "wide", "narrow"),
    [
        ("q4_0", "Q6_K", "Q8_0"),
        ("q5_1", "Q6_K", "Q8_0"),
        ("q8_0", "Q8_0", "Q8_0"),
        ("q4_k_m", "Q6_K", "Q8_0"),
        ("f16", "F16", "F16"),
        ("bf16", "BF16", "BF16"),
    ],
)
def test_the_output_matrix(file_type, wide, narrow):
    for name, tied in (("output.weight", False), ("token_embd.weight", True)):
        assert kind_of(name, file_type, is_tied=tied) == wide
        assert kind_of(name, file_type, (49152, 576), is_tied=tied) == narrow


@pytest.mark.parametrize(
    ("file_type", "width", "wanted"),
    [
        ("q4_k_m", 576, "Q5_0"),
        ("q5_k_m", 576, "Q5_1"),
        ("q6_k", 576, "Q8_0"),
        ("q4_0", 576, "Q4_0"),
        ("q4_k_s", 40, "F16"),
        ("q4_0", 40, "F16"),
        ("q8_0", 40, "F16"),
        ("f32", 40, "F32"),
    ],
)
def test_rows_that_are_no_whole_blocks_fall_back(file_type, width, wanted):
    assert kind_of("blk.7.attn_q.weight", file_type, (64, width)) == wanted


def test_an_unknown_type_lists_all_and_the_nearest():
    with pytest.raises(NpllmValueError, match=r"one of f32, .*'q4_k_n'; did you mean q4_k_"):
        file_type_named("q4_k_n")
    with pytest.raises(NpllmValueError, match=r"got 'xyz'$"):
        file_type_named("xyz")
    with pytest.raises(NpllmTypeError, match="must be a str, got int"):
        file_type_named(4)
    assert file_type_named("Q4_K_M").number == 15
