"""Ctrl-C as a request to stop an answer between two tokens, so that a step of the engine is never interrupted."""

import signal
from types import FrameType
from typing import Any


class StopOnInterrupt:
    """While entered, the first Ctrl-C sets `asked`; a second one raises `KeyboardInterrupt` at once.

    Only for the main thread, as `signal.signal` is. Leaving restores the previous handler.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> "StopOnInterrupt":
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *raised: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
