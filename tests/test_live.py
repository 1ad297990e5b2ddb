"""The same model live in Hugging Face Transformers, wherever torch is installed;
NPLLM_REQUIRE_LIVE=1 makes its absence a failure.
"""

import os

import numpy as np
import pytest
from close import close
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SETTINGS, byte_level, random_ids, sentencepiece, write_folder

import npllm
from npllm import ops
from npllm.decoding import Sampling, choose

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
torch.set_num_threads(1)  # tiny matrices, and cores that others may use

PROMPT = [504, 3575, 282, 4649, 314]  # "The capital of France is"
TEXT = """A transformer is a neural network that reads a sequence of tokens and predicts the next one. Each token is first looked up in
a table, which gives a vector. Then come many layers, one after another, and every layer does two things: it lets each position gather
information from the positions before it, and it changes each position by itself. The gathering is called attention. A position asks a
question, the query; every earlier position offers a key, and the better the key fits the query, the more of that position's value is
taken over. The queries and keys are turned by an angle that grows with their place, so that only the distance between two of them
matters. After the last layer the vector is compared with every entry of the table, and the best one is the most likely next token.
To write a text, one token is chosen, put at the end, and everything begins anew. Since earlier keys and values do not change, they are
kept: this is the cache. Without it, writing a thousand tokens would mean reading half a million. The weights of such a network are found by
showing it a great deal of text, and by changing them, little by little, so that the true next token becomes more likely. Nobody tells it
what a noun is, or that Paris is a city in France. It learns these things because they help to predict. In 1770, Euler wrote: 2 + 2 = 4!
The oldest clocks were shadows. A stick in the ground shows noon when its shadow is shortest, and people who lived by the river Nile divided
the day into twelve parts long before anyone could say how long a part was. In winter the parts were short, in summer they were long, and
nobody minded. Water clocks came next: a bowl with a small hole empties at a steady pace, more or less, and it does so at night as well.
Then, around 1300, somebody hung a weight on a rope, wound the rope around an axle, and found a way to let it fall one tooth at a time.
"Tick," said the machine, "tock," and the hour became the same length for everybody, in June and in December, for the monk and for the
merchant (who was the first to see that time is money). Galileo watched a lamp swing; Huygens built the pendulum into a clock in 1656, and
the error fell from 15 minutes a day to 15 seconds. Today a second is 9,192,631,770 periods of the light of a caesium atom: exactly."""
NASTY = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\t",
    " \n ",
    "\r\n",
    "a",
    " a",
    "a ",
    "  a  b  ",
    "hello world",
    "Hello, world!",
    "don't we'll I'M",
    "1234567890",
    "3.14159",
    "1,000,000",
    "a1b2",
    "x²",
    "½",
    "٣",
    "é",
    "e\u0301",
    "naïve café",
    "ÅÄÖ",
    "ß",
    "日本語のテキスト",
    "한국어",
    "ไทย",
    "हिन्दी",
    "עברית",
    "العربية",
    "🙂",
    "👩‍👩‍👧‍👦",
    "🇫🇷",
    "\u200b",
    "\u200d",
    "\ufeff",
    "\ufffd",
    "\u0000",
    "\x7f",
    "\u00a0",
    "\u2028",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<|im_end|>b",
    "a<|end|>b",
    "<s>a</s>",
    "<|im_end",
    "<|endoftext|>",
    " <|im_end|> ",
    "def f(x):\n    return x**2\n",
    "{'a': [1, 2]}",
    "https://example.org/?q=1&r=2",
    "__init__",
    "CamelCase",
    "!!!???",
    "----",
    "####",
    "Ġ",
    "Ċ",
    "▁",
    "<0x0A>",
    "\\n",
    "a" * 200,
    " " * 50,
    "ab " * 40,
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "ﷺ",
    "ⅷ",
    "①",
    TEXT[:300],
]


def hf_model(folder, dtype="float32"):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()


def hf_logits(model, ids, **options):
    with torch.no_grad():
        options = {name: torch.as_tensor(np.asarray(x)) for name, x in options.items()}
        return model(torch.as_tensor(np.asarray(ids)), use_cache=False, **options).logits.numpy()


@pytest.fixture(scope="module")
def hf_default(default_folder):
    return hf_model(default_folder)


@pytest.fixture(scope="module")
def hf_tokenizer(default_folder):
    return transformers.AutoTokenizer.from_pretrained(default_folder)


# ------------------------------------------------------------------------------------------------------------- tiny random models


