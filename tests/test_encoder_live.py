"""The published MiniLM and tiny random BERTs beside Transformers' BertModel, wherever torch is
installed.
"""

import os

import numpy as np
import pytest
from close import close
from hypothesis import given, settings
from hypothesis import strategies as st
from test_encoder import CONFIG, tensors

import npllm
from npllm import ops
from npllm.checkpoints import bert_layout
from npllm.config.bert_config import BertConfig
from npllm.encoder import Encoder, cosine_similarities

if os.environ.get("NPLLM_REQUIRE_LIVE") == "1":
    import torch
    import transformers
else:
    torch = pytest.importorskip(
        "torch", reason="compares with Transformers, and torch is not installed"
    )
    transformers = pytest.importorskip(
        "transformers", reason="compares with Transformers, which is not installed"
    )

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)

SENTENCES = [
    "",
    " ",
    "a",
    "The cat sits outside.",
    "A man is playing guitar.",
    "The new movie is awesome!",
    "El gato está sentado en la alfombra.",
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "Съешь же ещё этих мягких французских булок.",
    "猫はマットの上に座っています。",
    "今天天气很好，我们去公园吧。",
    "القطة تجلس على السجادة",
    "बिल्ली चटाई पर बैठी है",
    "고양이가 매트 위에 앉아 있다",
    "🙂",
    "I 💜 pizza 🍕🍕 👩‍👩‍👧‍👦 🇫🇷",
    "[CLS] a [SEP] b [PAD] [MASK] naïve café e\u0301 \u200b\ufffd",
    "def f(x):\n    return x ** 2  # 3.14159, https://example.org/?q=1&r=2",
    "The history of clocks is long. " * 300,
    "supercalifragilistic" * 40,
]


@pytest.fixture(scope="session")
def folder():
    from npllm.checkpoints.fetch import EMBEDDING_MODEL, fetch

    return fetch(EMBEDDING_MODEL, progress=False)


def hf_embed(folder, texts, normalize=True, dtype=torch.float32, max_length=256):
    """One text at a time, without padding; its own tokenizer, from the same file."""
    model = transformers.BertModel.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    rows = []
    for text in texts:
        tokens = tokenizer(
            text, truncation=True, max_length=max_length, padding=False, return_tensors="pt"
        )
        with torch.no_grad():
            e = model(input_ids=tokens["input_ids"]).last_hidden_state[0].mean(dim=0)
        rows.append(torch.nn.functional.normalize(e, dim=0) if normalize else e)
    return torch.stack(rows).numpy()


@pytest.mark.weights
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("set_of_ops", [None, ops.reference], ids=["fast", "reference"])
def test_minilm_embeds_twenty_sentences_as_transformers_does(folder, normalize, set_of_ops):
    assert len(SENTENCES) == 20
    model = npllm.load(folder, ops=set_of_ops)
    assert len(model.tokenizer.encode(SENTENCES[-2])) == model.max_length == 256
    got, want = model.embed(SENTENCES, normalize=normalize), hf_embed(folder, SENTENCES, normalize)
    assert (got.dtype, got.shape) == (np.float32, (20, 384))
    worst = np.abs(got - want).max()
    print(
        f"\nlargest difference of {model.ops.name} ops from Transformers, normalize={normalize}: {worst:.2g}"
    )
    assert worst < 1e-5


@pytest.mark.weights
def test_minilm_in_float64_is_that_of_transformers_in_float64(folder):
    some = [text for text in SENTENCES if len(text) < 500]
    close(
        npllm.load(folder, dtype="float64").embed(some),
        hf_embed(folder, some, dtype=torch.float64),
        times=16,
    )


@pytest.mark.weights
def test_minilm_finds_what_is_alike(folder):
    s = cosine_similarities(
        npllm.load(folder).embed(
            ["A cat sits on the mat.", "A kitten is on the rug.", "Stocks fell on Monday."]
        )
    )
    assert s[0, 1] > 0.5 > 0.2 > max(s[0, 2], s[1, 2])


@settings(max_examples=20)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["gelu", "relu", "silu"]),
    st.lists(st.integers(1, 10), min_size=1, max_size=4),
)
def test_tiny_berts_are_those_of_transformers(seed, act, lengths):
    content = CONFIG | {"hidden_act": act}
    config = BertConfig.from_json(content)
    w = tensors(config, seed)
    other = (
        transformers.BertModel(
            transformers.BertConfig(**content, attn_implementation="eager"), add_pooling_layer=False
        )
        .double()
        .eval()
    )
    missing, unknown = other.load_state_dict(
        {name: torch.as_tensor(x) for name, x in w.items()}, strict=False
    )
    assert not unknown
    assert set(missing) <= {"embeddings.position_ids", "embeddings.token_type_ids"}
    rng, n = np.random.default_rng(seed), max(lengths)
    ids, types = rng.integers(0, 16, (len(lengths), n)), rng.integers(0, 2, (len(lengths), n))
    valid = np.arange(n) < np.array(lengths)[:, None]
    with torch.no_grad():
        want = other(
            input_ids=torch.as_tensor(ids),
            attention_mask=torch.as_tensor(valid.astype(int)),
            token_type_ids=torch.as_tensor(types),
        ).last_hidden_state.numpy()
    got = Encoder(config, bert_layout.assemble(w.get, config))(
        ids, attention_mask=valid, token_type_ids=types
    )
    close(got[valid], want[valid], times=64)
