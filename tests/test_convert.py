"""npllm.checkpoints.gguf.convert: a Llama GGUF file becomes a Phi-3 folder that computes the same
function.
"""

import json

import numpy as np
import pytest

from npllm.checkpoints.gguf import convert
from npllm.checkpoints.gguf import reader as gguf_file
from npllm.errors import NpllmError, NpllmOSError, NpllmValueError

gguf = pytest.importorskip("gguf")
ml_dtypes = pytest.importorskip("ml_dtypes")
from gguf import GGMLQuantizationType as Q  # noqa: E402

D_MODEL, N_HEAD, N_KV_HEAD, D_HEAD, D_FF, N_LAYER = 64, 4, 2, 16, 96, 2
TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "t",
    "h",
    "e",
    "Ġ",
    "1",
    "2",
    "th",
    "the",
    "Ġthe",
    "12",
]
MERGES = ["t h", "th e", "Ġ the", "1 2"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
METADATA = {
    "llama.block_count": N_LAYER,
    "llama.context_length": 256,
    "llama.embedding_length": D_MODEL,
    "llama.feed_forward_length": D_FF,
    "llama.attention.head_count": N_HEAD,
    "llama.attention.head_count_kv": N_KV_HEAD,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 100000.0,
    "llama.rope.dimension_count": D_HEAD,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(TOKENS) - 3),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.chat_template": TEMPLATE,
}


def random_tensors(seed=0):
    """A small Llama in GGUF's names and orientation: rows are outputs, q and k rows in interleaved
    RoPE order.
    """
    rng = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (len(TOKENS), D_MODEL), "output_norm.weight": (D_MODEL,)}
    for i in range(N_LAYER):
        for name, shape in {
            "attn_norm": (D_MODEL,),
            "attn_q": (N_HEAD * D_HEAD, D_MODEL),
            "attn_k": (N_KV_HEAD * D_HEAD, D_MODEL),
            "attn_v": (N_KV_HEAD * D_HEAD, D_MODEL),
            "attn_output": (D_MODEL, N_HEAD * D_HEAD),
            "ffn_norm": (D_MODEL,),
            "ffn_gate": (D_FF, D_MODEL),
            "ffn_up": (D_FF, D_MODEL),
            "ffn_down": (D_MODEL, D_FF),
        }.items():
            shapes[f"blk.{i}.{name}.weight"] = shape
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(path, tensors, metadata=METADATA, arch="llama", quantised=()):
    """Write a GGUF file with the gguf package; `quantised` names the tensors and their types."""
    writer = gguf.GGUFWriter(path, arch)
    adders = {
        str: writer.add_string,
        float: writer.add_float32,
        int: writer.add_uint32,
        list: writer.add_array,
    }
    for key, content in metadata.items():
        adders[type(content)](key, content)
    for name, data in tensors.items():
        if name in quantised:
            writer.add_tensor(
                name, gguf.quants.quantize(data, quantised[name]), raw_dtype=quantised[name]
            )
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_safetensors(path):
    """Read bfloat16 tensors with nothing but the format's definition: length, JSON, data."""
    raw = path.read_bytes()
    n_head = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n_head])
    header.pop("__metadata__")
    return {
        name: np.frombuffer(
            raw[8 + n_head :][slice(*entry["data_offsets"])], ml_dtypes.bfloat16
        ).reshape(entry["shape"])
        for name, entry in header.items()
    }


def bf16(x):
    return x.astype(ml_dtypes.bfloat16)


def same(actual, desired):
    """Equal bit for bit, type and shape included."""
    assert actual.dtype == desired.dtype
    assert actual.shape == desired.shape
    assert actual.tobytes() == desired.tobytes()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    tensors = random_tensors()
    convert.gguf_to_phi3(write_gguf(folder / "tiny.gguf", tensors), folder / "tiny")
    return tensors, folder / "tiny"


# --- the row order of q and k


