"""Queue: bounds the prompts that wait for the engine, and refuses further ones."""

import math
import random
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType

from kvloom.server.refusal import Refusal
from kvloom.server.ticket import Ticket

RATE_WINDOW = 30.0
"""Seconds over which ended requests are counted for `Retry-After`."""


class Queue:
    """Prompts that are accepted and have not been started, at most `limit` of them. For the event loop only.

    A body takes its places as soon as it has arrived, before it is parsed, tokenised or checked. So a body that finds
    the queue full is refused at once, and does not wait behind the long prompts of others first.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.num_coming = 0  # places of bodies that are being parsed and checked
        self._tickets: set[Ticket] = set()
        self._ends: deque[float] = deque(maxlen=1024)

    def __len__(self) -> int:
        """Return how many places are taken."""
        self._tickets = {ticket for ticket in self._tickets if ticket.waiting}
        return len(self._tickets) + self.num_coming

    def check(self, num_prompts: int) -> None:
        """Raise `Refusal` 429 unless there is room for so many more."""
        taken = len(self)
        if taken + num_prompts > self.limit:
            raise Refusal(
                429,
                f"{taken} requests wait and {num_prompts} would be added; the queue holds {self.limit}. "
                "Come back later or raise --max-num-queued-reqs",
                code="queue_full",
                headers={"Retry-After": str(self._retry_after())},
            )

    def place(self) -> "Place":
        """Return room for one prompt, to be used in a `with` block; raises `Refusal` 429 when there is none."""
        place = Place(self)
        place.widen(1)
        return place

    def join(self, tickets: Sequence[Ticket], place: "Place") -> None:
        """Move `tickets` into `place`."""
        assert place.size >= len(tickets)
        place.leave()
        self._tickets.update(tickets)

    def leave(self, tickets: Sequence[Ticket], *, ended: bool) -> None:
        """Remove `tickets`; `ended` says that they came to their end and were not aborted."""
        self._tickets.difference_update(tickets)
        if ended:
            self._ends.append(time.monotonic())

    def _retry_after(self) -> int:
        """Return the seconds in which about one request ends, from 1 to 60; 5 when none has ended lately.

        A random time of up to as much and a second more is added, so that clients refused together do not retry
        together: each of a hundred would then wait for the refusals of the others.
        """
        now = time.monotonic()
        recent = sum(now - end < RATE_WINDOW for end in self._ends)
        least = 5 if not recent else max(1, min(60, math.ceil(RATE_WINDOW / recent)))
        return least + random.randint(0, least + 1)


class Place:
    """Room in the queue for the prompts of one body, until they join it or the `with` block ends."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self.size = 0

    def widen(self, num_prompts: int) -> None:
        """Take room for `num_prompts` in all; raises `Refusal` 429 when there is none, and then keeps what it has."""
        if num_prompts > self.size:
            self._queue.check(num_prompts - self.size)
            self._queue.num_coming += num_prompts - self.size
            self.size = num_prompts

    def leave(self) -> None:
        """Free the room; calling it again has no effect."""
        self._queue.num_coming -= self.size
        self.size = 0

    def __enter__(self) -> "Place":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
