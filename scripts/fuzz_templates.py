#!/usr/bin/env python
"""Draw chat templates, and render them: limits must hold, and only NpllmError may come out.

    python scripts/fuzz.py --mode template --n 50000 [--seed 0] [--only 4711]

A case is a function of (seed, number): a program of nested blocks and expressions, drawn from
Jinja's grammar with values and names that have been used against templates (large numbers and
repetitions, sorting, formatting, private attributes).  It fails when anything but an NpllmError
comes out, when the time or the memory of the rendering process exceeds its limits as seen from
here, when the conversation is changed, when a secret of this process's environment is written, or
when a new process renders another text than a used one.
"""

import contextlib
import copy
import os
import random
import re
import threading
import time
from pathlib import Path

import npllm
from npllm.text import chat_template, template_process
from npllm.text.template_process import Allowance, TemplateProcess

SECONDS = 0.1  # that most cases get; each hundredth gets 1 s, each thousandth all of DEADLINE
SLACK = 5.0  # seconds to start and stop a process on a busy machine
LIMITS = {"template": (template_process.DEADLINE + 3 * SLACK, 256 << 20)}  # of this process
POLL_SECONDS = 0.005
CHANGES_BY_ITSELF = re.compile("random|now|0x|set")  # what two renderings may write differently

MESSAGES = [
    {"role": "system", "content": "be nice"},
    {"role": "user", "content": "hi <b>there</b> 🙂", "tool_calls": [{"name": "f", "n": [1, 2]}]},
    {"role": "assistant", "content": [{"type": "text", "text": "hello"}]},
    {"role": "user", "content": "what is 1 + 1?"},
]
NAMES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "tools": [{"type": "function", "function": {"name": "add"}}],
    "documents": None,
    "add_generation_prompt": True,
}
NUMBERS = [
    "0",
    "1",
    "2",
    "-1",
    "7",
    "1.5",
    "1e308",
    "99",
    "1000",
    "99999",
    "10**7",
    "10**9",
    "2**64",
]
TEXTS = [
    "''",
    "'a'",
    "'ab' * 9",
    "'x' * 9999",
    "'a b\\n' * 9999",
    "'%s'",
    "'%999d'",
    "'%9999999d'",
    "'{:>99999999}'",
    "'{0.__class__}'",
    "'é🙂'",
    "'<|end|>'",
    "'\\x00'",
    "'%Y-%m-%d'",
    "'role'",
]
VARIABLES = [
    "messages", "messages[0]", "messages[1].content", "m", "m.content",
    "m['role']", "loop", "x", "y",
    "ns", "ns.v", "tools", "bos_token", "loop.index", "loop.last", "nothing", "caller", "varargs",
    "range(9)", "range(99999)", "dict(a=1)", "cycler(1, 2)", "joiner()", "self",
    "f", "namespace", "lipsum", "strftime_now", "true", "none",
]  # fmt: skip
ATTRIBUTES = [
    "content", "role", "items()", "keys()", "split()", "strip('a')", "upper()", "join(messages)",
    "__class__", "__init__.__globals__", "__mro__", "mro()", "gi_frame.f_back", "format(1)",
    "format_map({'a': 1})", "encode()", "center(10**8)", "ljust(999)", "zfill(10**9)", "v",
    "replace('a', 'b' * 9999)", "splitlines()", "update({'a': 1})", "append(1)", "pop()", "next()",
    "translate({97: 'b' * 9999})", "expandtabs(10**6)", "partition('b')", "to_bytes(9, 'big')",
    "__subclasses__()", "__dict__", "__call__.__globals__", "environment", "environ", "get('role')",
]  # fmt: skip
FILTERS = [
    "abs", "attr('__class__')", "attr('content')", "batch(3)", "batch(10**8, 'x')", "capitalize",
    "center(99999)", "count", "default('d')", "dictsort", "escape", "filesizeformat", "first",
    "float", "forceescape", "format(1, 2)", "groupby('role')", "indent(9999)", "int", "items",
    "join(', ')", "join('x' * 9999)", "last", "length", "list", "lower", "map('upper')",
    "map(attribute='content')", "max", "min", "pprint",
    "random", "reject", "rejectattr('n')", "replace('a', 'b' * 999)",
    "reverse", "round(9)", "safe", "select", "selectattr('role', 'equalto', 'user')", "slice(3)",
    "sort", "string", "striptags", "sum", "title",
    "tojson", "tojson(indent=2)", "tojson(indent=10**8)",
    "tojson(separators=('a' * 9999, 'b'))", "trim", "trim('ab' * 9999)", "truncate(9)", "unique",
    "upper", "urlencode", "urlize", "wordcount", "wordwrap(1)", "xmlattr", "sort(attribute='role')",
]  # fmt: skip
TESTS = [
    "defined", "none", "string", "mapping", "iterable", "sequence", "number", "odd", "callable",
    "divisibleby(3)", "in messages", "sameas(x)", "escaped", "filter", "equalto('user')",
]  # fmt: skip
OPERATORS = ["+", "-", "*", "**", "/", "//", "%", "~", "==", "<", "in", "not in", "and", "or"]


