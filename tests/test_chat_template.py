"""npllm.text.chat_template: what a template may do, and the limits of time and memory it has.

The limits belong to the process that renders: see test_template_process.py.
"""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seeds import draws

import npllm
from npllm.text import chat_template, template_process
from npllm.text.template_process import Allowance

ROOT = Path(__file__).resolve().parents[1]
MESSAGES = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello"}]
NAMES = {"add_generation_prompt": True, "bos_token": "<s>"}

_SPEC = importlib.util.spec_from_file_location("fuzz", ROOT / "scripts" / "fuzz.py")
fuzz = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz)


def render(source, seconds=template_process.DEADLINE):
    return chat_template.render(source, MESSAGES, NAMES, Allowance(seconds))


def refusal(source, *limits):
    """The text of the error that a template must end with; it must be fit to print."""
    with pytest.raises(npllm.NpllmError) as caught:
        render(source, *limits)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).isprintable()
    return str(caught.value)


# ------------------------------------------------------------------------------ sandbox


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ ''.__class__.__mro__ }}", "attribute '__class__' of 'str' object is unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "attribute '__init__' of 'type' object is unsafe"),
        ("{{ namespace.__init__.__globals__ }}", "attribute '__init__' of 'type' object is unsafe"),
        (
            "{{ self.__init__.__globals__ }}",
            "attribute '__init__' of 'TemplateReference' object is unsafe",
        ),
        (
            "{% macro m() %}{% endmacro %}{{ m.__call__.__globals__ }}",
            "attribute '__call__' of 'Macro' object is unsafe",
        ),
        (
            "{{ raise_exception.__globals__.x }}",
            "attribute '__globals__' of 'function' object is unsafe",
        ),
        ("{{ messages.append.__self__ }}", "attribute 'append' of 'list' object is unsafe"),
        ("{{ messages.append(1) }}", "attribute 'append' of 'list' object is unsafe"),
        ("{{ messages[0].update(a=1) }}", "attribute 'update' of 'dict' object is unsafe"),
        ("{{ messages[0].clear() }}", "attribute 'clear' of 'dict' object is unsafe"),
        ("{{ (messages|attr('pop'))() }}", "attribute 'pop' of 'list' object is unsafe"),
        ("{{ (''|attr('__class__')).x }}", "attribute '__class__' of 'str' object is unsafe"),
        ("{{ ''['__class__'].x }}", "attribute '__class__' of 'str' object is unsafe"),
        (
            "{{ messages|map(attribute='__class__')|map(attribute='x')|list }}",
            "'__class__' of 'dict' object is unsafe",
        ),
        (
            "{{ (messages|map(attribute='role')).gi_frame.f_back }}",
            "attribute 'gi_frame' of 'generator' object is unsafe",
        ),
        ("{% include 'x' %}", "no loader"),
        ("{% extends 'x' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        (
            "{% for m in messages %}{% set m.content = 'evil' %}{% endfor %}",
            "cannot assign attribute on non-namespace object",
        ),
        (
            "{% for m in messages %}{% set a, m.content = 1, 'evil' %}{% endfor %}",
            "cannot assign attribute on non-namespace object",
        ),
    ],
)
def test_a_template_cannot_reach_python(source, words):
    before = json.dumps(MESSAGES)
    assert words in refusal(source)
    assert json.dumps(MESSAGES) == before


@pytest.mark.parametrize(
    "source",
    [
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{a.__class__}'.format_map({'a': 1}) }}",
        "{{ ('{0.__class__}'|attr('format'))(1) }}",
        "{{ ''['format']('{0.__class__}') }}",
    ],
)
def test_formatting_reaches_no_attributes_either(source):
    assert render(source) == ""


