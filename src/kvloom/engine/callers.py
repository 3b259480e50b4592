"""Callers: many threads on one engine. Each waits for its own requests; all of them are batched together."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TypeVar

from kvloom.engine.engine import Engine
from kvloom.engine.enginethread import Command, EngineThread
from kvloom.engine.output import RequestOutput
from kvloom.engine.request import Request
from kvloom.errors import InvalidInputError
from kvloom.kernels.threads import asked_threads, tell_threads

T = TypeVar("T")

LOOK_SECONDS = 0.1
"""Seconds between two updates of a caller's progress."""

CLOSED = "this LLM is closed; load the model again"
FORKED = "this process was forked while its parent's LLM was answering, and has half a step of it; load the model again"

Add = Callable[[Engine], list[Request]]
"""Queues the requests of a call in the engine, all or none, and returns them."""


@dataclass(eq=False)
class Call:
    """One call: the requests that `add` queues, answered at each token (`streaming`) or once at their end.

    `answer` is set while the caller waits; the engine steps only while some caller waits. `pending` are the requests
    that have not ended, `error` is the exception of a step that aborted them.
    """

    add: Add
    streaming: bool = False
    requests: list[Request] = field(default_factory=list)
    pending: list[Request] = field(default_factory=list)
    answer: "Future[list[RequestOutput]] | None" = None
    error: BaseException | None = None
    num_told: int = 0
    begun: bool = False
    ended: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far."""
        return sum(sequence.num_output_tokens for request in self.requests for sequence in request.sequences)

    @property
    def is_ready(self) -> bool:
        """True when there is an answer for the waiting caller."""
        return not self.pending or (self.streaming and self.num_tokens > self.num_told)


def add_all(adds: list[Callable[[Engine], Request]]) -> Add:
    """Return a function that queues one request by each of `adds`; if one is refused, those before it are aborted."""

    def add(engine: Engine) -> list[Request]:
        requests: list[Request] = []
        try:
            for one in adds:
                requests.append(one(engine))
        except BaseException:
            for request in requests:
                engine.abort(request.request_id)
            raise
        return requests

    return add


class Callers(EngineThread):
    """The engine's thread of an `LLM`. `wait_for`, `close_call`, `call` and `close` are for any thread.

    The thread begins with the first call and ends with `close`. The requests of all callers run in the same steps. A
    step that fails raises its error from the calls whose requests it lost, or from all that wait if it lost none.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, "kvloom-engine")
        self._lock = threading.RLock()  # garbage collection may close a generator while its thread holds the lock
        self._calls: list[Call] = []
        self._process = os.getpid()
        self._closed: str | None = None

    # ---- for other threads ----------------------------------------------------------------------------------------

    def wait_for(self, call: Call, show: Callable[[Call], None] | None = None) -> list[RequestOutput]:
        """Return the outputs of `call` at its end, or at its next token if it streams; the first wait begins it.

        `show` is called now and then meanwhile. Raises what `call.add` or a step raised; `close_call` must follow.
        """
        answer: Future[list[RequestOutput]] = Future()
        threads = asked_threads()
        self._put(lambda: self._begin_wait(call, answer, threads))
        while show is not None and not wait([answer], LOOK_SECONDS).done:
            show(call)
        return answer.result()

    def close_call(self, call: Call) -> None:
        """Abort the unfinished requests of `call`; their blocks are free on return."""
        if call.ended:
            return
        try:
            done = self.call(lambda engine: self._abort(call))
        except InvalidInputError:  # closed, and so is the call
            return
        if not self.is_current:  # a generator that is collected there must not wait for the thread
            done.result()

    def close(self) -> None:
        """End the thread after the current step, failing the calls that wait; later ones are refused."""
        with self._lock:
            closed, self._closed = self._closed, CLOSED
        if closed is None and self._thread.ident is not None:
            self.stop()

    def _put(self, command: Command) -> None:
        if os.getpid() != self._process:
            self._adopt()
        with self._lock:
            if self._closed is not None:
                raise InvalidInputError(self._closed)
            if self._thread.ident is None:
                self._thread.start()
            self._commands.put(command)

    def _adopt(self) -> None:
        """Restart in a forked child, which lacks its parent's thread; refuse if a step was running at the fork."""
        busy = any(call.answer is not None for call in self._calls)
        streams = [call for call in self._calls if call.answer is None]
        EngineThread.__init__(self, self.engine, "kvloom-engine")
        self._lock, self._process, self._calls = threading.RLock(), os.getpid(), streams
        self._closed = self._closed or (FORKED if busy else None)

    # ---- the thread -----------------------------------------------------------------------------------------------

    def _begin_wait(self, call: Call, answer: "Future[list[RequestOutput]]", threads: int) -> None:
        tell_threads(threads)  # torch keeps the number for each thread; the caller's is meant
        call.answer = answer
        if call.error is None and not call.begun:
            call.begun = True
            self._calls.append(call)
            try:
                call.requests = call.pending = call.add(self.engine)
            except BaseException as error:
                call.error = error
        self._tell(call)

    def _wants_step(self) -> bool:
        return any(call.answer is not None for call in self._calls)

    def _step(self) -> None:
        for call in self._calls:
            call.pending = [request for request in call.pending if not request.finished]
        try:
            self.engine.step()
        except BaseException as error:
            lost = [call for call in self._calls if any(request.finished for request in call.pending)]
            for call in lost or self._calls:
                call.error = error

    def _finish_round(self) -> None:
        for call in list(self._calls):
            self._tell(call)

    def _tell(self, call: Call) -> None:
        """Answer a waiting caller, if there is an answer."""
        call.pending = [request for request in call.pending if not request.finished]
        if call.answer is None or not (call.error is not None or call.is_ready):
            return
        answer, call.answer = call.answer, None
        try:
            if call.error is not None:
                raise call.error
            outputs = [self.engine.output(request) for request in call.requests]
        except BaseException as error:
            self._abort(call)
            answer.set_exception(error)
            return
        call.num_told = call.num_tokens
        if not call.pending:
            self._abort(call)
        answer.set_result(outputs)

    def _abort(self, call: Call) -> None:
        """Remove `call` and abort its unfinished requests."""
        call.ended = True
        if call in self._calls:
            self._calls.remove(call)
        for request in call.requests:
            self.engine.abort(request.request_id)

    def _end(self) -> None:
        self._lose(InvalidInputError("the LLM was closed while this call waited; wait for calls before close()"))

    def _die(self, error: BaseException) -> None:
        with self._lock:
            self._closed = self._closed or f"the engine of this LLM has stopped ({error!r}); load the model again"
            commands, self._commands = self._commands, type(self._commands)()
        self._lose(error)
        while not commands.empty():
            command = commands.get()
            if command is not None:
                command()
        self._lose(error)

    def _lose(self, error: BaseException) -> None:
        for call in list(self._calls):
            call.error = error
            if call.answer is None:
                self._abort(call)
            self._tell(call)
