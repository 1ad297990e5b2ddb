"""BERT encoders: tiny random folders beside a naive float64 oracle, what texts become, and every
refusal.
"""

import json
import math

import guard
import numpy as np
import pytest
import tiny
from close import close
from hypothesis import given, settings
from hypothesis import strategies as st
from optional import invoke
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import npllm
from npllm import encoder, ops
from npllm.checkpoints import bert_layout
from npllm.config.bert_config import BertConfig
from npllm.errors import NpllmError, NpllmOSError, NpllmTypeError, NpllmValueError

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "the",
    "cat",
    "sat",
    "on",
    "mat",
    "##s",
    "##ting",
    "a",
    "b",
    "c",
    "d",
    "e",
]
CONFIG = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": len(WORDS),
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 10,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
}
texts = st.lists(
    st.lists(st.sampled_from(["the", "cats", "sat", "xyz", "MAT", "a", "b", ""]), max_size=14).map(
        " ".join
    ),
    max_size=6,
)


def tokenizer(*, special=True):
    """A WordPiece tokenizer; with special tokens around every text, as BERT has them."""
    backend = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    backend.normalizer, backend.pre_tokenizer = (
        normalizers.BertNormalizer(lowercase=True),
        pre_tokenizers.BertPreTokenizer(),
    )
    if special:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    backend.enable_padding(length=9)  # which npllm does not heed: it pads to the longest of a batch
    return backend


def tensors(config, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.standard_normal(shape) * (0.5 if len(shape) > 1 else 0.2)
            + ("LayerNorm.weight" in name)
        ).astype(dtype)
        for name, shape in bert_layout.expected_shapes(config).items()
    }


def write(path, *, weights=None, seed=0, dtype=np.float64, backend=None, files=(), **changes):
    """Write a BERT folder; `files`: further ones, (name, content)."""
    content = CONFIG | changes
    weights = (
        tensors(BertConfig.from_json(CONFIG | changes), seed, dtype) if weights is None else weights
    )
    tiny.write_folder(path, tensors=weights, tokenizer=tokenizer() if backend is None else backend)
    for name, data in (("config.json", content), *files):
        (path / name).parent.mkdir(exist_ok=True)
        tiny.write_json(path / name, data)
    return path


def make(seed=0, dtype=np.float64, *, backend=None, max_length=None, ops=None, **changes):
    """An encoder with random weights that came from no folder, and its weights by name."""
    config = BertConfig.from_json(CONFIG | changes)
    weights = tensors(config, seed, dtype)
    params = bert_layout.assemble(weights.get, config)
    return encoder.Encoder(
        config,
        params,
        ops=ops,
        tokenizer=npllm.Tokenizer(backend or plain()),
        max_length=max_length,
    ), weights


def plain(**options):
    backend = tokenizer(**options)
    backend.no_padding()
    return backend


# ------------------------------------------------------------------------------------------------------------ the oracle


def norm_oracle(x, w, name, eps):
    mean = x.mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(axis=-1, keepdims=True) + eps) * w[
        name + ".weight"
    ] + w[name + ".bias"]


ACTIVATION_ORACLES = {
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
}