def interleaved_rope(x, angle):
    """Rotate the pairs (2 i, 2 i + 1) of the last axis, as llama.cpp does with GGUF's rows."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return np.stack(
        [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1
    ).reshape(x.shape)


def half_split_rope(x, angle):
    """Rotate the pairs (i, i + d_head / 2) of the last axis, as Phi-3 does."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1
    )


def test_half_split_keeps_every_attention_score():
    rng = np.random.default_rng(1)
    w_q, w_k = rng.standard_normal((2, 3 * 8, 5))
    x_q, x_k = rng.standard_normal((2, 5))
    angles = rng.uniform(0, 6, (2, 4))

    def scores(rope, w_q, w_k):
        q, k = (w_q @ x_q).reshape(3, 8), (w_k @ x_k).reshape(3, 8)
        return np.sum(rope(q, angles[0]) * rope(k, angles[1]), axis=-1)

    actual = scores(half_split_rope, convert.half_split(w_q, 3), convert.half_split(w_k, 3))
    np.testing.assert_allclose(actual, scores(interleaved_rope, w_q, w_k), rtol=1e-12)
    assert not np.allclose(actual, scores(half_split_rope, w_q, w_k)), (
        "the order of the rows must matter here"
    )


def test_half_split_undoes_the_permutation_of_llama_cpp():
    weight = np.arange(4 * 6 * 5.0).reshape(4 * 6, 5)
    permuted = (
        weight.reshape(4, 2, 3, 5).swapaxes(1, 2).reshape(weight.shape)
    )  # its converter, in its words
    same(convert.half_split(permuted, 4), weight)


def test_half_split_names_rows_that_make_no_heads():
    with pytest.raises(NpllmValueError, match=r"4 heads of even width, got 12 rows"):
        convert.half_split(np.zeros((12, 3)), 4)


# --- the weights


def test_weights_are_fused_in_the_order_of_phi3(converted):
    tensors, folder = converted
    actual = read_safetensors(folder / "model.safetensors")
    for i in range(N_LAYER):
        gguf_name, name = f"blk.{i}.{{}}.weight".format, f"model.layers.{i}.{{}}.weight".format
        q, k, v = (tensors[gguf_name(part)] for part in ("attn_q", "attn_k", "attn_v"))
        order = np.r_[0:D_HEAD:2, 1:D_HEAD:2]  # the even rows of a head, then its odd ones
        q, k = (w.reshape(-1, D_HEAD, D_MODEL)[:, order].reshape(w.shape) for w in (q, k))
        same(actual.pop(name("self_attn.qkv_proj")), bf16(np.concatenate([q, k, v])))
        gate, up = tensors[gguf_name("ffn_gate")], tensors[gguf_name("ffn_up")]
        same(actual.pop(name("mlp.gate_up_proj")), bf16(np.concatenate([gate, up])))
        same(actual.pop(name("self_attn.o_proj")), bf16(tensors[gguf_name("attn_output")]))
        same(actual.pop(name("mlp.down_proj")), bf16(tensors[gguf_name("ffn_down")]))
        same(actual.pop(name("input_layernorm")), bf16(tensors[gguf_name("attn_norm")]))
        same(actual.pop(name("post_attention_layernorm")), bf16(tensors[gguf_name("ffn_norm")]))
    same(actual.pop("model.embed_tokens.weight"), bf16(tensors["token_embd.weight"]))
    same(actual.pop("model.norm.weight"), bf16(tensors["output_norm.weight"]))
    assert not actual


def test_the_safetensors_library_reads_the_file(converted):
    safetensors = pytest.importorskip("safetensors")
    _, folder = converted
    ours = read_safetensors(folder / "model.safetensors")
    with safetensors.safe_open(folder / "model.safetensors", framework="np") as file:
        assert set(file.keys()) == set(ours)
        assert file.metadata() == {"format": "pt"}
        assert all(file.get_slice(name).get_shape() == list(ours[name].shape) for name in ours)
        assert all(file.get_slice(name).get_dtype() == "BF16" for name in ours)


