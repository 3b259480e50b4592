"""Refusal: an HTTP error in OpenAI's shape, and the conversion of kvloom's errors."""

from collections.abc import Mapping
from typing import Any

from kvloom.errors import ChatTemplateError, DoesNotFitError, InvalidInputError, KvloomError, UnsupportedError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
"""Every error status that the server sends, with the `type` in its body."""


class Refusal(Exception):
    """An answer with an error status; `param` names the field at fault, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        return {"error": {"message": self.message, "type": TYPES[self.status], "param": self.param, "code": self.code}}


def bad_field(param: str, message: str, code: str | None = None) -> Refusal:
    """Return the 400 for one field of the body."""
    return Refusal(400, message, param=param, code=code)


def refusal_of(error: KvloomError) -> Refusal:
    """Return the refusal for a deliberate error: 400 where the request is at fault, else 500."""
    if isinstance(error, DoesNotFitError):
        return Refusal(400, str(error), code="kv_cache_exceeded")
    if isinstance(error, UnsupportedError):
        return Refusal(400, str(error), code="unsupported")
    if isinstance(error, ChatTemplateError):
        return Refusal(400, str(error), param="messages", code="chat_template")
    if isinstance(error, InvalidInputError):
        return Refusal(400, str(error))
    return Refusal(500, str(error), code="internal_error")