LISTS = ["messages", "[1, 2]", "range(9)|list", "range(99999)|list", "[x] * 9", "tools"]
LARGE = [
    "'x' * 10**7", "range(99999)|list * 99", "7**10**6", "'x' * 10**9",
    "[x] * 10**8", "(1,) * 10**7",
    "range(99999)|list|tojson", "range(99999)|join", "'a b' * 10**6", "'%999d' * 99999",
]  # fmt: skip
TYPED = [
    (NUMBERS, ["+", "-", "*", "**", "/", "//", "%", "<", "=="]),
    (TEXTS, ["+", "~", "==", "<", "in"]),
    (LISTS, ["+", "~", "==", "in"]),
    (LARGE, ["~", "==", "and"]),
]
PRELUDE = (
    "{% set x = VALUE %}{% set y = 'ab' %}{% set ns = namespace(v=1) %}{% set m = messages[0] %}"
    "{% macro f(x) %}{{ x }}{% endmacro %}"
)


def expression(rng: random.Random, depth: int) -> str:
    """Draw an expression."""
    kind = rng.randrange(14) if depth > 0 else rng.randrange(4)
    if kind < 2:
        return rng.choice(VARIABLES)
    if kind == 2:
        return rng.choice(NUMBERS)
    if kind == 3:
        return rng.choice(TEXTS)
    first = expression(rng, depth - 1)
    if kind < 7:
        return f"({first})|{rng.choice(FILTERS)}"
    if kind == 7:
        return f"({first}).{rng.choice(ATTRIBUTES)}"
    if kind == 8:
        return f"({first}) is {rng.choice(TESTS)}"
    second = expression(rng, depth - 1)
    if kind < 11 and rng.random() < 0.6:  # of one type: fewer programs fail at once
        values, operators = rng.choice(TYPED)
        return f"({rng.choice(values)} {rng.choice(operators)} {rng.choice(values)})"
    if kind < 11:
        return f"({first} {rng.choice(OPERATORS)} {second})"
    if kind == 11:
        return rng.choice(
            [
                f"[{first}, {second}]",
                f"({first}, {second})",
                f"{{{first}: {second}}}",
                f"[{first}] * 99",
            ]
        )
    if kind == 12:
        return f"({first})[{rng.choice([second, '::-1', '0', '1:', ':9'])}]"
    return rng.choice([f"({first} if {second} else 1)", f"f({first})", f"dict(a={first})"])


def block(rng: random.Random, depth: int) -> str:
    """Draw a block with what it holds."""
    value = expression(rng, 2)
    if depth == 0:
        return (
            rng.choice(["{{ %s }}", "{{ %s }}", "text {{- %s -}} text", "{%% set x = %s %%}"])
            % value
        )
    body = "".join(block(rng, depth - 1) for _ in range(rng.choice([1, 1, 2, 3])))
    return rng.choice(BLOCKS).replace("VALUE", value).replace("BODY", body)


LEAVES = ["{{ VALUE }}", "{{ VALUE }}", "text {{- VALUE -}} text", "{% set x = VALUE %}"]
BLOCKS = [
    "{% for m in messages %}BODY{% endfor %}",
    "{% for m in VALUE %}BODY{% else %}none{% endfor %}",
    "{% for m in range(300) %}BODY{% endfor %}",
    "{% for m in messages if VALUE %}BODY{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    "{% for m in messages recursive %}BODY"
    "{% if loop.depth < 9 %}{{ loop(messages) }}{% endif %}{% endfor %}",
    "{% if VALUE %}BODY{% elif x %}BODY{% else %}{{ x }}{% endif %}",
    "{% set x %}BODY{% endset %}{{ x }}",
    "{% set ns = namespace(v=VALUE) %}{% for m in range(40) %}{% set ns.v = [ns.v, ns.v] %}"
    "{% endfor %}BODY",
    "{% set ns = namespace(v='a') %}{% for m in range(60) %}{% set ns.v = ns.v ~ ns.v %}"
    "BODY{% endfor %}",
    "{% set ns = namespace(v=1) %}{% set ns.v = VALUE %}BODY{{ ns.v }}",
    "{% macro f(x, y=VALUE) %}BODY{{ caller is defined }}{% endmacro %}"
    "{{ f(1) }}{{ f(VALUE, y=2) }}",
    "{% macro f(x) %}BODY{{ f(x) }}{% endmacro %}{{ f(VALUE) }}",
    "{% macro f(x) %}{{ caller(x) }}{% endmacro %}{% call(m) f(VALUE) %}BODY{% endcall %}",
    "{% filter upper %}BODY{% endfilter %}",
    "{% filter replace('a', 'b' * 99) %}BODY{% endfilter %}",
    "{% generation %}BODY{% endgeneration %}",
    "{% with x = VALUE %}BODY{% endwith %}",
    "{% set x, y = VALUE, 1 %}BODY{{ y }}",
    "{% block b %}BODY{% endblock %}",
    "{% autoescape true %}BODY{% endautoescape %}",
    "{% raw %}{{ }}{% endraw %}BODY{# VALUE #}",
    "{% set m = messages[0] %}{% set m.content %}BODY{% endset %}{{ m }}",
    "{% include VALUE %}BODY",
    "{{ raise_exception(VALUE) }}BODY",
    "{{ strftime_now(VALUE) }}BODY",
    "{{ 7 ** (10**VALUE) }}BODY",
]  # fmt: skip


