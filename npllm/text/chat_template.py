"""Chat templates: Jinja from a stranger, run within limits.

A template comes with the checkpoint, and anybody can publish one.  Jinja's sandbox keeps it away
from Python's internals, but not from work without end: `'a' * 10**9`, loops in loops, a string that
doubles.  So here a template has an allowance, and pays from it for every step (entering a block,
one item of a filter) and for every value it makes, by its size.  Values are weighed with all that
they hold, counted as often as they hold it, so that no small list stands for a huge text.  An
operation whose result can be larger than what it is made of is estimated before it runs (`*`, `**`,
join, replace, indent), or is not there (center, format).  There is a deadline as well.

What this does not do: it bounds memory to some 100 MB and time to some seconds, no less, and it
cannot help against a fault in Python or Jinja themselves.
"""

import copy
import functools
import json
import re
import time
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from datetime import datetime

import jinja2
from jinja2.compiler import CodeGenerator
from jinja2.ext import loopcontrols
from jinja2.nodes import Slice
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from npllm.config.strict_json import printable
from npllm.errors import NpllmValueError

__all__ = ["LARGEST_TEMPLATE", "render"]

LARGEST_TEMPLATE = 2**16  # characters; the longest published ones have some 20,000
ALLOWANCE = (
    10**7
)  # characters and steps, and PER_CHARACTER more for each character of the conversation
PER_CHARACTER = 200
PER_ITEM = 16  # characters that an item of a list counts for
DEADLINE = 5.0  # seconds
WIDTH = re.compile(r"\d{4}|\*")  # in a % format: a width beyond 999

SIZED = (str, bytes, list, tuple, dict, set, frozenset, range, KeysView, ValuesView, ItemsView)
STRING_METHODS = frozenset(
    """
    capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric
    isprintable isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit
    rstrip split splitlines startswith strip swapcase title upper
""".split()
)
FILTERS = """
    abs attr capitalize count d default dictsort e escape first float forceescape groupby indent int items join last length list
    lower map max min reject rejectattr replace reverse safe select selectattr sort string title trim truncate unique upper
    urlencode wordcount
""".split()


def render(source, messages, names):
    """Write a conversation with a chat template.

    Parameters
    ----------
    source : str
        Jinja source.
    messages : list of dict
    names : dict
        What else the template sees: bos_token, add_generation_prompt, ...

    Returns
    -------
    text : str

    Raises
    ------
    NpllmValueError
        When the template is too long, is no Jinja, fails, refuses, reaches for what is not allowed,
        or asks for too much work.

    Notes
    -----
    Source: `render_jinja_template` in Transformers (trim_blocks, lstrip_blocks, loop controls, a
    tojson that escapes nothing).
    """
    if len(source) > LARGEST_TEMPLATE:
        raise NpllmValueError(
            f"the chat template has {len(source)} characters; more than {LARGEST_TEMPLATE} are refused"
        )
    try:
        sandbox = _Sandbox(ALLOWANCE + PER_CHARACTER * _weigh(messages, ALLOWANCE))
        return sandbox.from_string(source).render(messages=copy.deepcopy(messages), **names)
    except Exception as error:  # whatever the template does wrong
        raise NpllmValueError(
            f"the chat template failed: {type(error).__name__}: {printable(str(error)[:300])}"
        ) from None


def _paid(visit):
    """Let the code of a node hand its value to the sandbox before it is used."""

    def paid(self, node, frame):
        wraps = getattr(node, "ctx", "load") == "load" and (
            not hasattr(node, "arg") or isinstance(node.arg, Slice)
        )
        self.write("environment.paid(" if wraps else "")
        visit(self, node, frame)
        self.write(")" if wraps else "")

    return paid


