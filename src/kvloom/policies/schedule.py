"""Schedule: when a policy acts on a sequence, and how much of a cached prefix that allows. Torch-free."""

import numpy as np
from numpy.typing import NDArray

from kvloom.cache.lanes import LaneTable
from kvloom.policies.policy import Policy


class Schedule:
    """The moments at which `policy` acts on one sequence, by what its `acting` lanes hold."""

    def __init__(self, policy: Policy, lanes: LaneTable, acting: NDArray[np.int64], prompt_tokens: int) -> None:
        """Plan for a prompt of `prompt_tokens`."""
        self.policy = policy
        self.lanes = lanes
        self.acting = acting
        self.prompt_tokens = prompt_tokens
        self.budget = policy.tokens(prompt_tokens)

    @property
    def usable_prefix(self) -> int:
        """Prompt tokens that may come from the prefix cache without changing what is kept.

        A prefix is computed with everything in sight. Tokens that come after an eviction are not, so a policy that acts
        per chunk can take over no more than what comes before its first eviction.
        """
        chunk = self.policy.triggers.chunk
        end = self.prompt_tokens
        if chunk is not None:
            first = chunk if self.policy.acts_below_budget else (self.budget // chunk + 1) * chunk
            end = min(end, first)
        usable = self.policy.needs.usable_prefix(end)
        return min(usable, end - 1) if end < self.prompt_tokens else usable

    def next_boundary(self, seen: int) -> int | None:
        """Return how many tokens may be seen before the policy must look again; None without a limit."""
        return self.policy.triggers.next_boundary(seen, self.prompt_tokens)

    def due(self, row: int, acted_at: int) -> bool:
        """Return whether the policy has to act now, after a forward pass, when it last acted at `acted_at` tokens."""
        seen = int(self.lanes.seen[row])
        over = seen - acted_at if self.policy.spec.method.chooses else self.excess(row)
        return self.policy.triggers.due(seen, self.prompt_tokens, over)

    def nothing_to_drop(self, row: int) -> bool:
        """Return whether acting would change nothing."""
        return not self.policy.acts_below_budget and self.excess(row) <= 0

    def excess(self, row: int) -> int:
        """Return by how many tokens lanes exceed their budget: on average where they share it, else the longest."""
        held = self.lanes.held[row, self.acting]
        if self.policy.spec.sharing.trades:
            return -(-int(held.sum()) // len(held)) - self.budget
        return int(held.max()) - self.budget
