"""ServingThread: the engine's thread in a server. It takes tickets and delivers updates once a round."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from kvloom.engine.engine import Engine
from kvloom.engine.enginethread import EngineThread
from kvloom.engine.params import SamplingParams
from kvloom.errors import KvloomError
from kvloom.server.enginestats import EngineStats, read_stats
from kvloom.server.metrics import ServerMetrics
from kvloom.server.postbox import Postbox
from kvloom.server.refusal import Refusal, refusal_of
from kvloom.server.ticket import Ledger, Ticket

T = TypeVar("T")

logger = logging.getLogger("kvloom.engine")

STATS_INTERVAL = 0.5
"""Seconds between two counts of the cache's bytes while the engine is busy; it also counts when it goes idle."""

FAILURES_BEFORE_PROBE = 3
MAX_IDLE_STEPS = 100


class ServingThread(EngineThread):
    """Runs `Engine.step` while there is work. All methods are for any thread; none but `stop` waits for a step.

    When a step fails, its requests fail (500). When three steps in a row fail, all requests fail and one token is
    generated as a probe; if that fails too, or the invariants of the cache do not hold, the engine is dead and
    `alive` is False permanently.
    """

    def __init__(self, engine: Engine, metrics: ServerMetrics) -> None:
        super().__init__(engine, "engine")
        self.metrics = metrics
        self.alive = True
        self.error: BaseException | None = None
        self.stats: EngineStats = read_stats(engine)
        self._ledgers: dict[str, Ledger] = {}
        self._post = Postbox()
        self._failures = 0
        self._idle_steps = 0
        self._counted = 0.0

    # ---- for other threads ----------------------------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to run; updates are delivered on `loop`."""
        self._post.loop = loop
        self._thread.start()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Hand over the prompts of one body; raises `Refusal` 503 when the engine is dead."""
        if not self.alive:
            raise _dead()
        self._put(lambda: self._admit(tickets))

    def abort(self, tickets: Sequence[Ticket]) -> None:
        """End the unfinished requests of `tickets` before the next step; their blocks are free then."""
        self._put(lambda: self._abort(tickets))

    def fail_all(self, refusal: Refusal) -> None:
        """End everything that runs or waits, before the next step, with `refusal`."""
        self._put(lambda: self._fail(list(self._ledgers.values()), refusal, "abort"))

    def call(self, function: Callable[[Engine], T]) -> "Future[T]":
        """Run `function` between two steps and return its future result, `Refusal` 503 when the engine is dead."""
        if not self.alive:
            done: Future[T] = Future()
            done.set_exception(_dead())
            return done
        return super().call(function)

    # ---- the thread -----------------------------------------------------------------------------------------------

    def _wants_step(self) -> bool:
        return self.engine.has_work

    def _finish_round(self) -> None:
        now = time.monotonic()
        if now - self._counted >= STATS_INTERVAL or not self.engine.has_work:
            self._counted = now
            self.stats = read_stats(self.engine)
        self._post.deliver()

    def _end(self) -> None:
        for request_id in list(self._ledgers):
            self.engine.abort(request_id)

    def _admit(self, tickets: Sequence[Ticket]) -> None:
        """Queue all of `tickets` in the engine, or none and report why."""
        if not self.alive:
            self._post.refuse(tickets[0], _dead())
            return
        added: list[Ticket] = []
        for ticket in tickets:
            try:
                ticket.request = self.engine.add(
                    ticket.prompt_token_ids,
                    ticket.params,
                    request_id=ticket.request_id,
                    prompt=ticket.prompt,
                    priority=ticket.priority,
                    cache_salt=ticket.cache_salt,
                    kv_policy=ticket.kv_policy,
                )
            except KvloomError as error:
                self._abort(added)
                self._post.refuse(ticket, refusal_of(error))
                return
            ticket.request.timing.arrived = ticket.arrived
            self._ledgers[ticket.request_id] = Ledger(ticket, ticket.request)
            added.append(ticket)

    def _abort(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            ledger = self._ledgers.get(ticket.request_id)
            if ledger is not None and ledger.ticket is ticket:
                del self._ledgers[ticket.request_id]
                self.engine.abort(ticket.request_id)
                self.metrics.ended(ledger.request, "abort", self.engine.kv_usage(ledger.request))

    def _step(self) -> None:
        steps = self.engine.num_steps
        try:
            progressed = self.engine.step()
        except Exception as error:
            self._fail_step(error)
            return
        self._failures = 0
        self._idle_steps = 0 if self.engine.num_steps > steps else self._idle_steps + 1
        if self._idle_steps > MAX_IDLE_STEPS:
            raise AssertionError(f"the engine has work and did none of it in {MAX_IDLE_STEPS} steps")
        self.metrics.stepped(self.engine.last_step)
        now = time.monotonic()
        for request in progressed:
            ledger = self._ledgers.get(request.request_id)
            if ledger is None:
                continue
            if request.error is None:
                self.metrics.progressed(ledger, now)
            if request.finished:
                del self._ledgers[request.request_id]
                if request.error is None:
                    self._post.tell(ledger.ticket, ledger.update(self.engine, ended=True))
                else:
                    refusal = Refusal(500, str(request.error), code="request_failed")
                    self._post.refuse(ledger.ticket, refusal)
                reason = request.sequences[0].finish_reason or "stop"
                self.metrics.ended(request, reason, self.engine.kv_usage(request))
            elif ledger.ticket.streaming:
                self._post.tell(ledger.ticket, ledger.update(self.engine, ended=False))

    def _fail_step(self, error: Exception) -> None:
        """Fail the requests that the engine aborted, and test whether it can continue."""
        self._failures += 1
        gone = [ledger for name, ledger in self._ledgers.items() if name not in self.engine.requests]
        logger.error("a step failed; %d requests are lost", len(gone), exc_info=error)
        if not gone or self._failures >= FAILURES_BEFORE_PROBE:
            gone = list(self._ledgers.values())
        message = f"the engine failed while it ran this request ({type(error).__name__})"
        self._fail(gone, Refusal(500, message, code="step_failed"), "error")
        self.engine.cache.check_invariants()
        if self._failures >= FAILURES_BEFORE_PROBE:
            _probe(self.engine)
            self._failures = 0

    def _fail(self, ledgers: list[Ledger], refusal: Refusal, reason: str) -> None:
        for ledger in ledgers:
            self.engine.abort(ledger.ticket.request_id)
            del self._ledgers[ledger.ticket.request_id]
            self._post.refuse(ledger.ticket, refusal)
            self.metrics.ended(ledger.request, reason, self.engine.kv_usage(ledger.request))

    def _die(self, error: BaseException) -> None:
        self.error = error
        self.alive = False
        logger.critical("the engine is dead", exc_info=error)
        for ledger in self._ledgers.values():
            self._post.refuse(ledger.ticket, _dead())
        self._ledgers.clear()
        self._post.deliver()
        while True:  # commands that were queued before `alive` fell, and any that raced with it
            command = self._commands.get()
            if command is None:
                return
            command()
            self._post.deliver()


def _probe(engine: Engine) -> None:
    """Generate one token; raises whatever the engine raises."""
    params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
    request = engine.add([0], params, request_id="probe")
    while not request.finished:
        engine.step()


def _dead() -> Refusal:
    return Refusal(503, "the engine has stopped after an error; restart the server", code="engine_dead")
