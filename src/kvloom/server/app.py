"""The ASGI application: the routes, with the layers around them."""

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from kvloom.server import anthropic, chat, completions, operations, responses
from kvloom.server.layers import ConcurrencyLayer, ExchangeLayer, KeyLayer
from kvloom.server.origins import OriginLayer
from kvloom.server.service import Service
from kvloom.server.tracing import Tracer

Answer = Callable[[Request, Service], Awaitable[ASGIApp]]

ROUTES: tuple[tuple[str, str, Answer], ...] = (
    ("GET", "/", operations.root),
    ("GET", "/v1/models", operations.models),
    ("GET", "/v1/models/{model:path}", operations.model),
    ("POST", "/v1/completions", completions.respond),
    ("POST", "/v1/chat/completions", chat.respond),
    ("POST", "/v1/responses", responses.respond),
    ("POST", "/v1/messages", anthropic.respond),
    ("POST", "/v1/messages/count_tokens", anthropic.count_tokens),
    ("POST", "/v1/embeddings", operations.embeddings),
    ("POST", "/tokenize", operations.tokenize),
    ("POST", "/detokenize", operations.detokenize),
    ("GET", "/tokenizer_info", operations.tokenizer_info),
    ("GET", "/health", operations.health),
    ("GET POST", "/ping", operations.ping),
    ("GET", "/version", operations.version),
    ("GET", "/load", operations.load),
    ("GET", "/server_info", operations.server_info),
    ("GET", "/metrics", operations.metrics),
    ("POST", "/reset_prefix_cache", operations.reset_prefix_cache),
    ("GET", "/openapi.json", operations.openapi),
)
"""Methods, path and answer of every route."""


def build_app(service: Service, tracer: Tracer) -> ASGIApp:
    """Return the application around `service`, whose engine thread has been or will be started."""
    routes = [
        Route(path, _Endpoint(answer, service), methods=methods.split(), name=path) for methods, path, answer in ROUTES
    ]
    app: ASGIApp = KeyLayer(_Routes(routes), service.config.api_key)
    return ExchangeLayer(OriginLayer(ConcurrencyLayer(app, service), service.config), service, tracer)


class _Endpoint:
    """One route as an ASGI application."""

    def __init__(self, answer: Answer, service: Service) -> None:
        self.answer, self.service = answer, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self.answer(Request(scope, receive), self.service)
        await response(scope, receive, send)


class _Routes:
    """The router; a path or method that it lacks is raised as an `HTTPException`, never answered by it."""

    def __init__(self, routes: list[Route]) -> None:
        self.router = Router(routes, redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self  # what makes the router raise instead of answering in plain text
        await self.router(scope, receive, send)