def test_the_data_are_aligned(converted):
    """A mapped file can be viewed as bfloat16 without a copy."""
    raw = (converted[1] / "model.safetensors").read_bytes()
    assert (8 + int.from_bytes(raw[:8], "little")) % 64 == 0


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_1, Q.F16], ids=lambda kind: kind.name)
def test_quantised_tensors_are_dequantised(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(gguf_file, "ROWS_AT_ONCE", 7)  # so that blocks of rows end inside heads
    tensors = random_tensors()
    names = [name for name, data in tensors.items() if data.ndim == 2]
    write_gguf(tmp_path / "q.gguf", tensors, quantised=dict.fromkeys(names, kind))
    convert.gguf_to_phi3(tmp_path / "q.gguf", tmp_path / "q")
    actual = read_safetensors(tmp_path / "q" / "model.safetensors")

    def stored(name):
        return gguf.quants.dequantize(gguf.quants.quantize(tensors[name], kind), kind)

    same(actual["model.embed_tokens.weight"], bf16(stored("token_embd.weight")))
    qkv = [stored(f"blk.1.attn_{part}.weight") for part in "qkv"]
    qkv = np.concatenate(
        [convert.half_split(qkv[0], N_HEAD), convert.half_split(qkv[1], N_KV_HEAD), qkv[2]]
    )
    same(actual["model.layers.1.self_attn.qkv_proj.weight"], bf16(qkv))


def test_an_output_matrix_becomes_an_untied_lm_head(tmp_path):
    tensors = random_tensors()
    tensors["output.weight"] = -tensors["token_embd.weight"]
    convert.gguf_to_phi3(write_gguf(tmp_path / "u.gguf", tensors), tmp_path / "u")
    same(
        read_safetensors(tmp_path / "u/model.safetensors")["lm_head.weight"],
        bf16(tensors["output.weight"]),
    )
    assert json.loads((tmp_path / "u/config.json").read_text())["tie_word_embeddings"] is False


# --- config and tokenizer


def test_config(converted):
    config = json.loads((converted[1] / "config.json").read_text())
    expected = {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "vocab_size": len(TOKENS),
        "hidden_size": D_MODEL,
        "intermediate_size": D_FF,
        "num_hidden_layers": N_LAYER,
        "num_attention_heads": N_HEAD,
        "num_key_value_heads": N_KV_HEAD,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,  # the float32 of the GGUF, written short
        "rope_theta": 100000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected
    generation = json.loads((converted[1] / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("the", ["the"]),
        ("the the", ["the", "Ġthe"]),
        ("12", ["1", "2"]),  # single digits, although the vocabulary has a token for both
        ("the<|im_end|>the", ["the", "<|im_end|>", "the"]),
        ("", []),
    ],
)
def test_tokenizer(converted, text, tokens):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(converted[1] / "tokenizer.json"))
    encoding = tokenizer.encode(text)
    assert encoding.tokens == tokens
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text
    assert "<|" not in tokenizer.decode(encoding.ids)


def test_tokenizer_config(converted):
    config = json.loads((converted[1] / "tokenizer_config.json").read_text())
    assert config["chat_template"] == TEMPLATE
    specials = [config[f"{name}_token"] for name in ("bos", "eos", "pad", "unk")]
    assert specials == ["<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>"]
    assert config["model_max_length"] == 256


# --- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.context_length": None}, "has no 'llama.context_length'"),
        ({"llama.block_count": "two"}, "llama.block_count must be int, got str: two"),
        ({"llama.attention.head_count": 5}, "n_head heads of even width, got 64 and 5"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count must be 16, got 8"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type must be 'none', got 'yarn'"),
        (
            {"llama.embedding_length": 128, "llama.rope.dimension_count": 32},
            r"token_embd.weight must be \[13, 128\]",
        ),
        ({"llama.block_count": 3}, "tensors missing: .*blk.2."),
        ({"llama.block_count": 1}, "would be dropped: .*blk.1."),
        (
            {"tokenizer.ggml.pre": "llama-bpe"},
            "tokenizer.ggml.pre must be 'smollm', got 'llama-bpe'",
        ),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model must be 'gpt2', got 'llama'"),
        ({"tokenizer.ggml.merges": ["t q"]}, "join two tokens into a third, got 't q'"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type must be 13, got 1"),
        ({"tokenizer.ggml.eos_token_id": 99}, "below n_vocab = 13, got .*99"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_metadata_that_cannot_be_converted_is_named(tmp_path, change, message):
    metadata = {key: content for key, content in (METADATA | change).items() if content is not None}
    path = write_gguf(tmp_path / "bad.gguf", random_tensors(), metadata)
    with pytest.raises(NpllmValueError, match=message) as caught:
        convert.gguf_to_phi3(path, tmp_path / "out")
    assert "bad.gguf" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_named(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", random_tensors(), arch="mamba")
    with pytest.raises(
        NpllmValueError,
        match=r"m\.gguf: general\.architecture must be one of llama, phi3, got 'mamba'",
    ):
        convert.gguf_to_phi3(path, tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file", b"GGUF", b"GGUF" + bytes(40)])
def test_a_file_that_is_not_gguf_is_named(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(NpllmValueError, match=r"x\.gguf: not a complete GGUF file"):
        convert.gguf_to_phi3(tmp_path / "x.gguf", tmp_path / "out")


def test_a_truncated_file_is_named(tmp_path):
    whole = write_gguf(tmp_path / "x.gguf", random_tensors()).read_bytes()
    for keep in (len(whole) - 4096, len(whole) // 2, 1500, 600, 30):
        (tmp_path / "x.gguf").write_bytes(whole[:keep])
        with pytest.raises(NpllmValueError, match=r"x\.gguf"):
            convert.gguf_to_phi3(tmp_path / "x.gguf", tmp_path / "out")


def test_files_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(NpllmOSError, match=r"none\.gguf: cannot be read"):
        convert.gguf_to_phi3(tmp_path / "none.gguf", tmp_path / "out")
    path = write_gguf(tmp_path / "x.gguf", random_tensors())
    with pytest.raises(NpllmOSError, match="cannot be written"):
        convert.gguf_to_phi3(path, path / "below a file")


def test_an_interrupted_conversion_has_no_config(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    path = write_gguf(tmp_path / "x.gguf", random_tensors())
    monkeypatch.setattr(convert, "dequantized_rows", stop)
    with pytest.raises(KeyboardInterrupt):
        convert.gguf_to_phi3(path, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_errors_are_of_npllm():
    assert issubclass(NpllmValueError, NpllmError)


# --- the same numbers in Transformers


@pytest.mark.live
def test_transformers_computes_the_same_from_both_layouts(tmp_path):
    """LlamaForCausalLM on the original weights = Phi3ForCausalLM on the folder made from their
    GGUF.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=D_MODEL,
        intermediate_size=D_FF,
        num_hidden_layers=N_LAYER,
        num_attention_heads=N_HEAD,
        num_key_value_heads=N_KV_HEAD,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(config).eval()
    for parameter in llama.parameters():
        parameter.data = parameter.data.bfloat16().float()  # values that the folder can hold
    write_gguf(tmp_path / "llama.gguf", gguf_of(llama.state_dict()))
    convert.gguf_to_phi3(tmp_path / "llama.gguf", tmp_path / "phi3")
    phi3, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "phi3", dtype=torch.float32, output_loading_info=True
    )
    assert type(phi3).__name__ == "Phi3ForCausalLM"
    assert not any(report.values())
    ids = torch.tensor([[1, 3, 5, 7, 11, 4, 2, 9, 10, 12]])
    with torch.no_grad():
        desired, actual = llama(ids).logits, phi3(ids).logits
    assert desired.abs().max() > 1
    np.testing.assert_allclose(
        actual.numpy(), desired.numpy(), atol=1e-5 * float(desired.abs().max())
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "phi3")
    assert tokenizer("the the12<|im_end|>").input_ids == [10, 11, 7, 8, 2]
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False) == "the"
    )


def gguf_of(state):
    """Name and permute the weights of a Hugging Face Llama as llama.cpp's converter does."""
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    result = {
        "token_embd.weight": state["model.embed_tokens.weight"].numpy(),
        "output_norm.weight": state["model.norm.weight"].numpy(),
    }
    for i in range(N_LAYER):
        for theirs, ours in names.items():
            data = state[f"model.layers.{i}.{theirs}.weight"].numpy()
            if ours in ("attn_q", "attn_k"):
                data = (
                    data.reshape(-1, 2, D_HEAD // 2, D_MODEL)
                    .swapaxes(1, 2)
                    .reshape(data.shape)
                    .copy()
                )
            result[f"blk.{i}.{ours}.weight"] = data
    return result


@pytest.mark.weights
@pytest.mark.live
def test_transformers_answers_paris_from_the_default_checkpoint():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from npllm.checkpoints.fetch import fetch

    model = transformers.AutoModelForCausalLM.from_pretrained(fetch(), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(fetch())
    ids = tokenizer("The capital of France is").input_ids
    assert ids == [504, 3575, 282, 4649, 314]
    with torch.no_grad():
        best = torch.softmax(model(torch.tensor([ids])).logits[0, -1], -1).topk(5)
    assert [tokenizer.decode([i]) for i in best.indices] == [
        " Paris",
        " the",
        " London",
        " Le",
        " New",
    ]
    np.testing.assert_allclose(
        best.values.numpy(), [0.7706, 0.0642, 0.0122, 0.0100, 0.0093], atol=6e-5
    )


@pytest.mark.weights
@pytest.mark.parametrize(
    ("text", "ids"),
    [  # as llama.cpp tokenises the GGUF file
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("1,234,567.89", [33, 28, 34, 35, 36, 28, 37, 38, 39, 30, 40, 41]),
        (
            "½ ¾ ²³ ₁₂ ① Ⅷ ㊿ 〇",
            [
                16738,
                216,
                43124,
                216,
                19133,
                39050,
                216,
                25699,
                219,
                44059,
                216,
                173,
                235,
                250,
                216,
                173,
                223,
                117,
                216,
                174,
                228,
                140,
                216,
                12109,
                225,
            ],
        ),
        (
            "don't I'll we've you're he'd I'm it's",
            [12420, 982, 339, 3060, 392, 3543, 346, 2316, 384, 6737, 339, 5248, 357, 506],
        ),
        ("🙂", [10813, 38887]),
        (
            "日本語のテキスト",
            [
                23274,
                115,
                40993,
                179,
                120,
                248,
                26453,
                11100,
                224,
                10391,
                251,
                10391,
                134,
                11100,
                226,
            ],
        ),
        ("<|im_start|>user\nhi<|im_end|>\n", [1, 4093, 198, 6004, 2, 198]),
        ("a  b   c    d", [81, 216, 278, 256, 265, 333, 287]),
        (" \n\n  a", [216, 8866, 253]),
        ("a\u00a0b", [81, 15442, 82]),
        ("x²+y²=z²", [104, 19133, 27, 105, 19133, 45, 106, 19133]),
        ("<|im_start", [44, 108, 306, 79, 3738]),
        (
            "٣٤٥ १२३ 一二三",
            [
                164,
                113,
                164,
                114,
                164,
                115,
                216,
                9310,
                117,
                9310,
                118,
                9310,
                119,
                216,
                22924,
                16736,
                230,
                7906,
                227,
            ],
        ),
    ],
)
def test_tokenisation_of_the_default_checkpoint(text, ids):
    from tokenizers import Tokenizer

    from npllm.checkpoints.fetch import fetch

    assert Tokenizer.from_file(str(fetch() / "tokenizer.json")).encode(text).ids == ids
