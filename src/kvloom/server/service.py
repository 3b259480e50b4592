"""Service: one model behind the API, and the way of its requests to the engine's thread."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.requests import Request

from kvloom.engine.engine import Engine
from kvloom.engine.llm import LLM
from kvloom.engine.params import SamplingParams
from kvloom.errors import InvalidInputError
from kvloom.models.tokenizer import Tokenizer
from kvloom.server.exchange import parse_json, read_bytes
from kvloom.server.feed import Feed
from kvloom.server.fields import Body, Field, read_body
from kvloom.server.intake import Intake
from kvloom.server.metrics import ServerMetrics
from kvloom.server.queue import Place, Queue
from kvloom.server.refusal import Refusal
from kvloom.server.servingthread import ServingThread
from kvloom.server.settings import ServerConfig
from kvloom.server.ticket import Ticket
from kvloom.server.usage import Usage
from kvloom.server.watchdog import Watchdog
from kvloom.server.workers import Workers
from kvloom.spec.store import STORES

LARGE_BODY_BYTES = 1 << 15


class Service:
    """The shared state of all routes. Its methods run on the event loop unless they say otherwise."""

    def __init__(self, llm: LLM, config: ServerConfig) -> None:
        self.llm = llm
        self.config = config
        self.engine: Engine = llm.engine
        self.tokenizer: Tokenizer = llm.tokenizer
        self.names = config.served_model_name or (llm.model,)
        self.created = int(time.time())
        self.intake = Intake(self.engine, config, self.names)
        spec = self.engine.cache.spec
        cache_config = {
            "block_size": str(spec.block_size),
            "cache_dtype": spec.store if self.engine.policies.store is None else self.engine.policies.store.name,
            "enable_prefix_caching": str(self.engine.scheduler.prefixes.enabled),
            "kv_cache_memory_bytes": str(self.engine.cache.arena.num_bytes),
            "max_model_len": str(self.engine.max_model_len),
        }
        self.metrics = ServerMetrics(self.names[0], cache_config)
        self.thread = ServingThread(self.engine, self.metrics)
        self.dog = Watchdog(config.client_timeout)
        self.draining = False
        self.num_open = 0  # HTTP requests that are being answered
        self.queue = Queue(config.max_num_queued_reqs)
        self._live: set[Ticket] = set()
        self.workers = Workers()

    def start(self) -> None:
        """Start the engine's thread; updates are delivered on the running loop."""
        loop = asyncio.get_running_loop()
        self.thread.start(loop)
        self._walk = loop.create_task(self.dog.run())

    def stop_watching(self) -> None:
        """End the watchdog; on the loop."""
        self._walk.cancel()

    def close(self) -> None:
        """Stop the engine's thread and abort running requests; for any thread, once the loop no longer uses it."""
        self.thread.stop()
        self.workers.close()

    # ---- before a request runs ------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raise `Refusal` 503 when the server ends or the engine is dead."""
        if self.draining:
            raise Refusal(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})
        if not self.thread.alive:
            raise Refusal(503, "the engine has stopped after an error; restart the server", code="engine_dead")

    @property
    def num_live(self) -> int:
        """Prompts that are accepted and not finished."""
        return len(self._live)

    async def receive_body(self, request: Request) -> bytes:
        """Return the raw body; raises `Refusal` for a forbidden body, or one that is sent too slowly."""
        return await read_bytes(request, self.config.max_body_bytes, self.dog)

    async def read_body(self, raw: bytes, table: Mapping[str, Field]) -> Body:
        """Return the checked fields of a body; a large one is checked in a thread of the pool."""
        if len(raw) <= LARGE_BODY_BYTES:
            return read_body(parse_json(raw), table)
        return await self.workers.offload(lambda: read_body(parse_json(raw), table))

    async def prepare(self, params: SamplingParams) -> None:
        """Compile the form of the answers, if they have one, in a thread of its own: a large one takes seconds.

        Raises the engine's errors for an invalid form; later checks of `params` use the compiled one.
        """
        if params.structured_outputs is not None:
            await self.workers.compiling(lambda: self.engine.processors.processors(params))

    # ---- a request runs -------------------------------------------------------------------------------------------

    def submit(self, tickets: Sequence[Ticket], place: Place) -> Feed:
        """Hand `tickets` to the engine, for which they wait in `place`, and return their feed; see `release`."""
        self.check_open()
        self.thread.submit(tickets)
        self._live.update(tickets)
        self.queue.join(tickets, place)
        return tickets[0].feed

    def release(self, tickets: Sequence[Ticket]) -> None:
        """Remove `tickets`, aborting those that have not ended; call it once for each `submit`."""
        self._live.difference_update(tickets)
        aborted = bool(tickets and tickets[0].feed.num_open)
        self.queue.leave(tickets, ended=not aborted)
        if aborted:
            self.thread.abort(tickets)

    def cancel_all(self) -> None:
        """Fail everything that runs, because the server ends."""
        self.thread.fail_all(
            Refusal(503, "the server is shutting down and did not finish this answer", code="shutting_down")
        )

    def usage(self, tickets: Sequence[Ticket]) -> Usage:
        """Return an account with the prompts of `tickets` in it."""
        spec = self.engine.cache.spec
        native = float(STORES.get(spec.store).bits)
        return Usage(sum(len(t.prompt_token_ids) for t in tickets), native, 8.0 * spec.bytes_per_token)

    async def between_steps(self, function: Callable[[Engine], Any]) -> Any:
        """Run `function` in the engine's thread between two steps and return its result."""
        return await asyncio.wrap_future(self.thread.call(function))


def checked_text(text: str) -> str:
    """Return `text`; raises `InvalidInputError` for half a surrogate pair, which no encoding can carry."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"the text has half a surrogate pair at character {error.start}") from None
    return text
