"""The real tokenizers of the family give Transformers' ids, texts and chats: by golden file, and
live where it is installed.

The cut-down tokenizers in golden/tokenizers always run; the whole ones where NPLLM_TOKENIZERS, or
../shared/tokenizers beside the checkout, holds them.
"""

import json
import os
import warnings
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nasty import FAMILY, MESSAGES, make_folder, strings
from seeds import draws

from npllm.errors import NpllmValueError
from npllm.text.stream import Detokenizer
from npllm.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
WHOLE = Path(os.environ.get("NPLLM_TOKENIZERS", ROOT.parent / "shared" / "tokenizers"))
CUT_DOWN = ROOT / "tests" / "golden" / "tokenizers"
GOLDEN = json.loads(
    (ROOT / "tests" / "golden" / "tokenizer_family.json").read_text(encoding="utf-8")
)
NAMES = list(GOLDEN["tokenizer"])
PHI3 = ["phi-3", "phi-3-mini", "phi-3-medium"]


@cache
def cut_down(name):
    return Tokenizer.from_folder(CUT_DOWN / name)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Function name -> folder of the whole tokenizer, as a checkpoint has it; of the cut-down one
    where the whole is not here.
    """
    if not WHOLE.is_dir():
        return CUT_DOWN.joinpath
    return cache(lambda name: make_folder(tmp_path_factory.mktemp("family") / name, WHOLE, name))


@pytest.fixture(scope="session")
def ours(folder):
    """Function name -> Tokenizer of that folder."""
    return cache(lambda name: Tokenizer.from_folder(folder(name)))


@pytest.fixture(scope="session")
def theirs(folder):
    """Function name -> Transformers' tokenizer of the same folder."""
    if os.environ.get("NPLLM_REQUIRE_LIVE") != "1":
        pytest.importorskip(
            "transformers", reason="compares with Transformers, which is not installed"
        )
    from transformers import AutoTokenizer

    return cache(lambda name: AutoTokenizer.from_pretrained(folder(name)))


@pytest.fixture(params=["cut down", pytest.param("whole", marks=pytest.mark.slow)])
def tokenizer(request):
    """Function name -> Tokenizer: the cut-down one, then the whole one."""
    if request.param == "cut down":
        return cut_down
    if not WHOLE.is_dir():
        pytest.skip("the whole tokenizers are not here; NPLLM_TOKENIZERS names their folder")
    return request.getfixturevalue("ours")


def differing(name, ours):
    """Strings whose ids differ from Transformers'."""
    rows = zip(GOLDEN["strings"], GOLDEN["tokenizer"][name]["ids"], strict=True)
    return [(text, got, want) for text, want in rows if (got := ours.encode(text)) != want]


def rendered(tokenizer, messages, end=True):
    with warnings.catch_warnings():  # what templates leave out has its own test
        warnings.simplefilter("ignore")
        return tokenizer.apply_chat_template(messages, add_generation_prompt=end)


# ------------------------------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_transformers_ids(name, tokenizer):
    """Spaces, newlines, emoji, scripts, bytes, specials inside text (spec 8.39)."""
    assert differing(name, tokenizer(name)) == []


@pytest.mark.parametrize("name", NAMES)
def test_decoded_text_is_transformers_text(name, tokenizer):
    golden, ours = GOLDEN["tokenizer"][name], tokenizer(name)
    wanted = [golden["decoded"].get(str(n), text) for n, text in enumerate(GOLDEN["strings"])]
    assert [ours.decode(ids, skip_special_tokens=False) for ids in golden["ids"]] == wanted


@pytest.mark.live
@pytest.mark.parametrize("name", NAMES)
def test_live_ids_and_texts_of_the_whole_list(name, ours, theirs):
    """Every string of the golden file, in Transformers now (spec 8.39)."""
    ours, hf = ours(name), theirs(name)
    for text in GOLDEN["strings"]:
        ids = hf(text).input_ids
        assert (ours.encode(text), ours.encode(text, add_special_tokens=False)) == (
            ids,
            hf(text, add_special_tokens=False).input_ids,
        )
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == hf.decode(
                ids, skip_special_tokens=skip
            )


SPECIALS = [
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "</s>",
    "<s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|tool|>",
    "<|endoftext|>",
]
PIECES = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [*SPECIALS, " ", "  ", "\n", "▁", "<0x0A>", "🙂", "\u200d", "\x00", "'s", "123"]
    ),
)
TEXTS = st.lists(PIECES, max_size=8).map("".join)