@pytest.mark.parametrize(
    "change",
    [
        "{% for m in messages %}{% set m.content %}evil{% endset %}{% endfor %}",
        "{{ dict.update(messages[0], {'content': 'evil'}) }}",
        "{{ messages|indent(2) }}",
    ],
)
def test_a_template_changes_neither_the_conversation_nor_the_next_rendering(change):
    before = json.dumps(MESSAGES)
    source = "{{ messages[0].content }}" + change
    try:
        assert render(source).startswith("hi there")
    except npllm.NpllmError:
        return
    assert render(source).startswith("hi there")
    assert json.dumps(MESSAGES) == before


# ------------------------------------------------------------------------------ limits

LOOP = "{% for i in range(100000) %}"
DOUBLE = "{% set ns = namespace(x=START, y=START) %}{% for i in range(60) %}{% set ns.x = NEXT %}{% endfor %}{{ ns.x == ns.x }}{{ ns.x }}"
CHAIN = "".join(f"{{% set n{i} = namespace(a=1, b=1) %}}" for i in range(60)) + "".join(
    f"{{% set n{i}.a = n{i + 1} %}}{{% set n{i}.b = n{i + 1} %}}" for i in range(59)
)


def one_in(n, sources):
    """Every n-th source by default; the others, which end at the same limits, with --all."""
    slow = pytest.mark.slow
    return [
        source if number % n == 0 else pytest.param(source, marks=slow)
        for number, source in enumerate(sources)
    ]


def doubling(start, step):
    return DOUBLE.replace("START", start).replace("NEXT", step)


# What took minutes, and what took 0.5 to 24 GB, before templates had a process of their own.
SLOW = [
    "{{ 7**26000000 }}",
    "{% set s, t = 'a' * 999999, 'bcdefgh' * 99999 %}"
    "{% for i in range(9999) %}{{ s.strip(t) == t }}{% endfor %}",
    "{% set s = range(100000)|list * 10 %}{% for i in range(9999) %}{{ 'x' in s }}{% endfor %}",
    "{% set r = range(100000) %}{% for i in r %}{% for j in r if false %}{% endfor %}{% endfor %}",
]
LARGE = [
    "{{ range(99999)|list|tojson(separators=('a' * 90000, 'b')) }}",
    "{{ strftime_now('%999d' * 400000) }}",
    "{{ ('%999s' * 900000) % (('a',) * 900000) }}",
    "{{ (range(100000)|list * 300)|sort|length }}",
    "{{ (' a' * 30000000).split()|length }}",
    "{{ 'a' * 10**9 }}",
]


