"""npllm.text.tokenizer: text to ids and back, streams of text, and chat templates in a sandbox; on
tiny tokenizers of both forms.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import (
    CHAT_TEMPLATE,
    SETTINGS,
    SPECIAL,
    byte_level,
    sentencepiece,
    write_folder,
    write_json,
)
from tokenizers.processors import TemplateProcessing

import npllm
from npllm import Tokenizer
from npllm.errors import NpllmError, NpllmOSError, NpllmTypeError, NpllmValueError
from npllm.text.stream import Detokenizer

REAL = Path(
    os.environ.get(
        "NPLLM_TOKENIZERS", Path(__file__).resolve().parents[2] / "shared" / "tokenizers"
    )
)
BYTES, PIECES = Tokenizer(byte_level()), Tokenizer(sentencepiece())
FORMS = {"byte level": BYTES, "sentencepiece": PIECES}
NASTY = [
    "",
    " ",
    "  ",
    "\n",
    "\t\r\n",
    "hello world",
    " hello",
    "hello  hello",
    "é",
    "日本語",
    "🙂🙂",
    "👩‍👩‍👧",
    "ﷺ",
    "a\u0301",
    "\ufffd",
    "\u0000",
    "<|end|>",
    "<|end",
    "a<|end|>b",
    "<s></s>",
    "<unk>",
    "<0x41>",
    "▁",
    "▁▁a",
    "Ġ",
    "Ãé",
]

forms = pytest.mark.parametrize("tokenizer", FORMS.values(), ids=list(FORMS))


def ids_of(tokenizer):
    """Any ids: of the vocabulary, often bytes of broken characters, and some that have no token."""
    n = tokenizer.backend.get_vocab_size()
    tricky = [i for text in ("é🙂日\ufffd hello ▁<|end|>", " ") for i in tokenizer.encode(text)]
    return st.lists(st.integers(0, n + 5) | st.sampled_from([*tricky, n - 1, 0]), max_size=14)


def pieces(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(i) for i in ids] + [detokenizer.flush()]


def folder_with(tmp_path, template=None, **settings):
    write_folder(
        tmp_path,
        tokenizer=byte_level(),
        settings=SETTINGS | settings | ({} if template is None else {"chat_template": template}),
    )
    return Tokenizer.from_folder(tmp_path)


def render(template, content="x"):
    return Tokenizer(byte_level(), template).apply_chat_template(
        [{"role": "user", "content": content}]
    )


# ------------------------------------------------------------------------------------------------------------------------- streams


@forms
@given(st.data())
def test_pieces_joined_are_the_decoded_whole(tokenizer, data):
    ids = data.draw(ids_of(tokenizer))
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@forms
@given(st.data())
def test_what_was_said_is_never_taken_back(tokenizer, data):
    ids, said = data.draw(ids_of(tokenizer)), ""
    for piece in pieces(tokenizer, ids):
        said += piece
        assert tokenizer.decode(ids).startswith(said)


@forms
@given(st.text(max_size=12))
@example("🙂 é日本")
@example("  hello  ")
def test_text_streams_without_a_broken_character(tokenizer, text):
    parts = pieces(tokenizer, tokenizer.encode(text))
    assert "\ufffd" not in "".join(parts) or "\ufffd" in text
    assert "".join(parts) == tokenizer.decode(tokenizer.encode(text))


@forms
def test_every_token_of_plain_text_gives_its_piece_at_once(tokenizer):
    assert pieces(tokenizer, tokenizer.encode("hello w w")) == ["hello", " w", " w", ""]


def test_a_character_of_many_tokens_comes_as_one_piece():
    ids = BYTES.encode("a🙂b")
    assert len(ids) == 6 and pieces(BYTES, ids) == ["a", "", "", "", "🙂", "b", ""]


def test_a_run_of_byte_tokens_waits_for_its_end():
    ids = PIECES.encode("hello🙂 hello")
    assert [piece for piece in pieces(PIECES, ids) if piece] == ["hello", "🙂 hello"]


def test_one_wrong_byte_spoils_its_whole_run_as_in_the_decoder():
    a, wrong = (PIECES.backend.token_to_id(f"<0x{byte:02X}>") for byte in (0x41, 0xFF))
    assert PIECES.decode([a, wrong]) == "\ufffd\ufffd"
    assert "".join(pieces(PIECES, [a, wrong])) == "\ufffd\ufffd"


def test_a_space_is_a_byte_like_any_other_and_a_token_like_any_other():
    hello, space, wrong, a = (
        PIECES.backend.token_to_id(name) for name in ("▁hello", "<0x20>", "<0xFF>", "<0x41>")
    )
    assert (
        "".join(pieces(PIECES, [hello, space, wrong]))
        == PIECES.decode([hello, space, wrong])
        == "hello\ufffd\ufffd"
    )
    assert pieces(PIECES, [hello, a, PIECES.backend.token_to_id("▁"), hello]) == [
        "hello",
        "",
        "A ",
        " hello",
        "",
    ]


def test_a_token_that_only_looks_like_a_byte_is_given_at_once():
    backend = byte_level()
    backend.add_tokens(["<0x41>"])
    assert pieces(Tokenizer(backend), Tokenizer(backend).encode("a<0x41>b")) == [
        "a",
        "<0x41>",
        "b",
        "",
    ]


def test_a_skipped_token_does_not_end_a_run_of_bytes():
    end = PIECES.backend.token_to_id("<|end|>")
    a, wrong = (PIECES.backend.token_to_id(f"<0x{byte:02X}>") for byte in (0x41, 0xFF))
    for between in (end, 10_000):
        assert (
            "".join(pieces(PIECES, [a, between, wrong]))
            == PIECES.decode([a, between, wrong])
            == "\ufffd\ufffd"
        )


@forms
def test_half_a_character_at_the_end_comes_with_flush(tokenizer):
    ids = tokenizer.encode("hello🙂")[:-1]
    *first, last = pieces(tokenizer, ids)
    assert "".join(first) == "hello" and set(last) == {"\ufffd"}


def test_the_work_for_a_token_does_not_grow_with_the_text():
    class Watched:
        backend, longest = BYTES.backend, 0

        def decode(self, ids):
            self.longest = max(self.longest, len(ids))
            return BYTES.decode(ids)

    watched = Watched()
    pieces(watched, BYTES.encode("hello wörld 🙂 " * 30))
    assert watched.longest <= 10


@pytest.mark.parametrize(
    "name",
    ["phi-3", "phi-3-mini", "phi-3-medium", "RECONSTRUCTED-phi-4", "RECONSTRUCTED-phi-4-mini"],
)
def test_real_tokenizers_stream_what_they_decode(name):
    if not (REAL / name / "tokenizer.json").is_file():
        pytest.skip(f"{name} is not here; NPLLM_TOKENIZERS names the folder of the real tokenizers")
    tokenizer = Tokenizer.from_folder(REAL / name)

    @given(ids_of(tokenizer))
    def check(ids):
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)

    check()
    for text in NASTY:
        assert "".join(pieces(tokenizer, tokenizer.encode(text))) == tokenizer.decode(
            tokenizer.encode(text)
        )


def test_the_default_tokenizer_streams_what_it_decodes(default_model):
    for text in NASTY:
        ids = default_model.tokenizer.encode(text)
        assert "".join(pieces(default_model.tokenizer, ids)) == default_model.tokenizer.decode(ids)


# --------------------------------------------------------------------------------------------------------------- encode and decode


@given(st.text())
def test_bytes_round_trip(text):
    assert BYTES.decode(BYTES.encode(text), skip_special_tokens=False) == text


@forms
@pytest.mark.parametrize("text", ["<|end|>", "a<|end|>b", "<s>"])
def test_special_strings_inside_the_text_become_their_ids(tokenizer, text):
    special = text.strip("ab")
    ids = tokenizer.encode(text)
    assert ids.count(tokenizer.backend.token_to_id(special)) == 1
    assert special not in tokenizer.decode(ids) and special in tokenizer.decode(
        ids, skip_special_tokens=False
    )


def test_encode_returns_a_list_of_int():
    ids = BYTES.encode("hello wé<|end|>")
    assert (
        isinstance(ids, list)
        and {type(i) for i in ids} == {int}
        and ids[-1] == SPECIAL.index("<|end|>")
    )
    assert BYTES.encode("") == []


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc80"])
def test_half_a_surrogate_pair_is_refused(text):
    with pytest.raises(NpllmTypeError, match="valid Unicode"):
        BYTES.encode(text)


@pytest.mark.parametrize("text", [b"bytes", 5, None, ["a"]])
def test_what_is_no_text_is_refused(text):
    with pytest.raises(NpllmTypeError, match="text must be a str, got " + type(text).__name__):
        BYTES.encode(text)


@forms
def test_ids_without_a_token_decode_to_nothing(tokenizer):
    n = tokenizer.backend.get_vocab_size()
    assert tokenizer.decode([n, n + 1000, 2**31]) == ""
    a = tokenizer.encode("hello")
    assert tokenizer.decode([n, *a, n + 1]) == "hello"


@pytest.mark.parametrize(
    "ids", [[-1], [2**64], ["a"], -5, 2.5, None, [None], [float("nan")], [[1]]]
)
def test_what_are_no_ids_is_refused(ids):
    with pytest.raises(NpllmTypeError, match="ids must be a sequence of token ids"):
        BYTES.decode(ids)


@forms
@pytest.mark.parametrize("kind", [int, np.int64, np.asarray])
def test_one_id_decodes_as_a_list_of_it(tokenizer, kind):
    (token,) = tokenizer.encode("hello")[:1]
    assert tokenizer.decode(kind(token)) == tokenizer.decode([token]) != ""


@forms
def test_a_call_gives_arrays_that_a_model_takes(tokenizer):
    one, two = (tokenizer.encode(text) for text in ("hello", "hello hello"))
    assert tokenizer("hello").input_ids.tolist() == [one]
    assert tokenizer("hello", return_tensors="np").attention_mask.tolist() == [[1] * len(one)]
    ids, mask = tokenizer(["hello", "hello hello"])
    assert ids.dtype == np.int64
    assert ids.shape == mask.shape == (2, len(two))
    assert ids[1].tolist() == two
    assert ids[0][mask[0] == 1].tolist() == one
    assert mask[0].tolist() == sorted(mask[0]) and mask[0].sum() == len(one), "padded on the left"


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("hello", {"return_tensors": "pt"}, "leave the argument out"),
        ("", {}, "at least one token"),
        ([], {}, "text must be a str or a list of str"),
        (5, {}, "text must be a str or a list of str, got 5"),
        (["hello", 5], {}, "text must be a str, got int"),
    ],
)
def test_a_call_that_is_refused(text, options, message):
    with pytest.raises(NpllmError, match=message):
        BYTES(text, **options)


def test_repr_of_a_tokenizer_says_what_it_has():
    n = BYTES.backend.get_vocab_size()
    assert repr(BYTES).startswith(f"<npllm.Tokenizer {n:,} tokens")
    assert "chat template" in repr(BYTES)
    first = Tokenizer(BYTES.backend, "x", {"bos_token": "<|user|>"}, add_bos_token=True)
    assert repr(first) == f"<npllm.Tokenizer {n:,} tokens, begins with '<|user|>', chat template>"


@pytest.mark.parametrize(
    "token, text",
    [
        (3, "<|user|>"),
        (10_000, "<10000>"),
        (BYTES.encode(" w")[0], " w"),
        (BYTES.encode("\n")[0], "\n"),
    ],
)
def test_every_id_has_a_text_for_tables(token, text):
    assert BYTES.token_text(token) == text


def test_truncation_and_padding_in_the_file_are_off(tmp_path):
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    write_folder(tmp_path, tokenizer=backend)
    assert Tokenizer.from_folder(tmp_path).encode("hello w hello") == BYTES.encode("hello w hello")


# --------------------------------------------------------------------------------------------------------------------------- files


def test_a_folder_without_a_tokenizer_loads_as_a_model_only(tmp_path):
    model = npllm.load(write_folder(tmp_path))
    assert model.tokenizer is None
    with pytest.raises(
        NpllmOSError, match=r"tokenizer\.json: no such file; without it only token ids"
    ):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": {"type": "nonsense"}}', "\x00"])
def test_a_tokenizer_that_makes_no_sense_is_refused_with_the_path(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(
        NpllmValueError,
        match=r"tokenizer\.json.*cannot be read|tokenizer\.json: is not a tokenizer",
    ):
        Tokenizer.from_folder(tmp_path)


def test_special_tokens_may_be_texts_or_objects(tmp_path):
    tokenizer = folder_with(tmp_path)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_a_template_file_wins_over_the_settings(tmp_path):
    write_folder(tmp_path, tokenizer=byte_level(), settings=SETTINGS)
    (tmp_path / "chat_template.jinja").write_text(
        "from the file: {{ messages[0].content }}", encoding="utf-8"
    )
    assert (
        Tokenizer.from_folder(tmp_path).apply_chat_template([{"role": "user", "content": "hé"}])
        == "from the file: hé"
    )


def test_of_several_named_templates_the_default_is_taken(tmp_path):
    named = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": "yes {{ messages[0].content }}"},
    ]
    assert (
        folder_with(tmp_path, named).apply_chat_template([{"role": "user", "content": "x"}])
        == "yes x"
    )


@pytest.mark.parametrize("template", [5, {"a": 1}, [{"name": "default", "template": 5}]])
def test_a_template_that_is_no_text_is_refused(tmp_path, template):
    with pytest.raises(NpllmValueError, match="chat_template must be a string"):
        folder_with(tmp_path, template)


@pytest.mark.parametrize("template", [None, [], [{"name": "other", "template": "x"}], ""])
def test_without_a_template_chat_is_refused(tmp_path, template):
    write_folder(tmp_path, tokenizer=byte_level(), settings={"chat_template": template})
    with pytest.raises(NpllmValueError, match="no chat template; give the prompt as plain text"):
        Tokenizer.from_folder(tmp_path).apply_chat_template([{"role": "user", "content": "x"}])


def test_a_template_file_that_is_not_utf8_is_refused(tmp_path):
    write_folder(tmp_path, tokenizer=byte_level(), settings=SETTINGS)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(NpllmOSError, match=r"chat_template\.jinja"):
        Tokenizer.from_folder(tmp_path)


def test_settings_that_are_no_json_are_refused(tmp_path):
    write_folder(tmp_path, tokenizer=byte_level())
    write_json(tmp_path / "tokenizer_config.json", [1])
    with pytest.raises(NpllmValueError, match=r"tokenizer_config\.json: must hold a JSON object"):
        Tokenizer.from_folder(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------------- chat


def test_blocks_are_trimmed_as_in_transformers(tmp_path):
    tokenizer = folder_with(tmp_path)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "He"},
    ]
    text = "<|user|>Hi<|end|><|assistant|>Ho<|end|><|user|>He<|end|>"
    assert tokenizer.apply_chat_template(messages) == text + "<|assistant|>"
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == text + "</s>"


def test_lines_are_trimmed_left_and_right_of_blocks():
    assert (
        render("a\n   {% if true %}\n  b{{ messages[0].content }}\n   {% endif %}\nc")
        == "a\n  bx\nc"
    )


def test_loops_may_be_left_early():
    assert render("{% for m in messages * 3 %}{{ m.content }}{% break %}{% endfor %}") == "x"


def test_a_chat_is_encoded_without_special_tokens_of_its_own():
    backend = byte_level()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = Tokenizer(backend, CHAT_TEMPLATE, {"bos_token": "<s>", "eos_token": "</s>"})
    hello = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [0, *hello]
    assert tokenizer.encode_chat([{"role": "user", "content": "hello"}]) == [3, *hello, 5, 4]


def test_a_template_may_refuse():
    with pytest.raises(
        NpllmValueError, match="the chat template failed: TemplateError: roles must alternate"
    ):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ ''['__class__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ messages.sort.__self__ }}{{ messages.sort() }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template):
    try:
        text = render("{{ messages[0].content }}" + template, content="said")
    except NpllmError:
        return
    assert text == "said", "what it reached for is written out"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content",
        "{% nonsense %}",
        "{{ 1 / 0 }}",
        "{{ messages[5].content.x }}",
        "{{ x() }}",
    ],
)
def test_a_template_that_fails_is_our_error(template):
    with pytest.raises(NpllmValueError, match="the chat template failed"):
        render(template)


@pytest.mark.parametrize(
    "message", ["text", {}, {"role": "user"}, {"content": "x"}, {"role": 5, "content": "x"}, None]
)
def test_a_malformed_message_is_refused(message):
    with pytest.raises(NpllmError, match=r'a message must be \{"role"'):
        Tokenizer(byte_level(), CHAT_TEMPLATE).apply_chat_template([message])


def test_the_default_checkpoint_writes_its_chat_format(default_model):
    text = default_model.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text.endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ) and text.startswith("<|im_start|>system\nYou are")