@st.composite
def configs(draw):
    """Sizes of a Phi-3, with everything that may vary."""
    n_kv_head, group, d_head = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        2 * draw(st.integers(1, 6)),
    )
    n_head = n_kv_head * group
    return {
        "vocab_size": draw(st.integers(20, 80)),
        "hidden_size": n_head * d_head,
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": n_head,
        "num_key_value_heads": n_kv_head,
        "sliding_window": draw(st.none() | st.integers(1, 9)),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_theta": draw(st.sampled_from([100.0, 10000.0, 1e6])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "pad_token_id": draw(st.none() | st.just(0)),
    }


@given(configs(), st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 14))
@settings(max_examples=25)
def test_any_config_gives_the_logits_of_transformers(
    tmp_path_factory, config, seed, n_batch, n_seq
):
    folder = write_folder(tmp_path_factory.mktemp("tiny"), seed=seed, **config)
    ids = random_ids(n_batch, n_seq, seed, config["vocab_size"])
    want = hf_logits(hf_model(folder), ids)
    for ops_set in (ops.reference, ops.blockwise):
        close(npllm.load(folder, ops=ops_set)(ids), want, times=2)


@given(configs(), st.integers(0, 10**6), st.integers(2, 12), st.data())
@settings(max_examples=15)
def test_any_left_padded_batch_gives_the_logits_of_transformers(
    tmp_path_factory, config, seed, n_seq, data
):
    folder = write_folder(tmp_path_factory.mktemp("tiny"), seed=seed, **config)
    ids, mask = random_ids(3, n_seq, seed, config["vocab_size"]), np.ones((3, n_seq), np.int64)
    for row in mask:
        row[: data.draw(st.integers(0, n_seq - 1))] = 0
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    got, want = (
        npllm.load(folder)(ids, attention_mask=mask),
        hf_logits(hf_model(folder), ids, attention_mask=mask, position_ids=positions),
    )
    for row in range(3):
        close(got[row, mask[row] == 1], want[row, mask[row] == 1], times=2)


@pytest.mark.parametrize(
    "changes", [{}, {"sliding_window": 5}, {"tie_word_embeddings": True}], ids=str
)
def test_greedy_generation_of_a_padded_batch_is_that_of_transformers(tmp_path, changes):
    folder = write_folder(tmp_path, seed=1, pad_token_id=0, **changes)
    ids, mask = random_ids(3, 9, 2), np.ones((3, 9), np.int64)
    mask[1, :4] = mask[2, :8] = 0
    with torch.no_grad():
        want = hf_model(folder).generate(
            torch.tensor(ids * mask),
            attention_mask=torch.tensor(mask),
            max_new_tokens=16,
            do_sample=False,
        )
    close(
        npllm.load(folder).generate(ids * mask, attention_mask=mask, max_new_tokens=16),
        want.numpy(),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_hidden_layers": 1},
        {"pad_token_id": 0},
        {"tie_word_embeddings": True, "vocab_size": 77},
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-6},
        {"resid_pdrop": 0.1, "intermediate_size": 7},
    ],
    ids=str,
)
def test_the_tree_is_the_one_transformers_prints(tmp_path, changes):
    folder = write_folder(tmp_path, **changes)
    assert str(npllm.load(folder)) == str(hf_model(folder))


def test_storage_in_bfloat16_is_the_same_model(tmp_path):
    import ml_dtypes

    folder, ids = (
        write_folder(tmp_path, dtype=ml_dtypes.bfloat16, torch_dtype="bfloat16"),
        random_ids(2, 9),
    )
    close(npllm.load(folder)(ids), hf_logits(hf_model(folder), ids), times=2)