@pytest.mark.live
@pytest.mark.parametrize("name", NAMES)
def test_live_ids_and_texts_of_any_text(name, ours, theirs):
    """Law: whatever the text, the ids are Transformers' (spec 8.39)."""
    ours, hf = ours(name), theirs(name)

    @settings(max_examples=300)
    @given(TEXTS)
    def law(text):
        ids = hf(text).input_ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == hf.decode(ids, skip_special_tokens=True)

    law()


@pytest.mark.live
@pytest.mark.parametrize(
    "change",
    [
        {
            "added_tokens_decoder": {
                "32007": {
                    "content": "<|end|>",
                    "lstrip": True,
                    "rstrip": True,
                    "normalized": False,
                    "special": True,
                }
            }
        },
        {
            "added_tokens_decoder": {
                "32011": {"content": "<|extra|>", "special": False},
                "32012": {"content": "<|two|>", "special": True},
            }
        },
        {"pad_token": "<pad>", "unk_token": "<none>"},
        {"eos_token": "the"},
        {"bos_token": None},
        {
            "eos_token": {
                "__type": "AddedToken",
                "content": "<|end|>",
                "lstrip": False,
                "rstrip": True,
                "normalized": False,
                "single_word": False,
            }
        },
    ],
    ids=["flags", "new tokens", "new pad and unk", "eos is a word", "no bos", "eos with flags"],
)
def test_live_added_tokens_of_tokenizer_config_count(change, theirs, folder, tmp_path):
    """tokenizer_config.json has the last word on added tokens; fine-tunes add their own there."""
    from transformers import AutoTokenizer

    assert theirs
    for file in folder("phi-3").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | change), encoding="utf-8")
    ours, hf = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in (
        "a<|end|> b",
        "a <|end|>",
        "<|extra|>x<|two|>",
        "<pad> x<pad>",
        "in the end",
        "<none>",
        "<s> a",
    ):
        ids = hf(text).input_ids
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == hf.decode(
                ids, skip_special_tokens=skip
            )


@pytest.mark.parametrize("name", PHI3)
def test_text_starts_with_its_own_space(name, tokenizer):
    """The first word carries a ▁, a leading space adds a second, and the empty text is empty (spec
    8.43).
    """
    encode = tokenizer(name).encode
    assert encode("The capital of France is") == [450, 7483, 310, 3444, 338]
    assert encode(" The capital of France is") == [29871, 450, 7483, 310, 3444, 338]
    assert (encode(""), encode("\n"), encode("▁"), encode("🙂")[-4:]) == (
        [],
        [29871, 13],
        [259],
        [243, 162, 156, 133],
    )
    assert 13 not in encode("<0x0A>"), "the name of a byte is no byte"


def test_space_after_a_special_token(tokenizer):
    """Text after a special token gets a ▁ of its own; a space in between is swallowed where the
    token strips (spec 8.43).
    """
    for name in ("phi-3-mini", "phi-3-medium"):
        mini = tokenizer(name)
        assert mini.encode("a<|end|>b") == mini.encode("a<|end|> b") == [263, 32007, 289]
        assert mini.decode([263, 32007, 289], skip_special_tokens=False) == "a<|end|> b"
    assert tokenizer("phi-3").encode("a<|end|> b") == [263, 32007, 29871, 289]


def test_newline_after_a_special_token(tokenizer):
    """Today's files swallow it, those of April 2024 do not (spec 8.42)."""
    text = "<|user|>\nHello<|end|>\n<|assistant|>"
    assert (
        tokenizer("phi-3-mini").encode(text)
        == tokenizer("phi-3-medium").encode(text)
        == [32010, 15043, 32007, 32001]
    )
    assert tokenizer("phi-3").encode(text) == [32010, 29871, 13, 10994, 32007, 29871, 13, 32001]
    assert (
        tokenizer("phi-3-mini").decode([32010, 15043, 32007, 32001], skip_special_tokens=False)
        == "<|user|> Hello<|end|><|assistant|>"
    )


def test_end_of_text_that_is_no_special_token(tokenizer):
    """`</s>` survives skip_special_tokens where the file says special=false (spec 8.45)."""
    for name, wanted in (("phi-3", "a b"), ("phi-3-mini", "a</s> b"), ("phi-3-medium", "a</s> b")):
        assert tokenizer(name).decode([263, 2, 289]) == wanted
    assert tokenizer("phi-4-mini").decode([200023, 200020]) == "<|tool|>"


