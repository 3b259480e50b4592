"""ServerConfig: the options of a server and the limits of its clients."""

import ipaddress
import re
from dataclasses import dataclass, field, fields
from typing import Any

from kvloom.errors import InvalidInputError
from kvloom.units import MIB

ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#@\s]*/?")
SCHEDULING_POLICIES = ("fcfs", "priority")


@dataclass(frozen=True)
class ServerConfig:
    """Options of a server, checked on construction (`InvalidInputError`). Sizes in bytes, times in seconds.

    `max_num_queued_reqs` counts prompts that are accepted and not begun; `max_concurrent_requests` counts HTTP requests
    that are being answered. `max_sequences_per_request` bounds prompts times answers of one body.

    `uds` is the path of a Unix socket to listen on in place of `host` and `port`. `allowed_hosts` are host names that
    the server accepts (`*.example.org` is all below it, `*` any); without them a server on loopback without keys
    accepts this machine's names alone. Pages of `allowed_origins` may use the server from a browser.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    served_model_name: tuple[str, ...] = ()
    api_key: tuple[str, ...] = ()
    root_path: str = ""
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_num_queued_reqs: int = 1024
    max_concurrent_requests: int = 1024
    max_body_bytes: int = 4 * MIB
    max_sequences_per_request: int = 1024
    max_logprobs: int = 20
    client_timeout: float = 60.0
    timeout_keep_alive: int = 75
    shutdown_timeout: float = 30.0
    scheduling_policy: str = "fcfs"
    isolate_by_key: bool = False
    enable_log_requests: bool = False
    disable_log_stats: bool = False
    otlp_traces_endpoint: str | None = None
    generation_defaults: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least, most in (
            ("port", 0, 65535),
            ("max_num_queued_reqs", 1, None),
            ("max_concurrent_requests", 1, None),
            ("max_body_bytes", 1024, None),
            ("max_sequences_per_request", 1, None),
            ("max_logprobs", 0, None),
            ("client_timeout", 1, None),
            ("shutdown_timeout", 0, None),
            ("timeout_keep_alive", 1, None),
        ):
            value = getattr(self, name)
            if value < least or (most is not None and value > most):
                limit = f"from {least} to {most}" if most is not None else f"at least {least}"
                raise InvalidInputError(f"{name} is {value}; it must be {limit}")
        if self.scheduling_policy not in SCHEDULING_POLICIES:
            known = ", ".join(SCHEDULING_POLICIES)
            raise InvalidInputError(f"unknown scheduling policy {self.scheduling_policy!r}; known: {known}")
        if any(not key or not key.isascii() or not key.isprintable() for key in self.api_key):
            raise InvalidInputError("an API key is empty or holds characters that a header cannot carry")
        object.__setattr__(self, "root_path", _root_path(self.root_path))
        for origin in self.allowed_origins:
            if origin not in ("*", "null") and not ORIGIN.fullmatch(origin):
                raise InvalidInputError(
                    f"allowed origin {origin!r} is no origin; expected e.g. https://chat.example.org:8443, or * for any"
                )
        if any("/" in host or not host.strip() for host in self.allowed_hosts):
            raise InvalidInputError("an allowed host is a name such as llm.example.org or *.example.org, or * for any")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise InvalidInputError("ssl_keyfile needs the certificate that belongs to it: give ssl_certfile, too")
        if self.isolate_by_key and not self.api_key:
            raise InvalidInputError("isolate_by_key separates the prefix caches of API keys; give an api_key, too")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.uds is not None:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def public(self) -> dict[str, Any]:
        """Return the options as plain values, with the number of API keys in place of the keys."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        several = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        return {**values, **several, "api_key": len(self.api_key)}


def _root_path(path: str) -> str:
    """Return `path` with a slash before it and none behind, empty for the root."""
    inner = path.strip("/")
    return f"/{inner}" if inner else ""
