"""Conversations: tools, tool calls, and what a chat template leaves out of what it is given."""

import os
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_level

from npllm import Tokenizer
from npllm.errors import NpllmError, NpllmTypeError, NpllmValueError
from npllm.text import conversation
from npllm.text.conversation import find_left_out
from npllm.text.template_process import Allowance

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "integer"}}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
SYSTEM = {"role": "system", "content": "be nice"}
USER = {"role": "user", "content": "hi"}
ALL = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
USERS = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
CALLS = """{%- if tools %}{{ tools|tojson }}{% endif %}
{%- for m in messages %}<|{{ m.role }}|>
{%- if m.content is defined and m.content %}{{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}{{ call.function|tojson }}{% endfor %}
{%- endfor %}"""


def tokenizer(template):
    return Tokenizer(byte_level(), template)


def write(template, messages, **options):
    """The text, and what the template is said to leave out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        text = tokenizer(template).apply_chat_template(messages, **options)
    words = [str(warning.message) for warning in caught]
    assert all(w.startswith("this checkpoint's chat template leaves out ") for w in words)
    assert all(w.endswith(": the model does not see it") for w in words)
    return text, [w.split("leaves out ")[1].split(":")[0] for w in words]


# ------------------------------------------------------------------------------ tools


def test_a_template_sees_tools():
    text, left_out = write(CALLS, [USER], tools=[TOOL])
    assert text.startswith('[{"type": "function", "function": {"name": "add"')
    assert text.endswith("<|user|>hi")
    assert left_out == []
    assert write(CALLS, [USER]) == ("<|user|>hi", [])
    assert write("{{ tools is none }}{{ messages[0].content }}", [USER]) == ("Truehi", [])


def test_tools_go_through_encode_chat():
    ours = tokenizer(CALLS)
    text = ours.apply_chat_template([USER], tools=[TOOL])
    assert ours.encode_chat([USER], tools=[TOOL]) == ours.encode(text)
    assert ours.encode_chat([USER], tools=[TOOL]) != ours.encode_chat([USER])


def test_tools_that_a_template_leaves_out_are_named():
    assert write(ALL, [USER], tools=[TOOL]) == ("<|user|>hi", ["the list of tools"])
    assert write(ALL, [USER], tools=[]) == ("<|user|>hi", [])


@pytest.mark.parametrize("tools", [5, "add", {"name": "add"}, [5], ["add"], [print], [None]])
def test_tools_that_are_none_are_refused(tools):
    with pytest.raises(NpllmTypeError, match="JSON schema"):
        tokenizer(ALL).apply_chat_template([USER], tools=tools)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_an_assistant_may_call_tools_and_say_nothing(content):
    message = {"role": "assistant", "tool_calls": [CALL]} | content
    answer = {"role": "tool", "content": "3"}
    text, left_out = write(CALLS, [USER, message, answer])
    assert text == ('<|user|>hi<|assistant|>{"name": "add", "arguments": {"a": 1}}<|tool|>3')
    assert left_out == []


@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_only_an_assistant_may_say_nothing(role):
    for message in ({"role": role}, {"role": role, "tool_calls": [CALL]}, {"role": "assistant"}):
        with pytest.raises(NpllmValueError, match=r'a message must be \{"role".*"tool_calls"'):
            tokenizer(CALLS).apply_chat_template([message])


# ------------------------------------------------------------------------------ what is left out


@pytest.mark.parametrize(
    ("template", "left_out"),
    [
        (ALL, []),
        (USERS, ["the system message"]),
        # in the text, and yet left out
        ("nice: be nice " + USERS, ["the system message"]),
        # written with other letters, and yet read
        ("{% for m in messages %}{{ m.content|upper }}{% endfor %}", []),
        ("{% for m in messages %}{{ m.content|urlencode }}{% endfor %}", []),
        ("{% for m in messages %}{{ m.content|tojson }}{% endfor %}", []),
        ("{% for m in messages %}{{ m.content[::-1] }}{% endfor %}", []),
        ("{% for m in messages %}{{ m.content[:1] }}{% endfor %}", []),
        ("{% for m in messages %}{{ m.content|length }}{% endfor %}", []),
        ("{% if messages[0].content == 'be nice' %}nice{% endif %}" + USERS, []),
        # a role is written, what it says is not
        ("{% for m in messages %}<|{{ m.role }}|>{% endfor %}" + USERS, ["the system message"]),
        # the default is what the message says
        ("{% if messages[0].role != 'system' %}be nice{% endif %}" + ALL, []),
        ("constant", ["the system message", "the user message"]),
        # another content is refused
        (
            "{% if messages[0].content != 'be nice' %}{{ raise_exception('no') }}{% endif %}hi",
            ["the user message"],
        ),
    ],
)
def test_a_message_is_left_out_when_another_content_gives_the_same_text(template, left_out):
    assert write(template, [SYSTEM, USER])[1] == left_out


def test_parts_of_a_content_are_read_or_left_out():
    parts = [{"type": "image"}, {"type": "text", "text": "hi"}]
    reads = (
        "{% for part in messages[0].content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    )
    assert write(reads, [{"role": "user", "content": parts}]) == ("hi", [])
    assert write("hi", [{"role": "user", "content": parts}])[1] == ["the user message"]
    assert write("x", [{"role": "user", "content": [{"type": "image"}]}])[1] == []


@pytest.mark.parametrize("content", ["", " \n", None, [], {}])
def test_where_nothing_is_said_nothing_is_left_out(content):
    assert write("x", [{"role": "user", "content": content}]) == ("x", [])


def test_an_assistants_thoughts_may_be_left_out():
    assert write(USERS, [USER, {"role": "assistant", "content": "so"}, USER]) == ("hihi", [])


def test_one_of_many_messages_is_found():
    messages = [{"role": "user", "content": f"message {i}"} for i in range(50)]
    last = "{{ messages[-1].content }}"
    assert write(last, messages) == ("message 49", ["the user message"])
    skips = (
        "{% for m in messages %}{% if loop.index0 != 30 %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert write(skips, messages)[1] == ["the user message"]
    assert write(ALL, messages)[1] == []


def test_messages_that_are_read_cost_one_rendering_together(monkeypatch):
    calls, render = [], conversation.render
    monkeypatch.setattr(conversation, "render", lambda *args: calls.append(1) or render(*args))
    messages = [{"role": "user", "content": f"message {i}"} for i in range(50)]
    assert write(ALL, messages)[1] == []
    assert len(calls) == 1
    assert write(USERS, [SYSTEM, SYSTEM, *messages])[1] == ["the system message"]
    assert len(calls) == 3


def test_digits_in_a_conversation_are_no_marks():
    """Another content is a number that the text does not hold."""
    content = "".join(f"{90_817_263 + n}000000 " for n in range(50))
    assert write(ALL, [{"role": "user", "content": content}])[1] == []
    shown = f"{content}{USERS}"
    messages = [{"role": "system", "content": content}, USER]
    assert write(shown, messages)[1] == ["the system message"]


def test_the_search_shares_the_time_of_the_rendering():
    allowance = Allowance(-1.0)
    assert find_left_out("constant", [USER], {}, "constant", allowance) == []
    assert find_left_out("constant", [USER], {}, "constant", Allowance()) == ["the user message"]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["system", "user", "tool"]), st.text(max_size=5)), min_size=1
    ),
    st.sets(st.sampled_from(["system", "user", "tool"])),
)
def test_what_is_left_out_is_what_is_not_read(said, read):
    """A template that reads some roles leaves out the others, whatever they say."""
    messages = [{"role": role, "content": content} for role, content in said]
    source = (
        f"{{% for m in messages if m.role in {sorted(read)} %}}{{{{ m.content }}}}{{% endfor %}}"
    )
    expected = dict.fromkeys(
        f"the {role} message" for role, text in said if role not in read and text.strip()
    )
    assert write(source, messages) == (
        "".join(text for role, text in said if role in read),
        list(expected),
    )


# ------------------------------------------------------------------------------ numbers of NumPy


def test_numpy_scalars_are_options():
    ours = tokenizer(ALL + "{% if add_generation_prompt %}!{% endif %}")
    assert ours.encode(np.str_("hi"), add_special_tokens=np.bool_(False)) == ours.encode("hi")
    ids = np.array(ours.encode("hi<|end|>"))
    assert ours.decode(ids, skip_special_tokens=np.bool_(True)) == "hi"
    assert ours.decode(list(ids), skip_special_tokens=np.bool_(False)) == "hi<|end|>"
    assert ours.token_text(ids[-1]) == "<|end|>"
    for end in (np.bool_(True), np.bool_(False), np.int64(1), np.int64(0)):
        text = ours.apply_chat_template([USER], add_generation_prompt=end)
        assert text == ("<|user|>hi!" if end else "<|user|>hi")
    tool = {"name": "add", "n": np.int64(5), "x": np.float32(0.5), "strict": np.bool_(True)}
    assert write("{{ tools|tojson }}", [USER | {"content": ""}], tools=[tool])[0] == (
        '[{"name": "add", "n": 5, "x": 0.5, "strict": true}]'
    )
    bos = Tokenizer(byte_level(), None, {"bos_token": "<s>"}, np.bool_(True))
    assert bos.encode("hi")[0] == bos.backend.token_to_id("<s>")


@pytest.mark.parametrize("ids", [[1.0], [np.float64(1)], ["1"], np.array([0.5]), [True, None]])
def test_what_are_no_integers_are_no_ids(ids):
    with pytest.raises(NpllmTypeError, match="ids must be a sequence of token ids"):
        tokenizer(ALL).decode(ids)


@pytest.mark.parametrize("value", ["no", 5, None])
def test_flags_are_true_or_false(value):
    with pytest.raises(NpllmTypeError, match="skip_special_tokens must be True or False"):
        tokenizer(ALL).decode([1], skip_special_tokens=value)
    with pytest.raises(NpllmTypeError, match="add_special_tokens must be True or False"):
        tokenizer(ALL).encode("x", add_special_tokens=value)


# ------------------------------------------------------------------------------ as in Transformers

GENERATES = (
    "{% for m in messages %}{% if m.role == 'assistant' %}\n{% generation %}\n"
    "{% set x = m.content %}{{ x }}{{ loop.index }}\n  {% endgeneration %}\n{% else %}"
    "{{ m.content }}{{ x }}{% endif %}{% endfor %}"
)
PIECES = (
    CALLS,
    GENERATES,
    "{{ tools|tojson(indent=2) }}",
    "{% for t in tools or [] %}{{ t.function.name }}{{ t }}{% endfor %}",
    "{% for m in messages %}{{ m.get('content') }}{{ m.tool_calls is defined }}{% endfor %}",
    "{%- generation -%} {{ messages[-1] }} {%- endgeneration -%}",
    "{{ messages[0]['role'].title() }}{{ '%5s'|format('x') }}",
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4) | st.floats(-1, 1),
    lambda values: (
        st.lists(values, max_size=2) | st.dictionaries(st.text(max_size=3), values, max_size=2)
    ),
    max_leaves=4,
)
messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "tool"]),
            "content": st.text(max_size=9),
        }
    )
    | st.fixed_dictionaries(
        {"role": st.just("assistant"), "tool_calls": st.just([CALL])},
        optional={"content": st.none() | st.text(max_size=3)},
    ),
    min_size=1,
    max_size=4,
)
tools = st.none() | st.lists(
    st.just(TOOL) | st.dictionaries(st.text(max_size=3), json_values), max_size=2
)


@pytest.mark.live
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PIECES), messages, tools)
def test_text_with_tools_is_that_of_transformers(template, messages, tools):
    if os.environ.get("NPLLM_REQUIRE_LIVE") != "1":
        pytest.importorskip("transformers", reason="compares with Transformers")
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        wanted = render_jinja_template(
            [messages], tools=tools, chat_template=template, add_generation_prompt=True
        )[0][0]
    except (TemplateError, TypeError):
        wanted = None
    try:
        text = write(template, messages, tools=tools)[0]
    except NpllmError:
        text = None
    assert text == wanted