def hidden_oracle(w, config, ids, types=None):
    """Hidden states [n_seq, d_model] of one text without padding, position by position and head by
    head.
    """
    w = {name: x.astype(np.float64) for name, x in w.items()}
    d_head, n = config.hidden_size // config.num_attention_heads, len(ids)
    x = np.array(
        [
            w["embeddings.word_embeddings.weight"][i]
            + w["embeddings.position_embeddings.weight"][t]
            + w["embeddings.token_type_embeddings.weight"][0 if types is None else types[t]]
            for t, i in enumerate(ids)
        ]
    )
    x = norm_oracle(x, w, "embeddings.LayerNorm", config.layer_norm_eps)
    for number in range(config.num_hidden_layers):
        at = f"encoder.layer.{number}."

        def linear(x, name, at=at):
            return x @ w[f"{at}{name}.weight"].T + w[f"{at}{name}.bias"]

        q, k, v = (linear(x, f"attention.self.{name}") for name in ("query", "key", "value"))
        gathered = np.zeros_like(q)
        for h in range(config.num_attention_heads):
            mine = slice(h * d_head, (h + 1) * d_head)
            for i in range(n):
                scores = [float(q[i, mine] @ k[j, mine]) / math.sqrt(d_head) for j in range(n)]
                p = [math.exp(s - max(scores)) for s in scores]
                gathered[i, mine] = sum(p[j] * v[j, mine] for j in range(n)) / sum(p)
        x = norm_oracle(
            x + linear(gathered, "attention.output.dense"),
            w,
            at + "attention.output.LayerNorm",
            config.layer_norm_eps,
        )
        y = np.vectorize(ACTIVATION_ORACLES[config.hidden_act])(linear(x, "intermediate.dense"))
        x = norm_oracle(
            x + linear(y, "output.dense"), w, at + "output.LayerNorm", config.layer_norm_eps
        )
    return x


def embed_oracle(model, w, text, length, normalize=True):
    ids = plain().encode(text).ids
    ids = ids if len(ids) <= length else [*ids[: length - 1], 3]
    e = hidden_oracle(w, model.config, ids).mean(axis=0)
    return e / math.sqrt(sum(x * x for x in e)) if normalize else e


# ------------------------------------------------------------------------------------------------------------- the numbers


@settings(max_examples=25)
@given(
    texts,
    st.integers(0, 2**32 - 1),
    st.sampled_from(["gelu", "relu", "silu"]),
    st.sampled_from([1, 2, 3, 6]),
    st.integers(3, 10),
    st.booleans(),
    st.sampled_from([np.float64, np.float32]),
    st.sampled_from([ops.reference, ops.blockwise, None]),
)
def test_embeddings_are_those_of_the_oracle(
    texts, seed, act, n_head, length, normalize, dtype, set_of_ops
):
    model, w = make(
        seed, dtype, hidden_act=act, num_attention_heads=n_head, max_length=length, ops=set_of_ops
    )
    got = model.embed(texts, normalize=normalize)
    want = np.array([embed_oracle(model, w, text, length, normalize) for text in texts]).reshape(
        len(texts), 12
    )
    close(got, want, dtype=dtype, times=64)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=4), st.integers(0, 2**32 - 1), st.data())
def test_hidden_states_do_not_see_padding_on_either_side(lengths, seed, data):
    model, w = make(seed)
    rng = np.random.default_rng(seed)
    n = max(lengths)
    ids, types = (
        rng.integers(0, len(WORDS), (len(lengths), n)),
        rng.integers(0, 2, (len(lengths), n)),
    )
    valid = np.arange(n) < np.array(lengths)[:, None]
    hidden = model(
        ids,
        attention_mask=valid.astype(data.draw(st.sampled_from([bool, np.int64]))),
        token_type_ids=types,
    )
    for row, length in enumerate(lengths):
        close(
            hidden[row, :length],
            hidden_oracle(w, model.config, ids[row, :length], types[row]),
            times=64,
        )


def test_every_token_sees_both_sides():
    model, _ = make()
    ids = np.array([[2, 4, 5, 6, 3]])
    base = model(ids)
    for changed in (1, 3):
        other = ids.copy()
        other[0, changed] = 8
        assert (np.abs(model(other) - base).max(axis=-1) > 1e-6).all()


@given(texts)
def test_the_order_and_the_company_of_texts_do_not_matter(texts):
    model, _ = make()
    together = model.embed(texts)
    assert together.shape == (len(texts), 12)
    for text, row in zip(texts, together, strict=True):
        close(model.embed([text])[0], row, times=16)
        assert abs(np.sum(row**2) - 1) < 1e-12


