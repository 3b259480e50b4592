"""A small HTTP/1.1 client for streamed answers that reads the clock when bytes arrive."""

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

import h11

from kvloom.errors import InvalidInputError, KvloomError

READ_BYTES = 1 << 16


class ServerAnswerError(KvloomError):
    """The server answered with an error status, or not in HTTP."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(f"the server answered {status}: {message[:500]}")


@dataclass
class Endpoint:
    """Where a server answers: connections to `base_url` are kept and used again."""

    base_url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    _idle: list["_Connection"] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._parts: SplitResult = urlsplit(self.base_url)
        if self._parts.scheme not in ("http", "https") or not self._parts.hostname:
            raise InvalidInputError(f"{self.base_url!r} is not a base URL; write e.g. http://127.0.0.1:8000")

    @property
    def _port(self) -> int:
        return self._parts.port or (443 if self._parts.scheme == "https" else 80)

    async def get(self, path: str) -> Any:
        """Return the JSON body of a GET; raises `ServerAnswerError`, and `OSError` where nobody answers."""
        body = b"".join([chunk async for _, chunk in self._exchange("GET", path, b"")])
        return json.loads(body)

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[tuple[float, Any]]:
        """POST `body` and yield (time of arrival, JSON value) of each server-sent event, up to the end mark.

        The time is `time.perf_counter()`. Raises `ServerAnswerError` for an error status or an error event.
        """
        held = b""
        async for arrived, chunk in self._exchange("POST", path, json.dumps(body).encode()):
            held += chunk
            *whole, held = held.split(b"\n\n")
            for event in whole:
                data = b"".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))
                if data and data != b"[DONE]":
                    value = json.loads(data)
                    if "error" in value:
                        raise ServerAnswerError(500, str(value["error"]))
                    yield arrived, value

    async def _exchange(self, method: str, path: str, body: bytes) -> AsyncIterator[tuple[float, bytes]]:
        connection = self._idle.pop() if self._idle else await self._open()
        try:
            async for item in connection.exchange(method, self._parts.path.rstrip("/") + path, self._head(body), body):
                yield item
        except BaseException:
            connection.close()
            raise
        if connection.reusable():
            self._idle.append(connection)

    def _head(self, body: bytes) -> list[tuple[str, str]]:
        sent = {"Host": self._parts.netloc, "Content-Type": "application/json", "Content-Length": str(len(body))}
        return [*sent.items(), *self.headers.items()]

    async def _open(self) -> "_Connection":
        context = ssl.create_default_context() if self._parts.scheme == "https" else None
        reader, writer = await asyncio.open_connection(self._parts.hostname, self._port, ssl=context)
        return _Connection(reader, writer)

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()


class _Connection:
    """One connection; `exchange` yields the pieces of one answer's body."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._state = h11.Connection(h11.CLIENT)

    async def exchange(
        self, method: str, target: str, headers: list[tuple[str, str]], body: bytes
    ) -> AsyncIterator[tuple[float, bytes]]:
        self._send(h11.Request(method=method, target=target, headers=headers))
        if body:
            self._send(h11.Data(data=body))
        self._send(h11.EndOfMessage())
        await self._writer.drain()
        status, refused = 0, b""
        while True:
            event = self._state.next_event()
            if event is h11.NEED_DATA:
                self._state.receive_data(await self._reader.read(READ_BYTES))
                arrived = time.perf_counter()
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                if status >= 400:
                    refused += bytes(event.data)
                else:
                    yield arrived, bytes(event.data)
            elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                break
        if status >= 400:
            raise ServerAnswerError(status, refused.decode("utf-8", "replace"))

    def _send(self, event: Any) -> None:
        data = self._state.send(event)
        if data:
            self._writer.write(data)

    def reusable(self) -> bool:
        """Return whether another exchange may follow; makes the state ready for it, or closes the connection."""
        if self._state.our_state is h11.DONE and self._state.their_state is h11.DONE:
            self._state.start_next_cycle()
            return True
        self.close()
        return False

    def close(self) -> None:
        self._writer.close()
