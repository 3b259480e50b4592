"""EventStream: a response of server-sent events that ends when the client leaves or stops reading."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator

from starlette.types import Receive, Scope, Send

from kvloom.server.dialect import Dialect
from kvloom.server.exchange import ClientGoneError
from kvloom.server.refusal import Refusal
from kvloom.server.watchdog import StalledError, Watch, Watchdog

KEEP_ALIVE = b": waiting\n\n"

SILENCE_SECONDS = 10.0
"""Seconds without a byte after which a comment is sent: proxies and clients close silent connections."""


class EventStream:
    """An ASGI response that sends `events` as they come; a refusal among them becomes an error event.

    A client that takes nothing within the patience of `dog` is disconnected. `events` is closed in every case.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], dog: Watchdog, dialect: Dialect, silence: float = SILENCE_SECONDS
    ) -> None:
        self._events = events
        self._dog = dog
        self._dialect = dialect
        self._silence = silence
        self._sent = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything; raises `ClientGoneError` when the client left or stalled."""
        pump = asyncio.ensure_future(self._pump(send))
        leaving = asyncio.ensure_future(_departure(receive))
        try:
            await asyncio.wait({pump, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not pump.done():
                raise ClientGoneError
            pump.result()
        finally:
            leaving.cancel()
            if not pump.done():
                pump.cancel()
                await asyncio.gather(pump, return_exceptions=True)
            await self._events.aclose()

    async def _pump(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        breath = asyncio.ensure_future(self._breathe(send))
        try:
            async for chunk in self._events:
                await self._send(send, chunk)
        except Refusal as refusal:
            await self._send(send, self._dialect.failure(refusal))
        finally:
            breath.cancel()
            await asyncio.gather(breath, return_exceptions=True)
        await self._send(send, self._dialect.end, last=True)

    async def _breathe(self, send: Send) -> None:
        """Send a comment whenever nothing else was sent for a while."""
        while True:
            await asyncio.sleep(max(0.01, self._sent + self._silence - time.monotonic()))
            if time.monotonic() - self._sent >= self._silence:
                await self._send(send, KEEP_ALIVE)

    async def _send(self, send: Send, chunk: bytes, last: bool = False) -> None:
        """Send one chunk; waits while the client has not taken the ones before."""
        try:
            async with Watch(self._dog):
                self._sent = time.monotonic()
                await send({"type": "http.response.body", "body": chunk, "more_body": not last})
        except StalledError:
            raise ClientGoneError from None


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def primed(events: AsyncGenerator[bytes, None], patience: float) -> AsyncGenerator[bytes, None]:
    """Wait for the first of `events` and return a generator that yields all of them.

    Errors before the first event are raised here and so become an error status; after `patience` seconds the answer
    begins with comments that keep the connection open.
    """
    first = asyncio.ensure_future(anext(events))
    try:
        await asyncio.wait({first}, timeout=patience)
    except asyncio.CancelledError:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await events.aclose()
        raise
    if first.done() and first.exception() is not None:
        raise first.exception() or AssertionError
    return _all(first, events, patience)


async def _all(
    first: "asyncio.Future[bytes]", events: AsyncIterator[bytes], patience: float
) -> AsyncGenerator[bytes, None]:
    try:
        while not first.done():
            yield KEEP_ALIVE
            await asyncio.wait({first}, timeout=patience)
        yield first.result()
        async for chunk in events:
            yield chunk
    finally:
        if not first.done():
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
        if isinstance(events, AsyncGenerator):
            await events.aclose()
