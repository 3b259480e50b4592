"""Listening: bound sockets and certificates, checked before a model is loaded."""

import contextlib
import os
import socket
import ssl
import stat

from kvloom.errors import InvalidInputError
from kvloom.server.settings import ServerConfig


def listen(config: ServerConfig) -> socket.socket:
    """Return the bound socket of `config`, which does not listen yet; raises `InvalidInputError`.

    Also loads its certificate, so that errors are found before a model is loaded.
    """
    if config.ssl_certfile is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
        except OSError as error:
            files = " and ".join(filter(None, (config.ssl_certfile, config.ssl_keyfile)))
            raise InvalidInputError(
                f"cannot use {files}: {error}. Give PEM files: --ssl-certfile the chain, --ssl-keyfile its key"
            ) from None
    return bind(config.host, config.port) if config.uds is None else bind_unix(config.uds)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address that does not listen yet; raises `InvalidInputError`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        message = f"cannot listen on {host} port {port}: {error}. Choose another --port or --host"
        raise InvalidInputError(message) from None
    return sock


def bind_unix(path: str) -> socket.socket:
    """Return a socket bound to `path`, in place of one without a listener; raises `InvalidInputError`.

    The folder and the process's umask decide which users may connect.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.bind(path)
    except OSError as error:
        sock.close()
        raise InvalidInputError(f"cannot listen on the socket {path}: {error}. Choose another --uds") from None
    return sock


def _remove_stale(path: str) -> None:
    """Remove a socket that refuses connections; anything else at `path` is left, and binding fails."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)


def address_of(sock: socket.socket, scheme: str = "http") -> str:
    """Return the URL that a bound socket answers at."""
    name = sock.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    host = f"[{name[0]}]" if ":" in str(name[0]) else name[0]
    return f"{scheme}://{host}:{name[1]}"
