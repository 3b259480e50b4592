"""EngineThread: the only thread that uses an engine. Commands arrive by a queue and run between two steps."""

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from kvloom.engine.engine import Engine
from kvloom.kernels.threads import keep_one_torch_thread

T = TypeVar("T")
Command = Callable[[], None]


class EngineThread(ABC):
    """Rounds of commands and a step, in a thread of their own. `stop` and `call` are for any thread.

    A subclass defines when to step and how, and is called at the end of each round, at the thread's end, and for an
    error that ends it. All those methods run in the thread.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def stop(self) -> None:
        """End after the current step and abort running requests. Waits for the thread."""
        self._commands.put(None)
        if self._thread.is_alive() and not self.is_current:
            self._thread.join()

    def call(self, function: Callable[[Engine], T]) -> "Future[T]":
        """Run `function` between two steps and return its future result; what it raises is raised by the future."""
        done: Future[T] = Future()

        def command() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                result = function(self.engine)
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(result)

        self._put(command)
        return done

    @property
    def is_current(self) -> bool:
        """True in the engine's thread itself, which must not wait for its own commands."""
        return threading.current_thread() is self._thread

    def _put(self, command: Command) -> None:
        """Queue `command` for the next round."""
        self._commands.put(command)

    def _run(self) -> None:
        if not self.engine.runner.model.computes_in_torch:
            keep_one_torch_thread()
        try:
            while self._take_commands():
                if self._wants_step():
                    self._step()
                self._finish_round()
            self._end()
        except BaseException as error:
            self._die(error)

    def _take_commands(self) -> bool:
        """Run queued commands; wait for a first command when there is no other work; False to end."""
        if not self._wants_step():
            command = self._commands.get()
            if command is None:
                return False
            command()
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    @abstractmethod
    def _wants_step(self) -> bool:
        """Return whether to step now, rather than to wait for a command."""

    @abstractmethod
    def _step(self) -> None:
        """Run one step of the engine. What it raises ends the thread."""

    @abstractmethod
    def _finish_round(self) -> None:
        """Deliver the results of the round to those who wait."""

    @abstractmethod
    def _end(self) -> None:
        """Abort running requests, because the thread was stopped."""

    @abstractmethod
    def _die(self, error: BaseException) -> None:
        """Report to those who wait that `error` has ended the thread."""
