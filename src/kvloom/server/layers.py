"""The layers around the routes: context, log and errors outermost, then the limit of concurrency, then the API key."""

import contextlib
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvloom.errors import KvloomError
from kvloom.server.dialect import dialect_of
from kvloom.server.exchange import DRAIN_FACTOR, ClientGoneError, Context, Incoming, json_response
from kvloom.server.origins import EMBEDDING
from kvloom.server.refusal import TYPES, Refusal, refusal_of
from kvloom.server.service import Service
from kvloom.server.target import resolve_target
from kvloom.server.tracing import Tracer
from kvloom.server.watchdog import StalledError

access_log = logging.getLogger("kvloom.access")
logger = logging.getLogger("kvloom.server")

OPEN_ROUTES = frozenset({"/", "/health", "/ping", "/version", "/metrics"})
"""Routes that need no key: they reveal nothing about requests or their contents."""

QUIET_ROUTES = frozenset({"/", "/health", "/ping", "/metrics", "/load"})
"""Routes that monitors poll; logged only when they fail."""

REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}")
MAX_WARNING_CHARS = 1500
CLIENT_GONE = 499
"""Status in the log of an exchange whose client left; nothing is sent."""


class ExchangeLayer:
    """Gives every exchange its context, turns errors into answers, and writes one log line."""

    def __init__(self, app: ASGIApp, service: Service, tracer: Tracer) -> None:
        self.app = app
        self.service = service
        self.tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one HTTP exchange; never raises an error of a request or a route."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            return
        resolve_target(scope, self.service.config.root_path)
        given = Headers(scope=scope).get("x-request-id", "")
        context = Context(given if REQUEST_ID.fullmatch(given) else secrets.token_hex(12))
        scope["kvloom.context"] = context
        status = 0

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(MutableHeaders(scope=message), context)
            await send(message)

        refusal: Refusal | None = None
        incoming = Incoming(receive)
        self.service.num_open += 1
        try:
            with self.tracer.span(scope, context) as span:
                try:
                    await self.app(scope, incoming, observed)
                except ClientGoneError:
                    status = CLIENT_GONE
                except Refusal as error:
                    refusal = error
                except StalledError:
                    message = f"nothing came from the client for {self.service.dog.patience:g} s"
                    refusal = Refusal(408, message, headers={"Connection": "close"})
                except KvloomError as error:
                    refusal = refusal_of(error)
                except HTTPException as error:
                    refusal = _of_router(error, scope)
                except Exception as error:
                    logger.exception("request %s failed", context.request_id)
                    refusal = Refusal(500, f"internal error ({type(error).__name__})", code="internal_error")
                if refusal is not None:
                    refusal.__traceback__ = None  # breaks a reference cycle with its frames
                    context.error_code = refusal.code or TYPES[refusal.status]
                    if not status:
                        await self._refuse(refusal, scope, incoming, observed)
                span.finish(status, context.facts)
        finally:
            self.service.num_open -= 1
            self._log(scope, context, status, refusal)

    async def _refuse(self, refusal: Refusal, scope: Scope, incoming: Incoming, send: Send) -> None:
        """Answer with `refusal` at once, and then read the rest of the body of a client that is still sending.

        The answer is complete before the rest of the body is read, but the exchange ends after that: a connection
        that is closed while data arrive is reset, and a client that reads late would not get the answer.
        """

        async def kept_open(message: Message) -> None:
            await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

        response = json_response(dialect_of(scope["path"]).error(refusal), refusal.status, refusal.headers)
        stalled, uninvited = refusal.status == 408, incoming.awaits_invitation(Headers(scope=scope))
        if incoming.ended or stalled or uninvited:
            await response(scope, incoming, send)
            return
        await response(scope, incoming, kept_open)
        context: Context = scope["kvloom.context"]
        context.answered = time.monotonic()
        with contextlib.suppress(StalledError):
            await incoming.drain(DRAIN_FACTOR * self.service.config.max_body_bytes, self.service.dog)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _log(self, scope: Scope, context: Context, status: int, refusal: Refusal | None) -> None:
        path = scope["path"]
        known = scope.get("route")
        route = known.path if known is not None else "other"
        self.service.metrics.responded(route, status, context.error_code)
        for warning in context.warnings:
            logger.warning("request %s: %s", context.request_id, warning)
        if path in QUIET_ROUTES and status < 400:
            return
        client = scope.get("client")
        facts = {
            "request_id": context.request_id,
            "client": f"{client[0]}:{client[1]}" if client else None,
            "method": scope["method"],
            "path": path[:256],
            "status": status,
            "seconds": round((context.answered or time.monotonic()) - context.started, 4),
            **context.facts,
        }
        if refusal is not None:
            facts |= {"error": context.error_code, "reason": refusal.message[:500]}
        access_log.info("%s %s %s", scope["method"], path[:256], status, extra={"facts": facts})


def _add_headers(headers: MutableHeaders, context: Context) -> None:
    headers["x-request-id"] = context.request_id
    headers.update(EMBEDDING)
    headers.update(context.headers)
    if context.warnings:
        text = "; ".join(context.warnings).encode("ascii", "backslashreplace").decode()
        cut = re.sub(r"[\x00-\x1f\x7f]", " ", text)[:MAX_WARNING_CHARS]
        headers["kvloom-warning"] = cut.strip()  # a header may not end in a space


def _of_router(error: HTTPException, scope: Scope) -> Refusal:
    headers = dict(error.headers or {})
    if error.status_code == 405:
        return Refusal(405, f"{scope['method']} is not allowed on {scope['path'][:200]}", headers=headers)
    if error.status_code == 404:
        return Refusal(404, f"there is no {scope['path'][:200]} here", code="no_such_route")
    return Refusal(400, str(error.detail), headers=headers)


class ConcurrencyLayer:
    """Refuses exchanges beyond the limit with 503 before anything of them is read; monitors always get through."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the exchange on; raises `Refusal` when there are too many."""
        limit = self.service.config.max_concurrent_requests
        if self.service.num_open > limit and scope["path"] not in OPEN_ROUTES:
            message = f"{limit} requests are being answered, which is --max-concurrent-requests; try again later"
            raise Refusal(503, message, code="too_many_requests", headers={"Retry-After": "1"})
        await self.app(scope, receive, send)


class KeyLayer:
    """Asks for one of the API keys, compared in constant time, on all but `OPEN_ROUTES`."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self.app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the exchange on; raises `Refusal` 401 without a right key."""
        if self._digests and scope["path"] not in OPEN_ROUTES:
            context: Context = scope["kvloom.context"]
            context.key_digest = self._check(Headers(scope=scope))
        await self.app(scope, receive, send)

    def _check(self, headers: Headers) -> str:
        """Return the digest of the key; every key is compared, so that the time reveals nothing about them."""
        header = headers.get("authorization", "")
        scheme, _, key = header.partition(" ")
        bearer = scheme.lower() == "bearer"
        if not bearer:
            key = headers.get("x-api-key", "")
        given = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        right = [hmac.compare_digest(given, digest) for digest in self._digests]
        if not any(right):
            if key.strip():
                what = "a wrong API key"
            elif bearer:
                what = "no API key behind Bearer"
            else:
                what = "an Authorization header without Bearer" if header else "no API key"
            raise Refusal(
                401,
                f"{what}; send the header 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return given.hex()[:16]
