"""Dialect: the format of errors and ends of streams of an API, and the dialect of each route."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvloom.server.exchange import encode_json
from kvloom.server.refusal import Refusal

DONE = b"data: [DONE]\n\n"

ANTHROPIC_PATH = "/v1/messages"
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
"""Every error status that the server sends, with the `type` in Anthropic's body."""


@dataclass(frozen=True)
class Dialect:
    """`error` writes a refusal as a body, `failure` as an event of a stream, and `end` follows the last event."""

    error: Callable[[Refusal], dict[str, Any]]
    failure: Callable[[Refusal], bytes]
    end: bytes = b""


def event(value: Any) -> bytes:
    """Return one event that carries `value` as JSON."""
    return b"data: " + encode_json(value) + b"\n\n"


def named_event(value: dict[str, Any]) -> bytes:
    """Return one event that carries `value` as JSON, under the name in its `type`."""
    return b"event: " + str(value["type"]).encode() + b"\n" + event(value)


def anthropic_error(refusal: Refusal) -> dict[str, Any]:
    """Return the body of an error in Anthropic's shape, with the field and code that OpenAI's has."""
    error = {"type": ANTHROPIC_TYPES[refusal.status], "message": refusal.message}
    return {"type": "error", "error": {**error, "param": refusal.param, "code": refusal.code}}


COMPLETIONS = Dialect(Refusal.body, lambda refusal: event(refusal.body()), DONE)
"""OpenAI's completions and conversations."""

ANTHROPIC = Dialect(anthropic_error, lambda refusal: named_event(anthropic_error(refusal)))
"""Anthropic's messages."""


def dialect_of(path: str) -> Dialect:
    """Return the dialect of the errors of a route, known or not."""
    speaks_anthropic = path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/")
    return ANTHROPIC if speaks_anthropic else COMPLETIONS
