"""The process in which a chat template runs: a sandbox inside limits that the operating system enforces.

Started as a script by `ChatTemplate`. Each message on standard input and output is eight bytes of length and then
JSON: first {"template", "seconds", "bytes", "characters"}, then one object of variables for each answer, which is
{"text"} or {"error"}. The end of the input ends the process; a template that loops is ended by the kernel.
"""

import json
import math
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, BinaryIO

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

HEADER = struct.Struct(">Q")


class Generation(Extension):
    """`{% generation %} .. {% endgeneration %}` marks the assistant's text for training; here the marks are ignored."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        """Return a node that renders what is between the tags, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_words"), [], [], body).set_lineno(line)

    def _words(self, caller: Callable[[], str]) -> str:
        return caller()


class RefusedError(Exception):
    """Raised by `raise_exception` of a template."""


def raise_exception(message: object) -> None:
    """End the rendering with the template's own message."""
    raise RefusedError(str(message))


def strftime_now(form: str) -> str:
    """Return the local time in the notation of strftime."""
    return datetime.now().strftime(form)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return `value` as JSON, with the parameters and defaults that templates of the hub are written for."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> Environment:
    """Return the sandboxed environment that chat templates expect."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return env


def render(template: Template, variables: dict[str, Any], max_characters: int) -> dict[str, str]:
    """Return {"text": ...} or {"error": ...}; the text has at most `max_characters`."""
    pieces, length = [], 0
    try:
        for piece in template.generate(variables):
            length += len(piece)
            if length > max_characters:
                return {"error": f"writes more than {max_characters} characters"}
            pieces.append(piece)
    except RefusedError as refused:
        return {"error": f"refuses these messages: {refused}"}
    except MemoryError:
        pieces.clear()
        return {"error": "needs too much memory"}
    except RecursionError:
        return {"error": "calls itself without end"}
    except Exception as error:  # any exception of a template is the template's error
        return {"error": f"fails on these messages: {type(error).__name__}: {error}"}
    return {"text": "".join(pieces)}


def limit_processor_time(seconds: float) -> None:
    """Make the kernel end this process after `seconds` more of processor time, even without its parent."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds), hard))


def receive(file: BinaryIO) -> Any:
    """Return the next message, or None at the end of the input."""
    header = file.read(HEADER.size)
    return json.loads(file.read(HEADER.unpack(header)[0])) if len(header) == HEADER.size else None


def send(file: BinaryIO, message: Any) -> None:
    """Write a message."""
    payload = json.dumps(message).encode()
    file.write(HEADER.pack(len(payload)) + payload)
    file.flush()


def main() -> None:
    """Answer until the input ends."""
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    given, answers = sys.stdin.buffer, sys.stdout.buffer
    job = receive(given)
    if job is None:
        return
    resource.setrlimit(resource.RLIMIT_AS, (job["bytes"], job["bytes"]))
    limit_processor_time(job["seconds"])
    try:
        template: Template | str = environment().from_string(job["template"])
    except (TemplateError, RecursionError, MemoryError) as error:
        place = f" in line {line}" if (line := getattr(error, "lineno", None)) else ""
        template = f"is not valid{place}: {error}"
    while (variables := receive(given)) is not None:
        limit_processor_time(job["seconds"])
        if isinstance(template, str):
            send(answers, {"error": template})
        else:
            send(answers, render(template, variables, job["characters"]))


if __name__ == "__main__":
    main()