def test_many_texts_go_in_batches(monkeypatch):
    model, _ = make()
    texts = [" ".join(["cat"] * (i % 8)) for i in range(40)]
    whole = model.embed(texts)
    seen = []
    monkeypatch.setattr(encoder, "BATCH_TOKENS", 30)
    monkeypatch.setattr(
        encoder.Encoder,
        "__call__",
        lambda self, ids, call=encoder.Encoder.__call__, **k: (
            seen.append(ids.shape),
            call(self, ids, **k),
        )[1],
    )
    close(model.embed(texts), whole, times=16)
    assert sum(rows for rows, _ in seen) == 40
    assert max(rows * length for rows, length in seen) <= 30


def test_a_tokenizer_without_special_tokens_gives_nothing_the_vector_0():
    model, _ = make(backend=plain(special=False))
    got = model.embed(["", "cat"])
    assert not got[0].any()
    assert got[1].any()
    assert encoder.cosine_similarities(got)[0, 0] == 0


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 5))
def test_the_mean_is_over_tokens_and_ignores_what_stands_in_padding(seed, n_batch, n_seq):
    rng = np.random.default_rng(seed)
    hidden, valid = rng.standard_normal((n_batch, n_seq, 3)), rng.random((n_batch, n_seq)) < 0.6
    want = np.array(
        [h[v].mean(axis=0) if v.any() else np.zeros(3) for h, v in zip(hidden, valid, strict=True)]
    )
    hidden[~valid] = np.nan
    close(encoder.mean_pool(hidden, valid), want)


def test_the_set_of_ops_is_the_one_that_runs():
    fired = []
    counted = ops.reference.replace(
        **{
            name: lambda *a, _op=getattr(ops, name), _name=name, **k: (
                fired.append(_name),
                _op(*a, **k),
            )[1]
            for name in ("embed", "layer_norm", "linear", "attention", "gelu")
        }
    )
    make(ops=counted)[0].embed(["cat", "the cat"])
    assert {name: fired.count(name) for name in set(fired)} == {
        "embed": 2,
        "layer_norm": 5,
        "linear": 12,
        "attention": 2,
        "gelu": 2,
    }


# ----------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_folder_loads_with_the_prefix_and_without(tmp_path, prefix):
    w = tensors(BertConfig.from_json(CONFIG))
    extra = {
        "embeddings.position_ids": np.arange(10)[None],
        "pooler.dense.weight": np.zeros((12, 12)),
        "pooler.dense.bias": np.zeros(12),
    }
    write(tmp_path / "x", weights={prefix + name: x for name, x in (w | extra).items()})
    with pytest.warns(
        UserWarning,
        match=r"not used: pooler\.dense\.bias, pooler\.dense\.weight; hidden states are combined",
    ):
        model = npllm.load(tmp_path / "x")
    assert isinstance(model, npllm.Encoder)
    assert repr(model).startswith("<npllm.Encoder x, ")
    close(model.embed(["the cat"])[0], embed_oracle(model, w, "the cat", 10), times=64)


@pytest.mark.parametrize(
    ("dtype", "result", "error"),
    [
        ("float64", "float64", 1e-6),
        ("float32", "float32", 1e-6),
        ("bfloat16", "float32", 0.05),
        ("float16", "float32", 0.01),
        ("int8", "float32", 0.05),
        ("int4", "float32", 0.3),
    ],
)
def test_weights_load_in_every_dtype(tmp_path, dtype, result, error):
    folder = write(tmp_path, dtype=np.float32)
    w = tensors(BertConfig.from_json(CONFIG), dtype=np.float32)
    model = npllm.load(folder, dtype=dtype)
    got = model.embed(["the cat sat"])
    assert got.dtype == result
    assert np.abs(got[0] - embed_oracle(model, w, "the cat sat", 10)).max() < error


