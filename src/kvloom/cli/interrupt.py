"""Ctrl-C as a wish to stop an answer between two tokens, so that the engine is never torn in the middle of a step."""

import signal
from types import FrameType
from typing import Any


class StopOnInterrupt:
    """While entered, the first Ctrl-C sets `asked`; a second one raises `KeyboardInterrupt` wherever it falls.

    Only for the main thread, as `signal.signal` is. The handler of before is put back on leaving.
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