@pytest.mark.parametrize(
    ("name", "ids"),
    [*((name, range(32011, 32064)) for name in PHI3), ("phi-4-mini", range(200029, 200064))],
)
def test_ids_without_a_token_decode_to_nothing(name, ids, tokenizer):
    """The embedding has more rows than there are tokens (spec 8.46)."""
    ours = tokenizer(name)
    assert [ours.decode([i], skip_special_tokens=skip) for i in ids for skip in (True, False)] == [
        ""
    ] * 2 * len(ids)
    around = ours.encode("The capital of France is")
    assert ours.decode([*around[:2], *ids, *around[2:]]) == "The capital of France is"


# ----------------------------------------------------------------------------------------------- beginning of sequence


@pytest.mark.parametrize("name", NAMES)
def test_no_beginning_token_by_default(name, tokenizer):
    """The post-processor decides, and none of the family adds one, whatever tokenizer_config.json
    says (spec 8.47).
    """
    ours = tokenizer(name)
    assert ours.encode("The capital") == ours.encode("The capital", add_special_tokens=False)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("分析", [1, 29871, 30748, 233, 161, 147]),
        (" こんにちは", [1, 259, 30589, 30389, 30353, 30644, 30449]),
        ("The capital of France is", [1, 450, 7483, 310, 3444, 338]),
    ],
)
def test_beginning_token_on_request(text, ids):
    """As the published ids of April's Phi-3 have it (spec 8.47)."""
    ours = Tokenizer.from_folder(CUT_DOWN / "phi-3", add_bos_token=True)
    assert ours.encode(text) == ids
    assert ours.encode(text, add_special_tokens=False) == ids[1:]


@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_never_two_beginning_tokens(add_bos_token):
    """A text that begins with one, as a chat template writes it, gets no other; one typed by hand
    stays (spec 8.47).
    """
    ours = Tokenizer.from_folder(CUT_DOWN / "phi-3", add_bos_token=add_bos_token)
    chat = ours.apply_chat_template(GOLDEN["messages"]["one"])
    assert chat.startswith("<s>")
    assert ours.encode(chat) == ours.encode_chat(GOLDEN["messages"]["one"])
    assert ours.encode(chat).count(1) == 1
    assert ours.encode("<s><s>a", add_special_tokens=False) == [1, 1, 263]


@pytest.mark.parametrize(
    ("add_bos_token", "wanted"), [(None, [1, 263]), (True, [1, 263]), (False, [263])]
)
def test_beginning_token_of_a_post_processor(add_bos_token, wanted, tmp_path):
    """The option overrules a post-processor that adds one; without it, the post-processor is heeded
    (spec 8.47).
    """
    folder = CUT_DOWN / "phi-3"
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<s>", "type_id": 0}})
    content["post_processor"]["special_tokens"] = {
        "<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_bytes(
        (folder / "tokenizer_config.json").read_bytes()
    )
    ours = Tokenizer.from_folder(tmp_path, add_bos_token=add_bos_token)
    assert ours.encode("a") == wanted
    assert ours.encode("<s>a") == [1, 263]
    assert ours.encode("a", add_special_tokens=False) == [263]


@pytest.mark.live
@pytest.mark.parametrize("name", NAMES)
def test_live_beginning_token_on_request(name, folder, theirs):
    """add_bos_token=True means what it means in Transformers, except that it never gives two (spec
    8.47).
    """
    from transformers import AutoTokenizer

    assert theirs
    for add_bos_token in (True, False):
        hf = AutoTokenizer.from_pretrained(folder(name), add_bos_token=add_bos_token)
        ours = Tokenizer.from_folder(folder(name), add_bos_token=add_bos_token)
        for text in GOLDEN["strings"]:
            if not text.lstrip().startswith(ours.special_tokens["bos_token"]):
                assert ours.encode(text) == hf(text).input_ids