ENDLESS_OR_LARGE = [
    LOOP * 3 + "{% endfor %}" * 3,
    LOOP + "x" * 10000 + "{% endfor %}",
    "{% set z %}" + LOOP + "x" * 10000 + "{% endfor %}{% endset %}{{ z|length }}",
    "{% macro m() %}" + LOOP + "x" * 10000 + "{% endfor %}{% endmacro %}{{ m()|length }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(100000) recursive %}{{ loop(range(100000)) }}{% endfor %}",
    "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * [1] }}",
    "{{ (1, 2) * 10**9 }}",
    "{{ 9**(9**9) }}",
    "{{ (9**9**9)**9**9 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%.1000000000f' % 1.5 }}",
    "{{ 'a'|center(10**9) }}",
    "{{ 'a'.center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ '1'.zfill(10**9) }}",
    "{{ ('\t' * 10000).expandtabs(10**6) }}",
    "{{ ('a\n' * 99999)|indent(99999) }}",
    "{{ 'a'|indent('b' * 9999999) }}",
    "{{ ('a' * 99999)|replace('a', 'b' * 99999) }}",
    "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "{{ ('a' * 99999).replace('', 'b' * 99999) }}",
    "{{ ('a' * 99999)|replace('', 'b' * 99999) }}",
    "{{ ('a' * 99999)|join('b' * 99999) }}",
    "{{ ('b' * 99999).join('a' * 99999) }}",
    "{{ ('b' * 99999).join(range(99999)|map('string')) }}",
    "{{ [1]|batch(10**9, 'x')|list }}",
    "{{ ['a']|map('center', 10**9)|list }}",
    "{{ lipsum(n=10**9) }}",
    "{{ 5|round(10**9) }}",
    "{{ messages|tojson(indent=10**9) }}",
    "{{ strftime_now('%1000000000d') }}",
    "{{ [[1]]|sum(start=[]) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ ('a' * 9999999) ~ ('b' * 9999999) }}",
    doubling("'a'", "ns.x + ns.x"),
    doubling("'a'", "ns.x ~ ns.x"),
    doubling("[1]", "[ns.x, ns.x]"),
    doubling("(1,)", "(ns.x, ns.x)"),
    doubling("[1]", "[ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y]").replace(
        "ns.x == ns.x", "ns.x == ns.y"
    ),
    "{% set r = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] %}" + "{% for i in r %}" * 12 + "{% endfor %}" * 12,
    doubling("{}", "{1: ns.x, 2: ns.x}"),
    doubling("{}", "dict(a=ns.x, b=ns.x)"),
    doubling("[1]", "ns.x * 2"),
    doubling("2", "ns.x * ns.x"),
    doubling("'a'", "ns.x|replace('a', 'aa')"),
    doubling("'a'", "(ns.x, ns.x)|join"),
    doubling("(1,)", "{ns.x: 1}"),
    "{% macro m() %}{% set ns.v = varargs %}{% endmacro %}{% set ns = namespace(v=1) %}{% for i in range(60) %}{{ m(ns.v, ns.v) }}{% endfor %}{{ ns.v }}",
    CHAIN + "{{ n0 ~ '' }}",
    CHAIN + "{{ n0|string }}",
    CHAIN + "{{ '%s' % n0 }}",
    CHAIN + "{{ [n0] }}",
    CHAIN + "{{ {'a': n0} }}",
    "".join(f"{{% set a{i} = 'a' * 999999 %}}" for i in range(1000)),
    "{{ 'a' * 9999999 }}" * 2,
    "x" * (chat_template.LARGEST_TEMPLATE + 1),
    "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "{{ " + "[" * 9999 + " }}",
    "{% for i in [1] %}" * 500 + "{% endfor %}" * 500,
    "{% for i in [1] %}" * 25 + "{% endfor %}" * 25,
    "{{ 1" + "+1" * 20000 + " }}",
    "{% if 0 %}" + "{% elif 0 %}" * 3000 + "{% endif %}",
    "{%" * 20000,
    "{#" * 20000,
    "{{ " + "1" * 60000 + " }}",
    "{{ range(100000)|map('string')|join|int }}",
]


@pytest.mark.parametrize("source", one_in(3, ENDLESS_OR_LARGE))
def test_a_template_cannot_run_forever_or_fill_the_memory(source):
    start = time.monotonic()
    try:
        text = render(source, 0.2)
    except npllm.NpllmError as error:
        assert "Errno" not in str(error)
    else:
        assert len(text) < 1000
    assert time.monotonic() - start < 10  # 0.2 s, and what a busy machine takes to start and stop


TOO_LONG = "it takes more than the 5 seconds that a chat template may take"
TOO_LARGE = "it needs more than the 256 MB of memory that a chat template may use"


@pytest.mark.parametrize("source", one_in(2, SLOW))
def test_what_takes_too_long_is_refused(source):
    assert refusal(source, 0.2) == f"the chat template failed: {TOO_LONG}"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
@pytest.mark.parametrize("source", one_in(3, LARGE))
def test_what_needs_too_much_memory_is_refused(source):
    assert refusal(source, 30) == f"the chat template failed: {TOO_LARGE}"


@pytest.mark.slow
def test_a_template_has_five_seconds():
    start = time.monotonic()
    with pytest.raises(npllm.NpllmError, match="5 seconds"):
        chat_template.render(SLOW[0], MESSAGES, NAMES)
    assert 5 <= time.monotonic() - start < 10


def test_a_template_is_allowed_five_seconds(monkeypatch):
    given = []
    monkeypatch.setattr(
        chat_template.process,
        "ask",
        lambda _, allowance: given.append(allowance.left) or {"text": "x"},
    )
    assert chat_template.render("x", MESSAGES, NAMES) == "x" and given == [5]


WATCHED = """
import json, resource, sys, time
from npllm import NpllmError
from npllm.text.chat_template import render
slowest = 0
for source in json.load(sys.stdin):
    start = time.monotonic()
    try:
        render(source, [], {})
    except NpllmError:
        pass
    slowest = max(slowest, time.monotonic() - start)
from npllm.text.template_process import process
process.stop()
peak = [resource.getrusage(who).ru_maxrss for who in
        (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps([slowest, *peak]))
"""


def watched(sources):
    """Render templates in a new process; slowest rendering, its peak memory and its child's, in
    seconds and bytes.
    """
    done = subprocess.run(
        [sys.executable, "-c", WATCHED],
        input=json.dumps(sources),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    slowest, own, child = json.loads(done.stdout)
    return slowest, own * 1024, child * 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
def test_memory_and_time_as_seen_from_outside():
    _, own, _ = watched(["x"])
    slowest, peak, child = watched([*LARGE, SLOW[0], "{{ '\U0001f642' * 9999999 }}"])
    assert child <= template_process.LARGEST_MEMORY
    assert peak - own < 200e6  # of npllm itself: the longest answer, as bytes and as text
    assert slowest < 2 * template_process.DEADLINE  # 5 s, and a busy machine


def test_the_answer_of_a_template_is_bounded():
    assert len(render("{{ 'x' * 9999999 }}")) == 9_999_999
    words = refusal("{{ 'x' * 9999999 }}{{ 'x' * 9999999 }}")
    assert words.startswith(
        "the chat template failed: it writes 19999998 characters, more than the 1000"
    )


def test_a_template_of_too_many_characters_is_refused():
    assert (
        refusal("x" * 70000)
        == "the chat template has 70000 characters; more than 65536 are refused"
    )


def test_what_a_template_says_is_printed_safely():
    assert refusal("{{ raise_exception('no \x1b[31m\n way') }}") == (
        r"the chat template failed: TemplateError: no \x1b[31m\n way"
    )


# ------------------------------------------------------------------------------ what works


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            "{% for m in messages[1:] %}{{ m.role ~ ':' + m['content']|trim }}{% endfor %}",
            "assistant:hello",
        ),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "2",
        ),
        ("{% macro f(x, y=2) %}{{ x }}{{ y }}{% endmacro %}{{ f(1) }}{{ f(3, y=4) }}", "1234"),
        (
            "{% for m in messages %}{{ loop.index }}{% if loop.first %}{% continue %}{% endif %}x{% break %}{% endfor %}",
            "12x",
        ),
        ("{{ messages|map(attribute='role')|join(',') }}", "user,assistant"),
        ("{{ messages|selectattr('role', 'equalto', 'user')|list|length }}", "1"),
        ("{{ 'a<b>' | tojson }}", '"a<b>"'),
        ("{{ {'a': [1, 'é']} | tojson(indent=2) }}", '{\n  "a": [\n    1,\n    "é"\n  ]\n}'),
        ("{{ 'a,b'.split(',')[-1].upper() }}{{ 'abc'[::-1] }}{{ '%05.1f' % 2.5 }}", "Bcba002.5"),
        (
            "{{ 'x'.join(['a', 'b']) }}{{ 'aba'.replace('a', 'cc') }}{{ 'aba'|replace('b', '-') }}",
            "axbccbcca-a",
        ),
        (
            "{{ 2 ** 10 + 7 // 2 - 7 % 4 }}{{ [1, 2] + [3] }}{{ 'ab' * 2 }}{{ -1.5 }}",
            "1024[1, 2, 3]abab-1.5",
        ),
        (
            "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ (1, 2)|first }}{{ 'a'|default('b') }}{{ nothing|default('c') }}",
            "a11ac",
        ),
        (
            "{{ bos_token }}{{ add_generation_prompt }}{{ 'a' in 'abc' }}{{ messages[0]['missing'] }}",
            "<s>TrueTrue",
        ),
        (
            "{% set ns = namespace(a=1) %}{% set ns.a %}x{% endset %}{% set ns.b, y = 2, 3 %}{{ ns.a }}{{ ns.b }}{{ y }}",
            "x23",
        ),
        (
            "{% set x %}a{{ 1 }}{% endset %}{{ x }}{% filter upper %}b{% endfilter %}{% if messages is iterable %}c{% endif %}",
            "a1Bc",
        ),
        ("{{ 'a\nb'|indent(2) }}{% call(x) f() %}{% endcall %}", None),
        ("{{ strftime_now('%Y')|length }}", "4"),
        ("{% generation %}a{% if true %}b{% endif %}{% endgeneration %}c", "abc"),
        ("{%- generation -%} a {%- endgeneration -%} c", "ac"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        (
            "{% for m in messages %}{% generation %}{{ loop.index ~ m.role }}{% endgeneration %}"
            "{% endfor %}",
            "1user2assistant",
        ),
        ("{{ '{:>3}'.format('a') }}{{ 'a'.center(3) }}{{ 'a'|center(3) }}", "  a a  a "),
        ("{{ 'é\n\u2028\U0001f642' }}", "é\n\u2028\U0001f642"),
    ],
)
def test_what_templates_use_still_works(source, text):
    if text is None:
        assert "is undefined" in refusal(source)
    else:
        assert render(source) == text