@pytest.mark.parametrize("tokenizer", [byte_level, sentencepiece])
def test_tiny_tokenizers_agree(tmp_path, tokenizer):
    folder = write_folder(
        tmp_path,
        tokenizer=tokenizer(),
        settings=SETTINGS | {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"},
    )
    ours, theirs = (
        npllm.Tokenizer.from_folder(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    for text in NASTY:
        assert ours.encode(text) == theirs(text)["input_ids"], repr(text)
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    chat = [{"role": "user", "content": " Hi\n"}, {"role": "assistant", "content": "Ho"}]
    for prompted in (True, False):
        want = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompted)
        assert ours.apply_chat_template(chat, add_generation_prompt=prompted) == want


# ------------------------------------------------------------------------------------------------------------------------ sampling


def processors(**options):
    """Transformers' own list of logits processors, in its own order."""
    config = transformers.GenerationConfig(do_sample=True, **options)
    model = transformers.Phi3ForCausalLM(
        transformers.Phi3Config(
            vocab_size=32,
            hidden_size=4,
            intermediate_size=4,
            num_hidden_layers=1,
            num_attention_heads=1,
            pad_token_id=0,
        )
    )
    config._eos_token_tensor = None
    return model._get_logits_processor(generation_config=config)


def tied_logits(seed, shape):
    """Random logits, some of them equal."""
    rng = np.random.default_rng(seed)
    return np.round(3 * rng.standard_normal(shape), rng.integers(0, 3)).astype(np.float32)


def hf_filter(processor, logits, ids=None):
    ids = torch.zeros((len(logits), 0), dtype=torch.long) if ids is None else torch.as_tensor(ids)
    return processor(ids, torch.as_tensor(logits.copy())).numpy()


@given(st.integers(0, 10**6), st.integers(2, 40))
def test_each_filter_is_that_of_transformers(seed, n_vocab):
    logits, rng = tied_logits(seed, (4, n_vocab)), np.random.default_rng(seed)
    t, k, p, penalty = (
        rng.uniform(0.2, 3),
        int(rng.integers(1, n_vocab + 3)),
        float(rng.uniform(0.05, 0.99)),
        rng.uniform(0.5, 2),
    )
    ids = rng.integers(0, n_vocab, (4, 5))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=-1)
    close(
        ops.repetition_penalty(logits, seen, penalty),
        hf_filter(transformers.RepetitionPenaltyLogitsProcessor(penalty), logits, ids),
    )
    close(ops.temperature(logits, t), hf_filter(transformers.TemperatureLogitsWarper(t), logits))
    close(ops.top_k(logits, k), hf_filter(transformers.TopKLogitsWarper(k), logits), times=0)
    close(ops.min_p(logits, p), hf_filter(transformers.MinPLogitsWarper(p), logits), times=0)
    # of equal logits at the edge of top_p, Transformers keeps whichever its sort put last: as many,
    # and of the same value
    close(
        np.sort(ops.top_p(logits, p)),
        np.sort(hf_filter(transformers.TopPLogitsWarper(p), logits)),
        times=0,
    )


@pytest.mark.parametrize("p", [0.25, 0.5, 0.75])
def test_at_the_very_edge_of_top_p_as_many_are_kept_as_in_transformers(p):
    equal = np.zeros((1, 4), np.float32)  # probabilities of exactly 1/4
    kept = np.isfinite(hf_filter(transformers.TopPLogitsWarper(p), equal)).sum()
    assert np.isfinite(ops.top_p(equal, p)).sum() == kept == 4 * p


@given(
    st.integers(0, 10**6),
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.sampled_from([0.5, 2.0, 4.0]),
            "top_k": st.sampled_from([2, 5, 20]),
            "top_p": st.sampled_from([0.3, 0.7, 0.9]),
            "min_p": st.sampled_from([0.05, 0.2]),
            "repetition_penalty": st.sampled_from([0.7, 1.5]),
        },
    ),
)
def test_filters_together_act_in_the_order_of_transformers(seed, options):
    rng = np.random.default_rng(seed)
    logits, ids, u = (
        3 * rng.standard_normal((20, 32)).astype(np.float32),
        rng.integers(0, 32, (20, 5)),
        rng.random(20),
    )
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=-1)
    want = hf_filter(processors(**{"top_k": 0, **options}), logits, ids)
    close(choose(logits, Sampling(do_sample=True, **options), seen, u), ops.sample(want, u))


def test_the_order_matters_where_it_is_tested():
    names = [
        type(p).__name__
        for p in processors(temperature=0.5, top_k=5, top_p=0.5, min_p=0.1, repetition_penalty=1.5)
    ]
    assert names == [
        "RepetitionPenaltyLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
    ]


# ----------------------------------------------------------------------------------------------------------- the default checkpoint


def test_the_default_tree_is_the_one_transformers_prints(default_model, hf_default):
    assert str(default_model) == str(hf_default)


def test_the_five_best_next_tokens_have_the_probabilities_of_transformers(
    default_model, hf_default
):
    ours = ops.softmax(default_model(np.array([PROMPT]))[0, -1])
    theirs = torch.softmax(torch.tensor(hf_logits(hf_default, [PROMPT])[0, -1]), dim=-1).numpy()
    best = np.argsort(-theirs)[:5]
    assert np.argsort(-ours)[:5].tolist() == best.tolist()
    assert [default_model.tokenizer.decode([i]) for i in best] == [
        " Paris",
        " the",
        " London",
        " Le",
        " New",
    ]
    print(
        f"\ntop 5: ours {ours[best]}, Transformers {theirs[best]}, largest difference {np.abs(ours[best] - theirs[best]).max():.2g}"
    )
    assert np.abs(ours[best] - theirs[best]).max() < 1e-4
    assert np.abs(ours[best] - [0.7706, 0.0642, 0.0122, 0.0100, 0.0093]).max() < 1e-4


