"""Triggers: the moments at which a policy acts on a sequence."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Triggers:
    """The moments at which a policy acts; each is checked after a forward pass.

    prefill     the prompt is complete
    chunk       this many prompt tokens were processed (and the prompt is complete); None: no
    every       this many tokens were generated since the prompt; None: no
    slack       a lane exceeds what it may hold by this many tokens; 0 is the paper's "at every step"; None: no
    """

    prefill: bool = False
    chunk: int | None = None
    every: int | None = None
    slack: int | None = None

    def union(self, other: "Triggers") -> "Triggers":
        """Return the moments of both; of two periods or slacks the smaller counts."""
        return Triggers(
            self.prefill or other.prefill,
            _smaller(self.chunk, other.chunk),
            _smaller(self.every, other.every),
            _smaller(self.slack, other.slack),
        )

    @property
    def while_decoding(self) -> bool:
        """True when the policy goes on after the prompt, so that a sequence's memory is bounded."""
        return self.every is not None or self.slack is not None

    @property
    def excess(self) -> int | None:
        """Most tokens by which a lane may exceed its budget while decoding; None without a limit."""
        return _smaller(self.every, None if self.slack is None else self.slack + 1)

    def next_boundary(self, seen: int, prompt_tokens: int) -> int | None:
        """Return the number of tokens that may be seen before the policy must look again, None without a limit."""
        if seen >= prompt_tokens:
            return seen + 1
        if self.chunk is not None:
            return min(prompt_tokens, (seen // self.chunk + 1) * self.chunk)
        return prompt_tokens

    def due(self, seen: int, prompt_tokens: int, over: int) -> bool:
        """Return whether to act with `seen` tokens processed and a lane `over` tokens above what it may hold."""
        if seen < prompt_tokens:
            return self.chunk is not None and seen % self.chunk == 0
        if seen == prompt_tokens:
            return self.prefill or self.chunk is not None or (self.slack is not None and over > self.slack)
        if self.slack is not None and over > self.slack:
            return True
        return self.every is not None and (seen - prompt_tokens) % self.every == 0


def _smaller(a: int | None, b: int | None) -> int | None:
    return min((x for x in (a, b) if x is not None), default=None)
