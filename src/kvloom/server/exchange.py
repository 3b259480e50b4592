"""One HTTP exchange: its context, the body within limits, JSON responses, and detection of a disconnect."""

import asyncio
import json
import secrets
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive

from kvloom.server.refusal import Refusal
from kvloom.server.watchdog import Watch, Watchdog

T = TypeVar("T")

SLICE = 512
"""Elements of a list that are encoded without a pause: about a millisecond's work where they are objects."""

ANSWER_DEPTH = 4
"""Levels above the longest lists of an answer: the answer, its choices, a choice, its log-probabilities."""

DRAIN_FACTOR = 8
"""A body beyond the limit is read and discarded up to this multiple, so that the client receives the answer."""


class ClientGoneError(Exception):
    """The client closed the connection before its answer was ready."""


@dataclass
class Context:
    """Facts about an exchange for the log, the headers of the reply and the engine.

    `key_digest` identifies the API key, empty without keys; `facts` are added to the log line. `answered` is when the
    answer was complete, if something of the exchange came after it; times are in `time.monotonic()` seconds.
    `headers` are added to the reply.
    """

    request_id: str
    started: float = field(default_factory=time.monotonic)
    key_digest: str = ""
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    error_code: str | None = None
    answered: float | None = None
    headers: dict[str, str] = field(default_factory=dict)
    unique: str = field(default_factory=lambda: secrets.token_hex(4))

    @property
    def answer_id(self) -> str:
        """What tells this exchange from every other in the ids of its answer; clients repeat the ids of requests."""
        return f"{self.request_id}-{self.unique}"


def context_of(request: Request) -> Context:
    """Return the context that the outermost layer gave this exchange."""
    context: Context = request.scope["kvloom.context"]
    return context


async def read_bytes(request: Request, max_bytes: int, dog: Watchdog) -> bytes:
    """Return the body, whose type must be JSON; raises `Refusal` for another type, one too large, or too slow."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        got = f"not {kind[:80]!r}" if kind else "which it does not say"
        raise Refusal(415, f"the body must be application/json, {got}; set the Content-Type header")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise Refusal(415, f"the body is encoded as {coding[:80]!r}; send it as it is, without Content-Encoding")
    declared = request.headers.get("content-length", "")
    chunks: list[bytes] = []
    size = int(declared) if declared.isdigit() else 0
    async with Watch(dog) as watch:
        more = size <= max_bytes
        size = size if size > max_bytes else 0
        while more:
            message: Message = await request.receive()
            watch.beat()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            more = message.get("more_body", False) and size <= max_bytes
    if size > max_bytes:
        text = f"the body is larger than {max_bytes} bytes; send less or raise --max-body-bytes"
        raise Refusal(413, text, code="body_too_large")
    return b"".join(chunks)


def parse_json(raw: bytes) -> Any:
    """Return the JSON value in `raw`; raises `Refusal` for invalid JSON."""
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8 at byte {error.start}", code="invalid_json") from None
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


class Incoming:
    """Passes on messages from the client, and can discard the rest of the body."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._begun = False
        self.ended = False

    async def __call__(self) -> Message:
        """Return the next message."""
        message = await self._receive()
        self._begun = True
        self.ended |= message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    def awaits_invitation(self, headers: Headers) -> bool:
        """Return whether the client sends a body only if it is told to, and has not been."""
        return not self._begun and headers.get("expect", "").lower() == "100-continue"

    async def drain(self, max_bytes: int, dog: Watchdog) -> None:
        """Read the rest of the body, up to `max_bytes`: a client that is still sending may not read the answer."""
        async with Watch(dog) as watch:
            while not self.ended and max_bytes > 0:
                max_bytes -= len((await self()).get("body", b""))
                watch.beat()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; when the client leaves first, cancel it and raise `ClientGoneError`.

    The body must have been read.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_departure(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def encode_json(value: Any) -> bytes:
    """Return compact JSON in UTF-8; half surrogate pairs are escaped."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def encode_large_json(value: Any, depth: int = ANSWER_DEPTH) -> bytes:
    """Return what `encode_json` returns, piece by piece, so that other threads run in between.

    Long lists are cut down to `depth` levels of objects and lists; keys of objects there are strings.
    """
    if isinstance(value, list) and len(value) > SLICE:
        slices = (encode_json(value[first : first + SLICE])[1:-1] for first in range(0, len(value), SLICE))
        return b"[" + b",".join(slices) + b"]"
    if depth and isinstance(value, dict):
        pairs = (encode_json(name) + b":" + encode_large_json(inner, depth - 1) for name, inner in value.items())
        return b"{" + b",".join(pairs) + b"}"
    if depth and isinstance(value, list):
        return b"[" + b",".join(encode_large_json(inner, depth - 1) for inner in value) + b"]"
    return encode_json(value)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return `value` as a JSON response."""
    return encoded_response(encode_json(value), status, headers)


def encoded_response(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return JSON that is encoded already as a response."""
    return Response(body, status, headers, media_type="application/json")