def test_over_512_tokens_float32_is_as_exact_as_transformers(
    default_model, default_folder, hf_default
):
    ids = np.array([default_model.tokenizer.encode(TEXT)])[:, :512]
    assert ids.shape == (1, 512)
    fast = default_model(ids)[0]
    ours, theirs = (
        npllm.load(default_folder, ops=npllm.ops.blockwise)(ids)[0],
        hf_logits(hf_default, ids)[0],
    )
    wide = npllm.load(default_folder, dtype="float64")
    exact = wide(ids)[0]
    largest = np.abs(exact).max()
    apart, our_error, their_error = (
        np.abs(a - b).max() / largest for a, b in ((ours, theirs), (ours, exact), (theirs, exact))
    )
    our_rms, their_rms = (np.sqrt(np.mean((x - exact) ** 2)) / largest for x in (ours, theirs))
    print(
        f"\n512 tokens, as a fraction of the largest |logit| {largest:.4g}: ours - Transformers {apart:.3g}; "
        f"from float64: ours {our_error:.3g} (rms {our_rms:.3g}), Transformers {their_error:.3g} (rms {their_rms:.3g})"
    )
    assert apart <= 1e-5
    # whose largest error is smaller depends on the order in which the BLAS of the day adds up: 0.8
    # to 1.15 times theirs was seen
    assert our_error <= 1.5 * their_error and our_rms <= 1.1 * their_rms
    fast_error, fast_rms = (
        np.abs(fast - exact).max() / largest,
        np.sqrt(np.mean((fast - exact) ** 2)) / largest,
    )
    print(f"the fast set: from float64 {fast_error:.3g} (rms {fast_rms:.3g})")
    assert (
        fast_error <= 1.5 * their_error and fast_rms <= 1.5 * their_rms
    )  # its sums have fewer parts to begin with


def test_greedy_text_is_that_of_transformers(default_model, hf_default):
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        out = hf_default.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = torch.stack(out.logits).topk(2, dim=-1).values
    print(
        f"\nsmallest margin between the two best logits: {float((best[..., 0] - best[..., 1]).min()):.3g}"
    )
    text = default_model.generate("The capital of France is", max_new_tokens=16)
    assert text == default_model.tokenizer.decode(
        out.sequences[0, 5:].tolist()
    ) and text.startswith(" Paris.\n\nThe answer is:")


def test_default_ids_are_those_of_transformers(default_model, hf_tokenizer):
    different = [
        text
        for text in NASTY
        if default_model.tokenizer.encode(text) != hf_tokenizer(text)["input_ids"]
    ]
    assert not different
    for text in NASTY:
        ids = default_model.tokenizer.encode(text)
        for skip in (True, False):
            assert default_model.tokenizer.decode(
                ids, skip_special_tokens=skip
            ) == hf_tokenizer.decode(ids, skip_special_tokens=skip)


@given(st.text(max_size=30))
def test_any_text_has_the_ids_of_transformers(default_model, hf_tokenizer, text):
    assert default_model.tokenizer.encode(text) == hf_tokenizer(text)["input_ids"]


def test_default_chats_are_those_of_transformers(default_model, hf_tokenizer):
    user, system = (
        {"role": "user", "content": " Hi \n{{ x }}"},
        {"role": "system", "content": "Be brief."},
    )
    for chat in (
        [user],
        [system, user],
        [user, {"role": "assistant", "content": "Ho"}, user],
        [user, user],
    ):
        for prompted in (True, False):
            want = hf_tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=prompted
            )
            assert (
                default_model.tokenizer.apply_chat_template(chat, add_generation_prompt=prompted)
                == want
            )
        want = hf_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert default_model.tokenizer.encode_chat(chat) == want


def test_a_left_padded_batch_of_texts_is_that_of_transformers(
    default_model, hf_default, hf_tokenizer
):
    hf_tokenizer.padding_side = "left"
    texts = [
        "The capital of France is",
        "Water boils at",
        "Once upon a time there was a little girl who",
    ]
    batch = hf_tokenizer(texts, return_tensors="pt", padding=True)
    mask = batch["attention_mask"].numpy()
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    want = hf_logits(hf_default, batch["input_ids"], attention_mask=mask, position_ids=positions)
    got = default_model(batch["input_ids"].numpy(), attention_mask=mask)
    for row in range(3):
        close(got[row, mask[row] == 1], want[row, mask[row] == 1], times=2)