def test_a_long_conversation_is_no_attack():
    long = [{"role": "user", "content": "word " * 2000}] * 200
    text = chat_template.render(fuzz.PHI3_TEMPLATE, long, {"add_generation_prompt": True})
    assert len(text) > 2_000_000
    grows = (
        "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = ns.x + m.content %}"
        "{% endfor %}{{ ns.x|trim }}"
    )
    assert len(chat_template.render(grows, long, {})) == 1_999_999
    twice = "{{ messages[0].content ~ messages[0].content|length }}"
    text = chat_template.render(twice, [{"role": "user", "content": "x" * 12_000_000}], {})
    assert len(text) == 12_000_008


def test_any_text_passes_unchanged():
    text = "\ud800\udfff a\r\n\x00\u2028\x85 é日本\U0001f642 \\n"
    messages = [{"role": "user", "content": text}]
    assert chat_template.render("{{ messages[0].content }}", messages, {}) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.int64(5), "6"),
        (np.float32(0.5), "1.5"),
        (np.float64(0.5), "1.5"),
        (np.uint8(255), "256"),
        (np.bool_(True), "2"),
        (np.array([5])[0], "6"),
    ],
)
def test_numpy_scalars_are_numbers(value, text):
    messages = [{"role": "user", "content": "x", "n": value}]
    assert chat_template.render("{{ messages[0].n + 1 }}", messages, {}) == text
    assert chat_template.render("{{ n + 1 }}", MESSAGES, {"n": value}) == text


@pytest.mark.parametrize(
    "value", [b"x", object(), {1, 2}, np.zeros(3), np.bytes_(b"x"), {(1, 2): 3}, [10**5000]]
)
def test_what_json_cannot_hold_is_refused(value):
    with pytest.raises(npllm.NpllmError, match="messages and tools must be what JSON can hold"):
        chat_template.render("x", [{"role": "user", "content": value}], {})


def test_a_conversation_that_holds_itself_is_refused():
    messages = [{"role": "user", "content": []}]
    messages[0]["content"].append(messages)
    with pytest.raises(npllm.NpllmError, match="messages and tools must be what JSON can hold"):
        chat_template.render("x", messages, {})


# ------------------------------------------------------------------------------ fuzz


@settings(max_examples=draws(60, 200), deadline=None)
@given(source=st.lists(st.sampled_from(fuzz.SNIPPETS), min_size=1, max_size=8).map("".join))
def test_templates_of_pieces(source):
    error = fuzz.attempt(lambda: render(source, 0.3))
    assert error is None or isinstance(error, npllm.NpllmError)