def program(rng: random.Random) -> str:
    """Draw a template; a few are cut or spliced."""
    source = "".join(block(rng, rng.randrange(4)) for _ in range(rng.choice([1, 1, 2, 3])))
    if rng.random() < 0.8:
        source = PRELUDE.replace("VALUE", expression(rng, 1)) + source
    if rng.random() < 0.05:
        at = rng.randrange(len(source) + 1)
        source = source[:at] + rng.choice(["", "{%", "}}", "\ud800", "\0", "'"]) + source[at + 1 :]
    return source


class Watch:
    """The peak memory of the process that renders, as seen from another one."""

    def __init__(self) -> None:
        self.peak = 0
        self._stopped = threading.Event()
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            self.look()

    def look(self) -> None:
        """Take the largest resident size of the process so far."""
        process = template_process.process._process
        with contextlib.suppress(OSError, AttributeError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = re.search(r"VmHWM:\s+(\d+) kB", status)
            self.peak = max(self.peak, int(peak[1]) * 1024 if peak else 0)

    def stop(self) -> int:
        """End; return the peak in bytes."""
        self.look()
        self._stopped.set()
        return self.peak


class TemplateCases:
    """Cases of `fuzz.py --mode template`."""

    def __init__(self, seed: int, scratch: Path) -> None:
        self.seed = seed
        self.secret = f"secret {seed} of the environment"
        os.environ["NPLLM_FUZZ_SECRET"] = self.secret
        os.chdir(scratch)

    def run(self, number: int) -> str:
        """Render one template; return what came of it."""
        rng = random.Random(f"template {self.seed} {number}")
        source, messages = program(rng), copy.deepcopy(MESSAGES)
        allowance = Allowance(seconds_of(number))
        limit, start, watch = allowance.left + SLACK, time.monotonic(), Watch()
        try:
            text = chat_template.render(source, messages, NAMES, allowance)
        except npllm.NpllmError as error:
            text = str(error)
            outcome = category(text)
        else:
            outcome = "rendered"
        seconds, peak = time.monotonic() - start, watch.stop()
        if seconds > limit:
            raise RuntimeError(f"took {seconds:.1f} s, with {limit:.1f} s allowed")
        if peak > template_process.LARGEST_MEMORY:
            raise RuntimeError(f"the process that renders held {peak} bytes")
        if messages != MESSAGES or self.secret in text or any(Path().iterdir()):
            raise RuntimeError("the template has left its sandbox")
        if outcome != "rendered" and not text.isprintable():
            raise RuntimeError(f"the message cannot be printed safely: {text!a}")
        if number % 100 == 0 and outcome == "rendered":
            self.compare(source, text)
        return outcome

    def compare(self, source: str, text: str) -> None:
        """Render again in a new process."""
        if CHANGES_BY_ITSELF.search(source + text):
            return
        shared, template_process_module = chat_template.process, TemplateProcess()
        chat_template.process = template_process_module
        try:
            if chat_template.render(source, MESSAGES, NAMES) != text:
                raise RuntimeError("a new process renders another text")
        finally:
            template_process_module.stop()
            chat_template.process = shared


def seconds_of(number: int) -> float:
    """Time that a case gets."""
    if number % 1000 == 999:
        return template_process.DEADLINE
    return 1.0 if number % 100 == 99 else SECONDS


def category(text: str) -> str:
    """Name an error by its first words, without names and numbers."""
    words = re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "#", text.removeprefix("the chat template failed: "))
    return words.split("(")[0][:70].strip()


MODES = {"template": TemplateCases}
