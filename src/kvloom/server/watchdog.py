"""Watchdog: ends what makes no progress for a while, on a clock that stands still while the process does."""

import asyncio
from types import TracebackType

TICKS = 6
"""Ticks in the patience; a pause of the process, however long, counts as one of them."""


class StalledError(Exception):
    """Nothing moved for as long as the watchdog has patience."""


class Watch:
    """Watches the task that enters it; raises `StalledError` there unless `beat` is called often enough."""

    def __init__(self, dog: "Watchdog") -> None:
        self._dog = dog
        self._task: asyncio.Task[object] | None = None
        self._fired = False
        self.tick = 0

    def beat(self) -> None:
        """Note progress."""
        self.tick = self._dog.tick

    def fire(self) -> None:
        """Cancel the task."""
        assert self._task is not None
        self._fired = True
        self._task.cancel()

    async def __aenter__(self) -> "Watch":
        self._task = asyncio.current_task()
        self.beat()
        self._dog.watches.add(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dog.watches.discard(self)
        if self._fired and kind is asyncio.CancelledError:
            assert self._task is not None
            self._task.uncancel()
            raise StalledError from error


class Watchdog:
    """One for all exchanges: a tick costs a look at each of them, a beat costs an assignment."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.tick = 0
        self.watches: set[Watch] = set()

    async def run(self) -> None:
        """Tick for ever."""
        while True:
            await asyncio.sleep(self.patience / TICKS)
            self.tick += 1
            for watch in [w for w in self.watches if self.tick - w.tick > TICKS]:
                self.watches.discard(watch)
                watch.fire()
