"""ChatTemplate: a checkpoint's Jinja template, rendered in a process with limits.

A template is untrusted code. A sandbox protects the machine, but does not bound time: nested loops, doubled strings and
single operations on huge values all block the interpreter. Only a separate process can be stopped at any time. So there
is a small one for each template, which is replaced after it was killed.
"""

import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvloom.errors import ChatTemplateError, InvalidInputError

MAX_TEMPLATE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 1 << 24
MAX_WORKER_BYTES = 1 << 30
MAX_SECONDS = 5.0
"""Limits of one rendering: size of the template and of its output, address space, and processor time."""

_WORKER = Path(__file__).with_name("template_worker.py")
_HEADER = struct.Struct(">Q")
_PATIENCE_SECONDS = 60.0
"""Seconds of wall time to wait for an answer: far more than the processor time, whose limit ends a loop."""


def read_template(source: str) -> str:
    """Return the template in the file `source`, or `source` itself when it is written out; `InvalidInputError`."""
    if "{" in source:
        return source
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"cannot read the chat template {source}: {error}") from None


class ChatTemplate:
    """Turns a conversation into a prompt. Threads may share it; renderings wait for each other.

    The process starts with the first rendering (about a tenth of a second) and ends with the object.
    """

    def __init__(self, source: str, *, max_seconds: float = MAX_SECONDS) -> None:
        """Take the template's text; raises `ChatTemplateError` when it is too long."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ChatTemplateError(
                f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE_CHARS} are allowed"
            )
        self._max_seconds = max_seconds
        self._job = {
            "template": source,
            "seconds": max_seconds,
            "bytes": MAX_WORKER_BYTES,
            "characters": MAX_OUTPUT_CHARS,
        }
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[..., ChatTemplate] | None = None

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Return the prompt for `messages` ({"role": ..., "content": ...} each); `variables` are the template's.

        Raises `InvalidInputError` for messages that are not that, `ChatTemplateError` when the template is wrong,
        refuses the messages or exceeds a limit.
        """
        _check_messages(messages)
        given = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        payload = _message({"tools": None, "documents": None, **variables, **given})
        with self._lock:
            answer = self._ask(payload)
        if "error" in answer:
            raise ChatTemplateError(f"the chat template {answer['error']}")
        return answer["text"]

    def close(self) -> None:
        """End the process, if one runs; the next rendering starts another."""
        if self._finalizer is not None:
            self._finalizer()
        self._worker = self._finalizer = None

    def _start(self) -> subprocess.Popen[bytes]:
        worker = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C must not reach this process
        )
        self._worker, self._finalizer = worker, weakref.finalize(self, _end, worker)
        return worker

    def _ask(self, payload: bytes) -> dict[str, str]:
        worker = self._worker
        if worker is None or worker.poll() is not None:
            self.close()
            worker = self._start()
            payload = _message(self._job) + payload
        try:
            assert worker.stdin is not None
            _write(worker.stdin.fileno(), payload)
            answer: dict[str, str] = json.loads(_read_message(worker, time.monotonic() + _PATIENCE_SECONDS))
        except (EOFError, OSError, TimeoutError):
            reason = self._why_it_ended(worker)
            self.close()
            raise ChatTemplateError(f"the chat template {reason}") from None
        except BaseException:
            self.close()
            raise
        return answer

    def _why_it_ended(self, worker: subprocess.Popen[bytes]) -> str:
        """Return why there is no answer: still computing, killed by the kernel, or never able to run."""
        try:
            code = worker.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            code = -signal.SIGXCPU
        if code == -signal.SIGXCPU:
            return f"was stopped: it computed for more than {self._max_seconds:g} s. It probably loops; use another one"
        if code < 0:
            return f"was stopped by signal {-code}: it probably needs more than {MAX_WORKER_BYTES >> 20} MiB"
        return f"could not be run: its process ended with status {code}. Is jinja2 installed for {sys.executable}?"


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InvalidInputError("messages must be a list with at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidInputError(f"message {index} must be an object with a role; got {message!r:.100}")


def _message(value: dict[str, Any]) -> bytes:
    try:
        payload = json.dumps(value, default=_plain).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"messages and options of a chat template must be plain JSON values: {error}") from None
    return _HEADER.pack(len(payload)) + payload


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is none")


def _write(handle: int, payload: bytes) -> None:
    view = memoryview(payload)
    while view:
        view = view[os.write(handle, view) :]


def _read_message(worker: subprocess.Popen[bytes], deadline: float) -> bytes:
    """Return the worker's next message; raises `EOFError` when it died and `TimeoutError` at the deadline."""
    assert worker.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        data, length = bytearray(), _HEADER.size
        while len(data) < length:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            piece = worker.stdout.read(1 << 16)
            if not piece:
                raise EOFError
            data += piece
            if length == _HEADER.size and len(data) >= length:
                length += _HEADER.unpack_from(data)[0]
    return bytes(data[_HEADER.size :])


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Kill the process and release everything that belonged to it."""
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            pipe.close()
