"""Occupancy: bounds of one request's bytes for admission, by the planner's formulas. Torch-free."""

from collections.abc import Sequence

from kvloom.policies.policy import Policy
from kvloom.spec.footprint import Footprint, future_bytes, request_footprint
from kvloom.spec.kv import KVSpec


class Occupancy:
    """Upper bounds for one request under `policy`; `layers` are those on which it acts."""

    def __init__(
        self, policy: Policy, spec: KVSpec, prompt_tokens: int, layers: Sequence[int], replay_tokens: int = 0
    ) -> None:
        """Plan for a prompt after which up to `replay_tokens` more are held for the time of a replay."""
        self.policy = policy
        self.spec = spec
        self.prompt_tokens = prompt_tokens
        self.budget = policy.tokens(prompt_tokens)
        self.layers = frozenset(layers)
        self.replay_tokens = replay_tokens
        self._known: dict[tuple[int, int], Footprint] = {}

    def may_drop(self, num_tokens: int) -> bool:
        """Return whether a sequence that grows to `num_tokens` can lose any token at all."""
        if self.policy.acts_below_budget:
            return True
        longest = num_tokens if self.policy.triggers.while_decoding else self.prompt_tokens
        return self.budget < longest

    def peak_bytes(self, num_tokens: int, chunk: int, sequences: int = 1) -> int:
        """Return the most arena bytes of a request on its way to `num_tokens`, in chunks of at most `chunk` tokens.

        Of several `sequences` each may need its own copy of all blocks after the prompt.
        """
        return self._footprint(num_tokens, chunk).peak_of(sequences)

    def future_bytes(self, held: Sequence[int], seen: int, num_tokens: int, chunk: int) -> int:
        """Return the most bytes of one sequence until `num_tokens`, whose lanes hold `held` of `seen` tokens."""
        found = None
        if seen >= self.prompt_tokens:
            found = future_bytes(self.spec, self.policy.spec, held, self.prompt_tokens, seen, num_tokens, self.layers)
        return self.peak_bytes(num_tokens, chunk) if found is None else found

    def _footprint(self, num_tokens: int, chunk: int) -> Footprint:
        """Return the footprint, computed once, because the scheduler needs it at every step."""
        found = self._known.get((num_tokens, chunk))
        if found is None:
            prompt = min(num_tokens, self.prompt_tokens)
            found = self._known[num_tokens, chunk] = request_footprint(
                self.spec,
                self.policy.spec,
                prompt,
                num_tokens - prompt,
                chunk,
                layers=self.layers,
                replay=self.replay_tokens,
            )
        return found
