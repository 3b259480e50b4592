"""Pages in a browser: the host names of a server, and the other origins that may use it.

Four attacks of a page in a browser are blocked. A *rebinding* page gives its own host name the address of this
machine; the `Host` header shows it. A *simple* cross-site request (a form, an image, `no-cors`) needs no permission
from the server and could still change something; `Sec-Fetch-Site` and `Origin` show it. An *embedded* answer (a script,
an image) tells its page whether it could be loaded; `EMBEDDING` forbids that. All other requests of another origin need
a preflight and are permitted only for the origins that the operator names.
"""

import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from kvloom.server.exchange import Context
from kvloom.server.refusal import Refusal
from kvloom.server.settings import ServerConfig

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods whose routes change nothing."""

METHODS = "GET, HEAD, POST"
EXPOSED = "X-Request-Id, Kvloom-Warning, Retry-After"
PREFLIGHT_SECONDS = 600

EMBEDDING = {"cross-origin-resource-policy": "same-origin", "x-content-type-options": "nosniff"}
"""Headers of every reply: a browser loads none of them as an image or script of a page of another origin.

Without them the events of such an element tell the page which routes answer 200, and so that a server is there.
"""

HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]{0,1024}")


class OriginLayer:
    """Refuses unknown hosts and cross-site requests with 403, and answers preflights, before keys are checked."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self.app = app
        self._hosts = allowed_hosts(config)
        self._origins = {origin.lower().removesuffix("/") for origin in config.allowed_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the exchange on, answer a preflight, or raise `Refusal`."""
        headers, context = Headers(scope=scope), scope["kvloom.context"]
        if self._hosts is not None:
            self._check_host(scope["kvloom.host"])
        origin = headers.get("origin")
        allowed = origin is not None and self.allows(origin)
        if allowed:
            assert origin is not None
            _permit(context, "*" if "*" in self._origins else origin)
        elif self._origins:
            context.headers["vary"] = "Origin"
        if scope["method"] == "OPTIONS" and origin is not None and "access-control-request-method" in headers:
            if not allowed:
                raise _strange(origin)
            await _preflight(headers)(scope, receive, send)
            return
        if scope["method"] not in SAFE_METHODS and not allowed and _is_cross_site(headers, scope["kvloom.host"]):
            raise _strange(origin or "another site")
        await self.app(scope, receive, send)

    def allows(self, origin: str) -> bool:
        """Return whether pages of `origin` may use the server though they are not its own."""
        return "*" in self._origins or origin.lower() in self._origins

    def _check_host(self, host: str) -> None:
        """Raise `Refusal` for a host that is not among the allowed ones; clients that name none are no browsers."""
        name = host_name(host)
        if host and not any(_matches(name, allowed) for allowed in self._hosts or ()):
            raise Refusal(
                403,
                f"this server is not asked for as {name[:100]!r}; known hosts: {', '.join(self._hosts or ())}. "
                "Name others with --allowed-hosts, or use an --api-key",
                code="host_not_allowed",
            )


def allowed_hosts(config: ServerConfig) -> tuple[str, ...] | None:
    """Return the host names that the server of `config` accepts, None for any.

    Without `allowed_hosts` a server on loopback without keys accepts this machine's own names alone: a page whose
    host name resolves to this machine would otherwise have the same origin.
    """
    if "*" in config.allowed_hosts:
        return None
    if config.allowed_hosts:
        return tuple(host_name(host) for host in config.allowed_hosts)
    if config.api_key or config.uds is not None or not config.is_loopback:
        return None
    return tuple(dict.fromkeys((*LOCAL_NAMES, host_name(config.host))))


def host_name(host: str) -> str:
    """Return a host without its port, brackets and final dot, in lower case."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return (name if name.count(":") > 1 else name.partition(":")[0]).removesuffix(".")


def _matches(name: str, allowed: str) -> bool:
    return name.endswith(allowed[1:]) if allowed.startswith("*.") else name == allowed


def _is_cross_site(headers: Headers, host: str) -> bool:
    """Return whether a browser sends this for a page of another origin; browsers alone write these headers."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is not None and _authority(origin) != host.lower()


def _authority(origin: str) -> str:
    """Return host and port of an origin, empty for one that has none (`null`, `file://`)."""
    try:
        return urlsplit(origin.lower()).netloc
    except ValueError:
        return ""


def _strange(origin: str) -> Refusal:
    return Refusal(
        403,
        f"pages of {origin[:200]!r} may not use this server; the operator can name them with --allowed-origins",
        code="origin_not_allowed",
    )


def _permit(context: Context, origin: str) -> None:
    context.headers |= {
        "access-control-allow-origin": origin,
        "access-control-expose-headers": EXPOSED,
        "vary": "Origin",
    }


def _preflight(headers: Headers) -> Response:
    """Return the answer to a preflight of an allowed origin: methods, and the headers that it asks for."""
    asked = headers.get("access-control-request-headers", "")
    found = {"access-control-allow-methods": METHODS, "access-control-max-age": str(PREFLIGHT_SECONDS)}
    if asked and HEADER_NAMES.fullmatch(asked):
        found["access-control-allow-headers"] = asked
    if headers.get("access-control-request-private-network") == "true":
        found["access-control-allow-private-network"] = "true"
    return Response(status_code=204, headers=found)
