"""Feed: the queue between the engine's thread and one HTTP response. Updates are merged until the client takes them."""

import asyncio
from collections.abc import AsyncIterator

from kvloom.server.answer import Update


class Feed:
    """Updates of the requests of one body. All methods run on the event loop.

    Updates that are not taken are merged, so a slow client costs at most the text of its answers and delays no step.
    """

    def __init__(self, num_requests: int) -> None:
        self.num_open = num_requests
        self._pending: dict[int, Update] = {}
        self._news = asyncio.Event()

    def put(self, update: Update) -> None:
        """Add an update; never waits."""
        waiting = self._pending.get(update.place)
        if waiting is None:
            self._pending[update.place] = update
        else:
            waiting.add(update)
        self._news.set()

    async def take(self) -> list[Update]:
        """Wait for updates and return all of them, merged, in the order of the requests.

        Raises the `Refusal` of a request that failed; other pending updates are then dropped.
        """
        await self._news.wait()
        self._news.clear()
        taken = [self._pending[place] for place in sorted(self._pending)]
        self._pending.clear()
        for update in taken:
            if update.error is not None:
                raise update.error
        self.num_open -= sum(update.ended for update in taken)
        return taken

    async def __aiter__(self) -> AsyncIterator[list[Update]]:
        while self.num_open:
            yield await self.take()