@pytest.mark.parametrize(
    ("sentence", "truncation", "length"),
    [(7, 5, 7), (None, 5, 5), (None, None, 10), (400, 5, 10), (None, 400, 10)],
)
def test_a_text_is_cut_where_the_folder_says(tmp_path, sentence, truncation, length):
    backend = tokenizer()
    if truncation:
        backend.enable_truncation(truncation)
    files = (
        [("sentence_bert_config.json", {"max_seq_length": sentence, "do_lower_case": False})]
        if sentence
        else []
    )
    model = npllm.load(write(tmp_path, backend=backend, files=files))
    assert model.max_length == length
    assert len(model.tokenizer.encode("the " * 50)) == length
    close(model.embed(["the " * 50])[0], model.embed(["the " * (length - 2)])[0], times=16)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "sentence_bert_config.json",
            {"max_seq_length": "9"},
            "max_seq_length must be an integer of at least 1, got '9'",
        ),
        (
            "sentence_bert_config.json",
            {"max_seq_length": 2},
            r"texts must be cut at 3 \(2 special tokens and one more\) ... .*= 10 tokens, got 2",
        ),
    ],
)
def test_lengths_that_make_no_sense_are_refused(tmp_path, name, content, words):
    with pytest.raises(NpllmValueError, match=words):
        npllm.load(write(tmp_path, files=[(name, content)]))


def test_a_folder_that_states_its_pooling_does_not_name_the_pooler(tmp_path):
    files = [
        (
            "1_Pooling/config.json",
            {
                "word_embedding_dimension": 12,
                "pooling_mode_cls_token": False,
                "pooling_mode_mean_tokens": True,
            },
        )
    ]
    w = tensors(BertConfig.from_json(CONFIG)) | {
        "pooler.dense.weight": np.zeros((12, 12)),
        "pooler.dense.bias": np.zeros(12),
    }
    stated, unstated = (
        npllm.load(write(tmp_path / "a", weights=w, files=files)),
        npllm.load(write(tmp_path / "b")),
    )
    close(stated.embed(["the cat"]), unstated.embed(["the cat"]), times=0)


@pytest.mark.parametrize(
    "ids",
    [np.zeros((1, 10), np.int64), np.arange(9), np.arange(10.0), np.arange(10)[::-1].copy()],
    ids=str,
)
def test_position_ids_that_do_not_count_up_are_named(tmp_path, ids):
    w = tensors(BertConfig.from_json(CONFIG)) | {"embeddings.position_ids": ids}
    with pytest.warns(
        UserWarning,
        match=r"not used: embeddings\.position_ids; it is not 0 \.\.\. 9, which is used",
    ):
        model = npllm.load(write(tmp_path, weights=w))
    close(model.embed(["the cat"])[0], embed_oracle(model, w, "the cat", 10), times=64)


@pytest.mark.parametrize(
    ("name", "length"),
    [("model_max_length", 6), ("model_max_length", 1e30), ("model_max_length", None)],
)
def test_the_tokenizers_own_length_counts(tmp_path, name, length):
    backend = tokenizer()
    backend.enable_truncation(5)
    write(tmp_path, backend=backend)
    tiny.write_json(tmp_path / "tokenizer_config.json", {name: length})
    assert npllm.load(tmp_path).max_length == {6: 6, 1e30: 10, None: 5}[length]


def test_a_sentence_transformers_folder_does_not_cut_where_tokenizer_json_does(tmp_path):
    backend = tokenizer()
    backend.enable_truncation(5)
    assert (
        npllm.load(
            write(tmp_path, backend=backend, files=[("1_Pooling/config.json", {})])
        ).max_length
        == 10
    )


