"""The program of the process that renders chat templates.

It needs the standard library and Jinja only: `npllm.text.template_process` passes this source to
a Python interpreter, with the limits as arguments.  Requests and answers are lines of JSON:

    {"source", "messages", "names", "n_more"}  ->  {"text"} or {"error"}
"""

import contextlib
import functools
import json
import math
import os
import sys
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

OUT_OF_MEMORY = 3  # exit code


class Generation(Extension):
    """`{% generation %}` marks the assistant's text for training; here its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Scope:
        """Read the body, and put it in the place of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write a value as JSON; unlike Jinja's own filter it escapes nothing for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def strftime_now(date_format: str) -> str:
    """Write today's date, for templates that tell it to the model."""
    return datetime.now().strftime(date_format)


def raise_exception(message: Any) -> None:
    """Let a template refuse a conversation."""
    raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=1)
def compiled(source: str) -> jinja2.Template:
    """Compile a template; the last one is kept."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(source)


def answer(line: bytes) -> dict[str, str]:
    """Render what a request asks for."""
    try:
        request = json.loads(line)
        names = {**request["names"], "messages": request["messages"]}
        text = compiled(request["source"]).render(names)
    except MemoryError:
        raise
    except Exception as error:  # whatever the template does wrong
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    n_most = len(line) + request["n_more"]
    if len(text) > n_most:
        return {
            "error": f"it writes {len(text)} characters, more than the {n_most} that a chat "
            "template may write for this conversation"
        }
    return {"text": text}


def set_limit(name: str, value: int) -> None:
    """Set a limit of this process, where the platform has it."""
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):
        import resource

        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (soft, hard))


def limit_memory(n_bytes: int) -> None:
    """Limit the memory of this process: resident now, and mapped from now on."""
    mapped = resident = 0
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        mapped, resident = (int(n) * os.sysconf("SC_PAGESIZE") for n in file.read().split()[:2])
    set_limit("RLIMIT_AS", mapped - resident + n_bytes)


def limit_processor_time(seconds: float) -> None:
    """Limit the processor time from now on: this process ends even when its parent has died."""
    set_limit("RLIMIT_CPU", math.ceil(sum(os.times()[:2]) + seconds) + 1)


def main(seconds: float, n_bytes: int) -> None:
    """Answer requests until standard input ends."""
    for name in ("RLIMIT_CORE", "RLIMIT_FSIZE"):  # no core dumps, no files
        set_limit(name, 0)
    limit_memory(n_bytes)
    write({"text": "ready"})
    for line in sys.stdin.buffer:
        limit_processor_time(seconds)
        try:
            write(answer(line))
        except MemoryError:
            os._exit(OUT_OF_MEMORY)


def write(reply: dict[str, str]) -> None:
    """Write an answer as one line."""
    line = json.dumps(reply, ensure_ascii=False).encode("utf-8", "surrogatepass")
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