class _Compiler(CodeGenerator):
    """Writes the Python code of a template, with a payment in every block and around every value
    that is built in place.
    """

    def blockvisit(self, nodes, frame):
        self.writeline("environment.spend(1)")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node, frame):  # a ~ b
        self.write("environment.concat((")
        for part in node.nodes:
            self.write("environment.written(")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")

    def visit_NSRef(
        self, node, frame
    ):  # a.b as the target of set; Jinja 3.1.6 forgets to check it in {% set a.b %}...{% endset %}
        self.write(f"environment.namespace({frame.symbols.ref(node.name)})[{node.attr!r}]")

    visit_List, visit_Tuple, visit_Dict, visit_Getitem = map(
        _paid,
        (
            CodeGenerator.visit_List,
            CodeGenerator.visit_Tuple,
            CodeGenerator.visit_Dict,
            CodeGenerator.visit_Getitem,
        ),
    )


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with an allowance; for one rendering."""

    code_generator_class = _Compiler
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, allowance):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols],
            finalize=self.written,
            cache_size=0,
        )
        self.allowance, self.left, self.deadline = allowance, allowance, time.monotonic() + DEADLINE
        self.filters = {
            name: self._limited(self.filters[name], SIZES.get(name)) for name in FILTERS
        }
        self.filters["tojson"] = self._limited(_tojson)
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        del self.globals["lipsum"]

    def spend(self, amount):
        """Take steps or characters from the allowance."""
        self.left -= amount
        if self.left < 0:
            raise SecurityError(
                f"it asks for more than the {self.allowance} characters and steps that a chat template may use for "
                "this conversation"
            )
        if time.monotonic() > self.deadline:
            raise SecurityError(
                f"it takes more than the {DEADLINE:g} seconds that a chat template may take"
            )

    def require(self, size):
        """Raise unless a value of that size could still be paid."""
        if size > self.left:
            self.spend(size)

    def paid(self, value):
        """Pay for a new value; refuse it where it holds too much, counted with repetitions."""
        if isinstance(value, Namespace):
            return value
        if isinstance(value, Iterator):
            return self._steps(value)
        self.require(_weigh(value, self.left))
        self.spend(_own_size(value))
        return value

    def namespace(self, value):
        """Let nothing but a namespace be written into: not the conversation."""
        if not isinstance(value, Namespace):
            raise SecurityError(
                f"cannot set an attribute of {type(value).__name__!r}, only of a namespace"
            )
        return value

    def _steps(self, items):
        for item in items:
            self.spend(1)
            yield item

    def written(self, value):
        """Text of a value that is put out."""
        self.require(_weigh(value, self.left))
        text = value if isinstance(value, str) else str(value)
        self.spend(len(text))
        return text

    def concat(self, pieces):
        """Join what was put out; Jinja calls it at the end of every macro and of the whole."""
        pieces = list(pieces)
        self.spend(sum(map(len, pieces)))
        return "".join(pieces)

    def is_safe_attribute(self, obj, attr, value):
        """Tell whether a template may use an attribute; of text and numbers, only methods that keep
        within its size.
        """
        allowed = not isinstance(obj, int | float | bytes) and (
            attr in STRING_METHODS or not isinstance(obj, str)
        )
        return allowed and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value):  # noqa: ARG002 - str.format is no safe attribute here, and needs no wrapper
        return None

    def call_binop(self, context, operator, left, right):
        """Compute left operator right."""
        self.require(_operation_size(operator, left, right, self.left))
        return self.paid(super().call_binop(context, operator, left, right))

    def call(self, context, function, *args, **kwargs):
        """Call a method, a macro or a global function."""
        args = [list(self._steps(x)) if isinstance(x, Iterator) else x for x in args]
        for value in (*args, *kwargs.values()):
            self.require(0 if isinstance(value, Namespace) else _weigh(value, self.left))
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str) and name == "join" and len(args) == 1:
            self.require(_join_size(args[0], owner))
        elif isinstance(owner, str) and name == "replace":
            self.require(_replace_size(owner, *args, **kwargs))
        return self.paid(super().call(context, function, *args, **kwargs))

    def _limited(self, function, size=None):
        """Let a filter weigh what it is given and pay for what it makes."""

        @functools.wraps(function)
        def limited(*args, **kwargs):
            args = [list(self._steps(x)) if isinstance(x, Iterator) else x for x in args]
            for value in (*args, *kwargs.values()):
                self.require(_weigh(value, self.left))
            if size:
                n_passed = hasattr(function, "jinja_pass_arg")  # the context comes first
                self.require(size(*args[n_passed:], **kwargs))
            return self.paid(function(*args, **kwargs))

        return limited


def _weigh(value, most):
    """Size of a value and of all that it holds, counted as often as it holds it; counting stops
    above `most`.
    """
    total, rest = 0, [value]
    while rest and total <= most:
        value = rest.pop()
        total += PER_ITEM + _own_size(value)
        if isinstance(value, dict):
            rest += value.keys()
            rest += value.values()
        elif isinstance(value, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
            rest += value
        elif isinstance(value, Namespace):
            raise SecurityError("a namespace can be neither an item nor be written out")
    return total


def _own_size(value):
    """Characters, items or bytes of a value by itself."""
    if isinstance(value, int):
        return value.bit_length() // 8
    return len(value) if isinstance(value, SIZED) else 0


def _operation_size(operator, left, right, most):
    """How large the result of a binary operation can be."""
    size = _weigh(left, most) + _weigh(right, most)
    if operator == "*":
        text, number = (left, right) if isinstance(right, int) else (right, left)
        if isinstance(text, str) and isinstance(number, int):
            return len(text) * max(number, 0)
        return (
            _weigh(text, most) * max(number, 0)
            if isinstance(text, list | tuple) and isinstance(number, int)
            else size
        )
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * max(right, 0) // 8
    if operator == "%" and isinstance(left, str) and WIDTH.search(left):
        raise SecurityError(
            f"a width of more than 999, or a variable one, in the format {left[:50]!r}"
        )
    return size


def _join_size(items, separator="", *_, **__):
    """How large a joined text can be."""
    return _weigh(items, ALLOWANCE) + len(items) * len(str(separator))


def _replace_size(text, old, new, *_, **__):
    """How large a text with replacements can be."""
    text = str(text)
    return len(text) + (text.count(str(old))) * len(str(new))


def _indent_size(text, width=4, *_, **__):
    """How large an indented text can be.  Of a list, Jinja's filter would write into the list
    itself.
    """
    if not isinstance(text, str):
        raise SecurityError(f"indent: expected a text, got {type(text).__name__!r}")
    width = width if isinstance(width, int) else len(width)
    return len(text) + (len(text.splitlines()) + 1) * width


SIZES = {"join": _join_size, "replace": _replace_size, "indent": _indent_size}


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Write a value as JSON, as Transformers' templates expect it: nothing is escaped for HTML."""
    if indent is not None and indent not in range(17):
        raise SecurityError(f"tojson: indent must be 0 ... 16, got {indent!r}")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(date_format):
    """Write today's date, for templates that tell it to the model."""
    if WIDTH.search(date_format):
        raise SecurityError(
            f"strftime_now: a width of more than 999 in the format {date_format[:50]!r}"
        )
    return datetime.now().strftime(date_format)


def _raise_exception(message):
    raise jinja2.TemplateError(message)
