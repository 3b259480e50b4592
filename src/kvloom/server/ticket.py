"""Ticket: one prompt of an HTTP request in the engine. `Ledger`: the updates sent about it."""

import time
from dataclasses import dataclass, field

from kvloom.engine.engine import Engine
from kvloom.engine.params import SamplingParams
from kvloom.engine.request import Request, Sequence, Status
from kvloom.server.answer import Delta, Update
from kvloom.server.feed import Feed
from kvloom.spec.policy import PolicySpec


@dataclass(eq=False)
class Ticket:
    """A prompt to run. `place` is its number in the body.

    `streaming` asks for updates after every token, `live_usage` for the cache usage in each. `request` is set by the
    engine's thread when it takes the ticket. `arrived` is in `time.monotonic()` seconds.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    feed: Feed
    place: int = 0
    prompt: str | None = None
    priority: int = 0
    cache_salt: str = ""
    kv_policy: PolicySpec | None = None
    streaming: bool = False
    live_usage: bool = False
    arrived: float = field(default_factory=time.monotonic)
    request: Request | None = None

    @property
    def waiting(self) -> bool:
        """True until the engine gave it its first slots, and again while it is preempted. For any thread."""
        request = self.request
        return request is None or request.sequences[0].status is Status.WAITING


@dataclass(eq=False)
class Ledger:
    """The engine thread's record of a running ticket: how much of each answer has been sent."""

    ticket: Ticket
    request: Request
    told: list[tuple[int, int]] = field(default_factory=list)
    last_token: float | None = None

    def update(self, engine: Engine, ended: bool) -> Update:
        """Return the update since the last call; mutates the record."""
        while len(self.told) < len(self.request.sequences):
            self.told.append((0, 0))
        update = Update(self.ticket.place, ended=ended)
        for index, sequence in enumerate(self.request.sequences):
            delta = self._delta(index, sequence)
            if delta is not None:
                update.deltas[index] = delta
        if ended or self.ticket.live_usage:
            update.kv = engine.kv_usage(self.request)
        update.prompt_logprobs = self.request.prompt_logprobs
        return update

    def _delta(self, index: int, sequence: Sequence) -> Delta | None:
        num_tokens, num_chars = self.told[index]
        text = sequence.detokenizer.text if sequence.detokenizer is not None else ""
        begin = len(self.request.prompt_token_ids) + num_tokens
        tokens = sequence.token_ids[begin:]
        if not tokens and len(text) == num_chars:
            return None
        self.told[index] = (num_tokens + len(tokens), len(text))
        return Delta(
            text=text[num_chars:],
            token_ids=tokens,
            logprobs=sequence.logprobs[num_tokens : num_tokens + len(tokens)],
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )
