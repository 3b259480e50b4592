"""Postbox: updates of requests from the engine's thread, delivered on the event loop once a round."""

import asyncio

from kvloom.server.answer import Update
from kvloom.server.refusal import Refusal
from kvloom.server.ticket import Ticket


class Postbox:
    """Collects updates of tickets; everything but the constructor is for the engine's thread."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._mail: list[tuple[Ticket, Update]] = []

    def tell(self, ticket: Ticket, update: Update) -> None:
        """Add an update of `ticket`."""
        self._mail.append((ticket, update))

    def refuse(self, ticket: Ticket, refusal: Refusal) -> None:
        """Add the end of `ticket`, which failed."""
        self.tell(ticket, Update(ticket.place, error=refusal))

    def deliver(self) -> None:
        """Put the updates of this round into the tickets' feeds, by one call on the loop; none after its end."""
        if self._mail and self.loop is not None and not self.loop.is_closed():
            mail, self._mail = self._mail, []
            self.loop.call_soon_threadsafe(_deliver, mail)


def _deliver(mail: list[tuple[Ticket, Update]]) -> None:
    for ticket, update in mail:
        ticket.feed.put(update)
