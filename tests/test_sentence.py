"""sentence-transformers folders: vectors that the library itself made, and every refusal by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentence
import tiny
from close import close
from hypothesis import given
from hypothesis import strategies as st
from sentence import CASES, TEXTS, Case, write

import npllm
from npllm import ops
from npllm.errors import NpllmError, NpllmTypeError, NpllmValueError
from npllm.models.sentence import ACTIVATIONS, POOLINGS, Dense, Head, Normalize, pool

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sentence.json").read_text("utf-8"))
TANH = "torch.nn.modules.activation.Tanh"
every_case = pytest.mark.parametrize("name", CASES)


def embed(model, call):
    return model.embed(TEXTS, **{"normalize": False} | call)


@every_case
@pytest.mark.parametrize("set_of_ops", [None, ops.reference], ids=["fast", "reference"])
def test_vectors_are_those_of_sentence_transformers(tmp_path, name, set_of_ops):
    case = CASES[name]
    model = npllm.load(write(tmp_path, case), ops=set_of_ops)
    for call, golden in zip(case.calls, GOLDEN["cases"][name], strict=True):
        close(embed(model, call), np.array(golden, np.float32), times=4)


@every_case
@pytest.mark.parametrize(
    ("dtype", "result", "error"),
    [("float64", "float64", 2e-5), ("bfloat16", "float32", 0.1), ("int8", "float32", 0.1)],
)
def test_other_dtypes_are_near(tmp_path, name, dtype, result, error):
    case = CASES[name]
    got, want = (
        embed(npllm.load(write(tmp_path, case), dtype=dtype), {}),
        np.array(GOLDEN["cases"][name][0]),
    )
    assert got.dtype == result
    assert np.abs(got - want).max() < error * max(1, np.abs(want).max())


def test_the_file_says_what_made_it_and_is_of_these_cases():
    assert GOLDEN["made with"].keys() == {
        "sentence_transformers",
        "transformers",
        "torch",
        "numpy",
        "python",
    }
    assert GOLDEN["texts"] == TEXTS
    assert GOLDEN["cases"].keys() == CASES.keys()


def test_the_width_is_known_without_a_text(tmp_path):
    for number, case in enumerate(CASES.values()):
        model = npllm.load(write(tmp_path / str(number), case))
        assert (
            model.embed([]).shape
            == (0, model.settings.head.size(12))
            == (0, model.embed(["a"]).shape[1])
        )


# ------------------------------------------------------------------------------------------------------------------- pooling


def pool_oracle(hidden, mode):
    """Of the tokens of one text [n, d], n >= 1."""
    n = len(hidden)
    return {
        "cls": hidden[0],
        "lasttoken": hidden[-1],
        "max": hidden.max(axis=0),
        "mean": sum(hidden) / n,
        "mean_sqrt_len_tokens": sum(hidden) / n**0.5,
        "weightedmean": sum((t + 1) * hidden[t] for t in range(n)) / sum(range(1, n + 1)),
    }[mode]


@pytest.mark.parametrize("mode", POOLINGS)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.sampled_from([np.float64, np.float32]),
)
def test_pooling_is_over_tokens_and_ignores_what_stands_in_padding(mode, seed, lengths, dtype):
    rng, n_seq = np.random.default_rng(seed), max(*lengths, 1)
    hidden, valid = (
        rng.standard_normal((len(lengths), n_seq, 3)).astype(dtype),
        np.arange(n_seq) < np.array(lengths)[:, None],
    )
    want = np.array(
        [
            pool_oracle(h[:n], mode) if n else np.zeros(3)
            for h, n in zip(hidden.astype(np.float64), lengths, strict=True)
        ]
    )
    hidden[~valid] = np.nan
    close(pool(hidden, valid, mode), want, dtype=dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_dense_module_by_hand(name):
    import math

    rng = np.random.default_rng(0)
    x, weight, bias = (
        rng.standard_normal((2, 3)),
        rng.standard_normal((4, 3)),
        rng.standard_normal(4),
    )
    formula = {
        "Identity": lambda z: z,
        "Tanh": math.tanh,
        "ReLU": lambda z: max(z, 0.0),
        "SiLU": lambda z: z / (1 + math.exp(-z)),
        "GELU": lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2,
    }[name]
    want = [
        [
            formula(sum(row[i] * w[i] for i in range(3)) + b)
            for w, b in zip(weight, bias, strict=True)
        ]
        for row in x
    ]
    close(Dense(weight, bias, name)(x), np.array(want), times=4)


def test_a_prompt_longer_than_the_text_allows_leaves_nothing_to_pool():
    hidden, valid = np.ones((1, 3, 2)), np.ones((1, 3), bool)
    for mode in POOLINGS:
        assert not Head((mode,), include_prompt=False)(hidden, valid, 5).any()


# ------------------------------------------------------------------------------------------------------------------- prompts


def test_the_prompt_is_written_before_the_text(tmp_path):
    model = npllm.load(write(tmp_path, CASES["default prompt"]))
    close(model.embed(["the cat"]), model.embed(["query: the cat"], prompt=""), times=0)
    close(model.embed(["cat"], prompt="the "), model.embed(["the cat"], prompt=""), times=0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            {"prompt_name": "other"},
            "prompt_name must be one of query, document, long, empty, got 'other'",
        ),
        ({"prompt_name": 5}, "prompt_name must be one of query, document, long, empty, got 5"),
        (
            {"prompt_name": "query", "prompt": "x"},
            "give a prompt or a prompt_name, not both, got 'x' and 'query'",
        ),
        ({"prompt": 5}, "prompt must be a str, got 5"),
    ],
)
def test_a_prompt_that_makes_no_sense_is_refused(tmp_path, call, words):
    model = npllm.load(write(tmp_path, CASES["prompts"]))
    with pytest.raises(NpllmError) as caught:
        model.embed(["cat"], **call)
    assert words in str(caught.value)


def test_without_prompts_any_name_is_refused(tmp_path):
    model = npllm.load(write(tmp_path, Case()))
    model.embed(["cat"], prompt_name="query")  # of every folder with settings: empty
    (tmp_path / "config_sentence_transformers.json").unlink()
    with pytest.raises(NpllmValueError, match="prompt_name must be one of none, got 'query'"):
        npllm.load(tmp_path).embed(["cat"], prompt_name="query")


# ------------------------------------------------------------------------------------------------------------------ refusals


def refused(folder, words):
    with pytest.raises(NpllmError) as caught:
        npllm.load(folder)
    assert words in str(caught.value)


def module(name, path="x", library=sentence.LIBRARY, **more):
    return {"idx": 0, "name": "0", "path": path, "type": library + name} | more


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (
            [],
            "modules.json: must list Transformer, Pooling, and then Dense and Normalize modules only, got none",
        ),
        ([module("Transformer", "")], "got Transformer"),
        ([module("Pooling", "1_Pooling"), module("Transformer", "")], "got Pooling, Transformer"),
        (
            [
                module("Transformer", ""),
                module("Pooling", "1_Pooling"),
                module("Pooling", "1_Pooling"),
            ],
            "got Transformer, Pooling, Pooling",
        ),
        (
            [module("Transformer", ""), module("Dense", "2_Dense"), module("Pooling", "1_Pooling")],
            "got Transformer, Dense, Pooling",
        ),
        (
            [module("Transformer", "0_Transformer"), module("Pooling", "1_Pooling")],
            "the Transformer must be in the folder itself",
        ),
        (
            [module("Transformer", ""), module("CNN", "1_CNN")],
            "got 'sentence_transformers.models.CNN', which is not implemented",
        ),
        (
            [module("Transformer", ""), module("Pooling", "1_Pooling", "elsewhere.")],
            "got 'elsewhere.Pooling', which is not implemented",
        ),
        (
            [module("Transformer", ""), module("Pooling", "../x")],
            "a module's path must be the name of a folder inside, got '../x'",
        ),
        ([module("Transformer", ""), module("Pooling", "..")], "got '..'"),
        ([module("Transformer", ""), module("Pooling", "/etc")], "got '/etc'"),
        ([module("Transformer", ""), module("Pooling", "a/../b")], "got 'a/../b'"),
        (
            [module("Transformer", ""), module("Pooling", "a\\b")],
            "must be the name of a folder inside",
        ),
        (
            [module("Transformer", ""), module("Pooling", "1_Pooling", kwargs=["task"])],
            "kwargs = ['task'] is not implemented",
        ),
        (
            [module("Transformer", ""), module("Pooling", "1_Pooling", novelty=1)],
            "novelty = 1 is not implemented",
        ),
        ([module("Transformer", ""), module("Pooling", 5)], "path must be a string, got 5"),
        ([5], "got '', which is not implemented"),
        ({"a": 1}, "must hold a JSON list [...], got dict"),
    ],
)
def test_modules_that_are_not_implemented_are_refused_by_name(tmp_path, modules, words):
    write(tmp_path, Case())
    tiny.write_json(tmp_path / "modules.json", modules)
    refused(tmp_path, words)


def test_the_new_names_of_modules_are_known(tmp_path):
    write(tmp_path, CASES["normalize"])
    library = "sentence_transformers.base.modules."
    tiny.write_json(
        tmp_path / "modules.json",
        [
            module("transformer.Transformer", "", library),
            module("pooling.Pooling", "1_Pooling", library),
            module("normalize.Normalize", "2_Normalize", library),
        ],
    )
    assert npllm.load(tmp_path).settings.head.modules == (Normalize(),)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"pooling_mode": "token"},
            "pooling_mode must be one or several of cls, max, mean, mean_sqrt_len_tokens, weightedmean, lasttoken, got ['token']",
        ),
        ({"pooling_mode": []}, "pooling_mode must be one or several of"),
        ({"pooling_mode": 5}, "pooling_mode must be one or several of"),
        (
            {"pooling_mode_mean_tokens": "yes"},
            "pooling_mode_mean_tokens must be true or false, got 'yes'",
        ),
        (
            {"pooling_mode_novel_tokens": True},
            "pooling_mode_novel_tokens = True is not implemented",
        ),
        (
            {"word_embedding_dimension": 13},
            "the pooling is for vectors of 13 entries, but the encoder gives 12",
        ),
        ({"include_prompt": 1}, "include_prompt must be true or false, got 1"),
    ],
)
def test_poolings_that_are_not_implemented_are_refused_by_name(tmp_path, content, words):
    write(tmp_path, Case())
    tiny.write_json(tmp_path / "1_Pooling" / "config.json", content)
    refused(tmp_path, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"activation_function": "torch.nn.modules.activation.Hardtanh"},
            "activation_function must be one of Identity, Tanh, ReLU, GELU, SiLU of torch.nn, got",
        ),
        ({"activation_function": "mine.Tanh"}, "got 'mine.Tanh', which is not implemented"),
        ({"use_residual": True}, "use_residual = True is not implemented"),
        (
            {"module_input_name": "token_embeddings"},
            "module_input_name = 'token_embeddings' is not implemented",
        ),
        ({"module_output_name": "other"}, "module_output_name = 'other' is not implemented"),
        ({"novelty": 1}, "novelty = 1 is not implemented"),
        ({"in_features": 13}, "in_features must be 12, the width of the module before, got 13"),
        ({"out_features": 9}, "linear.weight must be [9, 12], got [16, 12]"),
        ({"bias": False}, "unknown: linear.bias"),
        ({"bias": 1}, "bias must be true or false, got 1"),
        ({"in_features": None}, "in_features must be an integer"),
    ],
)
def test_dense_modules_that_are_not_implemented_are_refused_by_name(tmp_path, changes, words):
    write(tmp_path, CASES["dense"])
    file = tmp_path / "2_Dense" / "config.json"
    tiny.write_json(file, json.loads(file.read_text()) | changes)
    refused(tmp_path, words)


def test_a_dense_module_without_weights_is_refused(tmp_path):
    write(tmp_path, CASES["dense"])
    (tmp_path / "2_Dense" / "model.safetensors").rename(tmp_path / "2_Dense" / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin may hold Python pickles")


def test_a_normalize_module_of_tokens_is_refused(tmp_path):
    write(tmp_path, CASES["normalize"])
    tiny.write_json(
        tmp_path / "2_Normalize" / "config.json", {"module_input_name": "token_embeddings"}
    )
    refused(tmp_path, "module_input_name = 'token_embeddings' is not implemented")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (
            "config_sentence_transformers.json",
            {"model_type": "SparseEncoder"},
            "model_type = 'SparseEncoder' is not implemented",
        ),
        ("config_sentence_transformers.json", {"novelty": 1}, "novelty = 1 is not implemented"),
        (
            "config_sentence_transformers.json",
            {"prompts": ["a"]},
            "prompts must be {name: text}, got ['a']",
        ),
        (
            "config_sentence_transformers.json",
            {"prompts": {"a": 1}},
            "prompts must be {name: text}, got {'a': 1}",
        ),
        (
            "config_sentence_transformers.json",
            {"default_prompt_name": "x"},
            "default_prompt_name must be one of query, document, got 'x'",
        ),
        (
            "config_sentence_transformers.json",
            {"default_prompt_name": ["x"]},
            "default_prompt_name must be one of query, document, got ['x']",
        ),
        (
            "config_sentence_transformers.json",
            {"truncate_dim": 0},
            "truncate_dim must be an integer",
        ),
        ("sentence_bert_config.json", {"query_length": 5}, "query_length = 5 is not implemented"),
        (
            "sentence_bert_config.json",
            {"modality_config": {"image": {}}},
            "modality_config = {'image': {}} is not implemented",
        ),
        (
            "sentence_bert_config.json",
            {"tokenizer_args": {"a": 1}},
            "tokenizer_args = {'a': 1} is not implemented",
        ),
        ("sentence_bert_config.json", {"novelty": 1}, "novelty = 1 is not implemented"),
        (
            "sentence_bert_config.json",
            {"do_lower_case": 1},
            "do_lower_case must be true or false, got 1",
        ),
        (
            "sentence_bert_config.json",
            {"max_seq_length": 7.5},
            "max_seq_length must be an integer of at least 1, got 7.5",
        ),
        (
            "tokenizer_config.json",
            {"model_max_length": 0},
            "model_max_length must be an integer of at least 1, got 0",
        ),
        (
            "tokenizer_config.json",
            {"model_max_length": True},
            "model_max_length must be an integer of at least 1, got True",
        ),
    ],
)
def test_settings_that_are_not_implemented_are_refused_by_name(tmp_path, file, content, words):
    write(tmp_path, Case())
    tiny.write_json(tmp_path / file, content)
    refused(tmp_path, words)


def test_what_a_new_version_writes_by_itself_is_accepted(tmp_path):
    write(tmp_path, Case(tokenizer={"model_max_length": 9}))
    modality = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    tiny.write_json(
        tmp_path / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": modality,
            "module_output_name": "token_embeddings",
        },
    )
    versions = {"sentence_transformers": "6.2.0", "transformers": "5.23.0", "pytorch": "2.13.0"}
    tiny.write_json(
        tmp_path / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "__version__": versions,
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    tiny.write_json(
        tmp_path / "1_Pooling" / "config.json",
        {"embedding_dimension": 12, "pooling_mode": "mean", "include_prompt": True},
    )
    assert npllm.load(tmp_path).max_length == 9


def test_another_similarity_is_named(tmp_path):
    write(tmp_path, Case(settings={"similarity_fn_name": "dot"}))
    with pytest.warns(UserWarning, match="similarity_fn_name = 'dot' is not used"):
        npllm.load(tmp_path)


def test_a_language_model_takes_no_prompt():
    with pytest.raises(NpllmTypeError, match="is no encoder"):
        tiny.model().embed(["cat"], prompt="x")
