"""Updates from the engine's thread to the event loop about a request: new tokens, and its end."""

from dataclasses import dataclass, field

from kvloom.engine.output import KVUsage
from kvloom.engine.request import Logprob
from kvloom.server.refusal import Refusal


@dataclass
class Delta:
    """The part of one answer that is new since the last delta."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, later: "Delta") -> None:
        """Append a later delta of the same answer; mutates self."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.finish_reason = later.finish_reason or self.finish_reason
        self.stop_reason = later.stop_reason if later.stop_reason is not None else self.stop_reason


@dataclass
class Update:
    """Update of request number `place` of a body: deltas by answer, KV cache so far, its end or its error."""

    place: int
    deltas: dict[int, Delta] = field(default_factory=dict)
    kv: KVUsage | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    ended: bool = False
    error: Refusal | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that the answers gained."""
        return sum(len(delta.token_ids) for delta in self.deltas.values())

    def add(self, later: "Update") -> None:
        """Merge a later update of the same request; mutates self."""
        for index, delta in later.deltas.items():
            if index in self.deltas:
                self.deltas[index].add(delta)
            else:
                self.deltas[index] = delta
        self.kv = later.kv or self.kv
        self.prompt_logprobs = later.prompt_logprobs or self.prompt_logprobs
        self.ended |= later.ended
        self.error = later.error or self.error
