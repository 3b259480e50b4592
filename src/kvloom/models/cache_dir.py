"""The user's cache folder, and atomic writes of files in it."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from kvloom.errors import InvalidInputError


def cache_dir() -> Path:
    """Return the folder for fetched and converted files: `KVLOOM_CACHE`, else `kvloom` in the user's cache folder.

    The user's cache folder is `XDG_CACHE_HOME`, else `~/.cache`. Nothing is created. Raises `InvalidInputError` for a
    user without a home, as containers have them.
    """
    own = os.environ.get("KVLOOM_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    if shared and Path(shared).is_absolute():
        return Path(shared) / "kvloom"
    try:
        return Path.home() / ".cache" / "kvloom"
    except RuntimeError:
        raise InvalidInputError(
            "there is no home folder to keep fetched files in; set KVLOOM_CACHE to a folder that can be written"
        ) from None


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create or replace `path` with what `write` puts into a binary file; a reader sees the old file or the new one.

    The folder is created. If `write` raises, `path` is unchanged and the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
