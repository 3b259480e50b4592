"""Triggers: when a policy looks at a sequence. Torch-free."""

from dataclasses import dataclass

from kvloom.spec.policy import PolicySpec


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

    @classmethod
    def of(cls, spec: PolicySpec) -> "Triggers":
        """Return the triggers that a policy string names."""
        by_name = {term.name: term for term in spec.triggers}
        return cls(
            prefill="prefill" in by_name,
            chunk=by_name["chunk"].number("tokens") if "chunk" in by_name else None,
            every=by_name["every"].number("tokens") if "every" in by_name else None,
            slack=0 if "step" in by_name else by_name["slack"].number("tokens") if "slack" in by_name else None,
        )

    @property
    def while_decoding(self) -> bool:
        """True when the policy goes on after the prompt, so that a sequence's memory is bounded."""
        return self.every is not None or self.slack is not None

    def excess(self) -> int:
        """Return by how many tokens a lane may exceed its budget while decoding."""
        if self.slack is not None:
            return self.slack + 1
        return 0 if self.every is None else self.every

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