def test_beginning_token_must_be_known(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((CUT_DOWN / "phi-3" / "tokenizer.json").read_bytes())
    with pytest.raises(NpllmValueError, match="add_bos_token=True needs a bos_token"):
        Tokenizer.from_folder(tmp_path, add_bos_token=True)


# ------------------------------------------------------------------------------------------------------------------ chats


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("conversation", GOLDEN["messages"])
def test_chat_is_transformers_chat(name, conversation, tokenizer):
    """Text and ids, with the generation prompt and without (spec 8.41)."""
    ours, golden = tokenizer(name), GOLDEN["tokenizer"][name]
    texts = [rendered(ours, GOLDEN["messages"][conversation], end) for end in (True, False)]
    assert texts == golden["chat"][conversation]
    assert [ours.encode(text, add_special_tokens=False) for text in texts] == golden["chat ids"][
        conversation
    ]


@pytest.mark.live
@pytest.mark.parametrize("name", NAMES)
def test_live_chat_of_any_conversation(name, ours, theirs):
    """Law: whatever is said, the text is Transformers', tools in the system message included (spec
    8.41).
    """
    ours, hf = ours(name), theirs(name)
    message = st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXTS},
        optional={"tools": st.none() | TEXTS},
    )

    @settings(max_examples=100)
    @given(st.lists(message, min_size=1, max_size=5), st.booleans())
    def law(messages, end):
        assert rendered(ours, messages, end) == hf.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=end
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert (
                ours.encode_chat(messages)
                == hf.apply_chat_template(messages, add_generation_prompt=True).input_ids
            )

    law()


