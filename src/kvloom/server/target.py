"""The target of a request: its path and host, also behind a proxy."""

from urllib.parse import SplitResult, unquote, urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope


def resolve_target(scope: Scope, root_path: str) -> None:
    """Write the path below `root_path` and the host asked for (`kvloom.host`) into `scope`; mutates it.

    A proxy may remove the root path before it passes a request on, or keep it. A target in absolute form (RFC 9112,
    section 3.2.2) names the host itself, and its `Host` header is ignored. Any other target that is not a path is left
    unchanged, and matches no route.
    """
    path, host = scope["path"], Headers(scope=scope).get("host", "")
    if not path.startswith("/") and (url := _absolute(path)) is not None:
        path, host = unquote(url.path) or "/", url.netloc.rpartition("@")[2]
    if root_path and (path == root_path or path.startswith(f"{root_path}/")):
        path = path[len(root_path) :] or "/"
    scope.update({"path": path, "raw_path": path.encode("utf-8", "replace"), "root_path": "", "kvloom.host": host})


def _absolute(target: str) -> SplitResult | None:
    """Return the parts of an http URL with a host, None for anything else."""
    try:
        url = urlsplit(target)
    except ValueError:
        return None
    return url if url.scheme in ("http", "https") and url.netloc else None