def test_one_error_lists_all_that_is_wrong_with_the_tensors(tmp_path):
    w = tensors(BertConfig.from_json(CONFIG))
    del w["encoder.layer.1.output.dense.bias"]
    w["encoder.layer.0.output.dense.bias"] = np.zeros(11)
    w["cls.predictions.bias"] = np.zeros(16)
    w["bert.embeddings.LayerNorm.bias"] = np.zeros(12)  # beside embeddings.LayerNorm.bias
    with pytest.raises(NpllmValueError) as caught:
        npllm.load(write(tmp_path, weights=w))
    for words in (
        "missing: encoder.layer.1.output.dense.bias",
        "unknown: bert.embeddings.LayerNorm.bias; wrong shape",
        "wrong shape: encoder.layer.0.output.dense.bias must be [12], got [11]",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type must be 'absolute' .*not implemented.*got 'relative_key'",
        ),
        ({"hidden_act": "gelu_new"}, "hidden_act must be one of gelu, relu, silu, got 'gelu_new'"),
        ({"is_decoder": True}, "is_decoder must be False"),
        ({"add_cross_attention": True}, "add_cross_attention must be False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be None"),
        (
            {"hidden_size": 13},
            "hidden_size must be a multiple of num_attention_heads, got 13 and 3",
        ),
        ({"hidden_size": 0}, "hidden_size must be an integer in 1"),
        ({"vocab_size": None}, "vocab_size must be an integer in 1 .*, got None"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers must be an integer"),
        ({"num_attention_heads": True}, "num_attention_heads must be an integer"),
        ({"type_vocab_size": -1}, "type_vocab_size must be an integer"),
        ({"max_position_embeddings": "512"}, "max_position_embeddings must be an integer"),
        ({"layer_norm_eps": -1}, "layer_norm_eps must be at least 0, got -1"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps must be a finite number"),
        ({"pad_token_id": 99}, "pad_token_id must be below vocab_size = 16, got 99"),
        ({"dtype": "int3"}, "dtype must be one of"),
        ({"model_type": "roberta"}, "model_type must be bert, got 'roberta'"),
    ],
)
def test_configurations_that_are_impossible_or_not_implemented_are_refused(changes, words):
    with pytest.raises(NpllmValueError, match=words):
        BertConfig.from_json(CONFIG | changes)


def test_unknown_keys_warn_by_name():
    with pytest.warns(UserWarning, match="unknown keys are ignored: novelty"):
        BertConfig.from_json(CONFIG | {"novelty": 1})


def test_a_folder_without_tokenizer_takes_ids_only(tmp_path):
    folder = write(tmp_path)
    (folder / "tokenizer.json").unlink()
    model = npllm.load(folder)
    assert model(np.array([[2, 4, 3]])).shape == (1, 3, 12)
    with pytest.raises(NpllmValueError, match=r"has no tokenizer\.json"):
        model.embed(["cat"])


# ------------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("texts", ["one text", None, 3, ["a", 1], [b"a"], [["a"]]])
def test_embed_takes_a_list_of_texts(texts):
    with pytest.raises(NpllmTypeError, match="texts must be a list of str, got"):
        make()[0].embed(texts)


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(NpllmTypeError, match="valid Unicode"):
        make()[0].embed(["a", "\ud800"])


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        ([[2, 16]], {}, "input_ids must lie in 0 ... vocab_size - 1 = 15, got 2 ... 16"),
        ([[-1]], {}, "input_ids must lie in"),
        ([2, 3], {}, r"input_ids must be integers \[n_batch, n_seq\]"),
        ([[2.0]], {}, "input_ids must be integers"),
        ([[1], [1, 2]], {}, "lists of equal length"),
        ([[2] * 11], {}, "11 tokens do not fit: max_position_embeddings is 10"),
        (
            [[2]],
            {"token_type_ids": [[2]]},
            "token_type_ids must lie in 0 ... type_vocab_size - 1 = 1",
        ),
        (
            [[2]],
            {"token_type_ids": [[1, 1]]},
            r"must be \[n_batch, n_seq\] = \[1, 1\], got \[1, 2\] and \[1, 1\]",
        ),
        ([[2]], {"attention_mask": np.ones((1, 2))}, r"got \[1, 1\] and \[1, 2\]"),
        ([[2]], {"attention_mask": np.array([[0.5]])}, "of 0 and 1"),
    ],
)
def test_ids_that_do_not_fit_are_refused(ids, options, words):
    with pytest.raises(NpllmError, match=words):
        make()[0](ids, **options)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.generate("cat"),
        lambda model: model.stream("cat"),
        lambda model: model.beam_search("cat"),
        lambda model: model.lm_head(np.ones(12)),
        lambda model: model.next_token_distribution("cat"),
        lambda model: model.new_cache(),
        lambda model: model.with_mask(None),
        lambda model: npllm.analysis.score.score(model, "the cat sat"),
        lambda model: npllm.pipeline("text-generation", model)("cat"),
        lambda model: npllm.analysis.packing.score_packed(model, ["the cat", "a b"]),
        lambda model: npllm.decoding.beam.beam_texts(model, "cat"),
        lambda model: npllm.analysis.steps.attention_steps(model, "cat", layer=0, head=0),
    ],
)
def test_an_encoder_refuses_what_only_a_language_model_can_do(call):
    with pytest.raises(NpllmError, match=r"is an encoder: it sees both sides .* use embed"):
        call(make()[0])


