"""SIGTERM: ends every command in order and at any time, also as the first process of a container."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

TERMINATED = 143
"""Exit status of a command that SIGTERM ended: 128 plus the number of the signal, as shells report it."""

GRACE_SECONDS = 0.5
"""Seconds that the main thread may take to unwind; it may be inside one long operation of a library."""


def end_on_sigterm() -> None:
    """Install a handler by which SIGTERM ends the process with status 143, within a second; only for the main thread.

    The kernel drops a signal to the first process of a container (PID 1) that has no handler for it, so this runs
    before anything slow. The handler unwinds the main thread, which releases locks and removes unfinished files. Python
    runs it between two operations only. A thread that the signal wakes directly ends the process if unwinding takes too
    long. A server replaces this handler by its own when it listens.
    """
    waking, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _unwind)
    threading.Thread(target=_watch, args=(waking,), name="sigterm", daemon=True).start()


def leave() -> NoReturn:
    """End the process at once, with status 143 and what was written: with torch loaded Python takes a second for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # nobody reads it any more
            continue
    os._exit(TERMINATED)


def _unwind(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)


def _watch(waking: int) -> None:
    while number := os.read(waking, 1):
        if number[0] == signal.SIGTERM:
            time.sleep(GRACE_SECONDS)
            os._exit(TERMINATED)