HELLO = [
    {"role": "system", "content": "System message"},
    {"role": "user", "content": "Hello, can you call some tools for me?"},
    {"role": "assistant", "content": "Sure, I can calculate the sum for you!"},
]
KNIGHT = [
    {
        "role": "system",
        "content": "You are a medieval knight and must provide explanations to modern people.",
    },
    {"role": "user", "content": "How should I explain the Internet?"},
]
HELPFUL = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "How should I explain the Internet?"},
]
TURNS = [
    32010,
    15043,
    29892,
    508,
    366,
    1246,
    777,
    8492,
    363,
    592,
    29973,
    32007,
    32001,
    18585,
    29892,
    306,
    508,
    8147,
    278,
    2533,
    363,
    366,
    29991,
    32007,
]
PUBLISHED = {  # by ONNX Runtime Extensions' tests, there marked "From HuggingFace"
    "phi-3-mini": (HELLO, True, [32006, 2184, 2643, 32007, *TURNS, 32001]),
    "phi-3-medium": (HELLO, True, TURNS),
    "phi-4": (
        HELPFUL,
        True,
        [
            100264,
            9125,
            100266,
            2675,
            527,
            264,
            11190,
            18328,
            13,
            100265,
            100264,
            882,
            100266,
            4438,
            1288,
            358,
            10552,
            279,
            8191,
            30,
            100265,
            100264,
            78191,
            100266,
        ],
    ),
    "phi-4-mini-reasoning": (
        KNIGHT,
        True,
        [
            200022,
            9719,
            1308,
            382,
            102143,
            11,
            448,
            20837,
            13324,
            8333,
            9742,
            656,
            8321,
            13,
            1608,
            553,
            261,
            55145,
            105457,
            326,
            2804,
            3587,
            69457,
            316,
            6809,
            1665,
            13,
            200020,
            200021,
            5299,
            1757,
            357,
            16644,
            290,
            7380,
            30,
            200020,
            200019,
        ],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_chat_ids_are_the_published_ones(name, tokenizer):
    """Ids that others wrote down, from a template through encoding (spec 8.41)."""
    messages, end, ids = PUBLISHED[name]
    ours = tokenizer(name)
    assert ours.encode(rendered(ours, messages, end), add_special_tokens=False) == ids


def test_medium_leaves_out_the_system_message_and_says_so(tokenizer):
    """Its template knows none, and heeds no add_generation_prompt (spec 8.48)."""
    medium = tokenizer("phi-3-medium")
    with pytest.warns(UserWarning, match="leaves out the system message"):
        with_system = medium.apply_chat_template(KNIGHT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            medium.apply_chat_template(KNIGHT[1:])
            == with_system
            == medium.apply_chat_template(KNIGHT[1:], add_generation_prompt=False)
        )


@pytest.mark.parametrize("name", ["phi-3-mini", "phi-4", "phi-4-mini", "phi-4-mini-reasoning"])
def test_other_templates_leave_out_nothing(name, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert KNIGHT[0]["content"] in tokenizer(name).apply_chat_template(KNIGHT)


def test_a_template_may_shorten_what_the_assistant_said():
    """Those of reasoning models leave out its thoughts, by design."""
    source = "{% for m in messages if m['role'] != 'assistant' %}{{ m['content'] }}{% endfor %}"
    tokenizer = Tokenizer(cut_down("phi-3").backend, source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            tokenizer.apply_chat_template(
                [{"role": "assistant", "content": "<think>x</think>y"}, KNIGHT[1]]
            )
            == KNIGHT[1]["content"]
        )


def test_end_of_text_closes_a_conversation_without_generation_prompt(tokenizer):
    """Where the template says so: Phi-3-mini and Phi-4-mini do, medium and phi-4 do not (spec
    8.49).
    """
    ends = {
        name: rendered(tokenizer(name), KNIGHT[1:], end=False).endswith("<|endoftext|>")
        for name in NAMES
    }
    assert ends == {
        "phi-3": False,
        "phi-3-mini": True,
        "phi-3-medium": False,
        "phi-4": False,
        "phi-4-mini": True,
        "phi-4-mini-reasoning": True,
    }


def test_april_template_begins_the_sequence_itself(tokenizer):
    """`{{ bos_token }}` opens April's template, and no other (spec 8.47)."""
    assert [rendered(tokenizer(name), KNIGHT[1:]).startswith("<s>") for name in NAMES] == [
        name == "phi-3" for name in NAMES
    ]


def test_reasoning_template_introduces_itself(tokenizer):
    text = rendered(tokenizer("phi-4-mini-reasoning"), KNIGHT)
    assert text.startswith(
        "<|system|>Your name is Phi, an AI math expert developed by Microsoft. You are a medieval knight"
    )


def test_tools_stand_in_the_system_message(tokenizer):
    text = rendered(
        tokenizer("phi-4-mini"),
        [{"role": "system", "content": "S", "tools": "[T]"}, {"role": "user", "content": "U"}],
    )
    assert text == "<|system|>S<|tool|>[T]<|/tool|><|end|><|user|>U<|end|><|assistant|>"


# ---------------------------------------------------------------------------------------------------------------- streams


def pieces(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("name", NAMES)
def test_stream_joins_to_the_whole(name, tokenizer):
    """Every golden string, token by token; never half a character on the way (spec 8.44)."""
    ours = tokenizer(name)
    for text, ids in zip(GOLDEN["strings"], GOLDEN["tokenizer"][name]["ids"], strict=True):
        got = pieces(ours, ids)
        assert "".join(got) == ours.decode(ids)
        assert "\ufffd" in text or "\ufffd" not in "".join(got)


@pytest.mark.parametrize("name", NAMES)
def test_stream_of_any_ids_joins_to_the_whole(name, tokenizer):
    """Law: any ids a model can emit, broken bytes and ids without a token included (spec 8.44)."""
    ours = tokenizer(name)
    largest = {"phi-3": 32064, "phi-4": 100352}.get("-".join(name.split("-")[:2]), 200064)
    largest = 200064 if "phi-4-mini" in name else largest
    broken = [i for text in ("🙂", "日本", "é", "\u0301") for i in ours.encode(text)]
    known = st.sampled_from(sorted(ours.backend.get_vocab().values()))
    ids = st.lists(
        st.integers(0, largest - 1) | known | st.sampled_from(broken) | st.integers(3, 258),
        max_size=24,
    )

    @settings(max_examples=draws(15, 50))
    @example(broken)
    @example(broken[-1:] + broken)
    @given(ids)
    def law(ids):
        assert "".join(pieces(ours, ids)) == ours.decode(ids)

    law()


def test_stream_gives_each_character_as_soon_as_it_is_whole(tokenizer):
    """🙂 comes with its last byte's successor at the latest, spaces stay where they are (spec 8.44)."""
    for name in NAMES:
        ours = tokenizer(name)
        ids = ours.encode("Hello, world! 🙂 こんにちは、世界。 x")
        got = pieces(ours, ids)
        assert "".join(got) == "Hello, world! 🙂 こんにちは、世界。 x"
        assert len([piece for piece in got if piece]) > 8, "pieces come one by one, not at the end"
        assert all(len(piece) < 12 for piece in got)


# ----------------------------------------------------------------------------------------------------------- golden file


def test_golden_file_holds_the_strings_of_today():
    """scripts/make_golden_tokenizers.py must run again where the strings change; there are
    hundreds.
    """
    assert (GOLDEN["strings"], GOLDEN["messages"], NAMES) == (strings(), MESSAGES, list(FAMILY))
    assert len(GOLDEN["strings"]) > 500