def test_a_language_model_refuses_to_embed():
    with pytest.raises(
        NpllmTypeError, match=r"is no encoder; embed is for .*npllm fetch all-minilm-l6-v2"
    ):
        tiny.model().embed(["cat"])


# ------------------------------------------------------------------------------------------------------------- the command


def run(*arguments):
    return invoke([str(argument) for argument in arguments])


def test_the_command_prints_cosines(tmp_path, monkeypatch):
    folder = write(tmp_path / "x")
    e = npllm.load(folder).embed(["the cat", "a mat", "the cat"])
    monkeypatch.setattr(
        pytest.importorskip("npllm.cli.predictions"),
        "fetch",
        lambda name: {"all-minilm-l6-v2": folder}[name],
    )
    for chosen in ([], ["-m", folder]):
        result = run("embed", "the cat", "a mat", "the cat", *chosen, "--json")
        assert result.exit_code == 0, result.output
        facts = json.loads(result.stdout)
        assert facts["texts"] == ["the cat", "a mat", "the cat"]
        close(np.array(facts["similarities"]), e @ e.T, times=4)
    lines = run("embed", "the cat", "a mat", "-m", folder).stdout.splitlines()
    assert lines == [
        f"  1   1.0000 {e[0] @ e[1]:7.4f}  'the cat'",
        f"  2  {e[0] @ e[1]:7.4f}  1.0000  'a mat'",
    ]


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "cat"],
        ["topk", "cat"],
        ["beam", "cat"],
        ["score", "the cat"],
        ["bench"],
        ["chat"],
        ["perplexity", __file__],
        ["attention", "-p", "cat", "--layer", "0", "--head", "0"],
    ],
)
def test_the_other_commands_refuse_an_encoder(tmp_path, command):
    result = run(*command, "-m", write(tmp_path))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "is an encoder" in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_command_refuses_a_language_model(tmp_path):
    result = run("embed", "cat", "-m", tiny.write_folder(tmp_path))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "is no encoder" in result.stderr


def test_a_known_name_that_is_not_there_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("NPLLM_WEIGHTS", str(tmp_path))
    with pytest.raises(NpllmOSError, match="`npllm fetch all-minilm-l6-v2` gets it"):
        npllm.load("all-minilm-l6-v2")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_an_encoder_runs_on_arrays_that_refuse_what_cupys_refuse(tmp_path, monkeypatch, dtype):
    folder, texts = write(tmp_path, dtype=np.dtype(dtype)), ["the cat", "", "a b c d sat"]
    here = npllm.load(folder, ops=ops.reference).embed(texts)
    guard.installed(monkeypatch)
    there = npllm.load(folder, backend="cupy", ops=ops.reference)
    assert type(there.params.word_embeddings) is guard.Array
    close(there.embed(texts), here, times=4)
