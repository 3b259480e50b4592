"""Vocabularies with golden tokenisations: the test data of llama.cpp, from the source package llama-cpp-python."""

import fcntl
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from kvloom.models.cache_dir import cache_dir

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
NAMES = (
    "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm", "mpt", "phi-3", "qwen2",
    "qwen35", "refact", "starcoder",
)  # fmt: skip
"""Vocabularies whose way of cutting text kvloom knows; the others are refused when they are opened."""


def vocabularies() -> Path:
    """Return the folder with `ggml-vocab-NAME.gguf`, `.gguf.inp` and `.gguf.out`, fetched on first use (77 MB)."""
    folder = cache_dir() / "test-models" / f"vocabularies-{VERSION}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock-vocabularies").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            work = folder.parent / ".fetching-vocabularies"
            shutil.rmtree(work, ignore_errors=True)
            try:
                _fetch(work)
                (work / "found").rename(folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return folder


def _fetch(work: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE, "-d", str(work)]
    subprocess.run([*command, f"{PACKAGE}=={VERSION}"], check=True, capture_output=True, text=True)
    [archive] = work.glob("*.tar.gz")
    (work / "found").mkdir()
    with tarfile.open(archive) as files:
        for member in files:
            path = Path(member.name)
            if member.isfile() and path.parent.name == "models" and path.name.startswith("ggml-vocab-"):
                content = files.extractfile(member)
                assert content is not None
                (work / "found" / path.name).write_bytes(content.read())
