"""FastGen: each head gets the cheapest cache that still recovers its attention (Ge et al., arXiv 2310.01801)."""

from collections.abc import Mapping

import torch

from kvloom.policies.context import ScoreContext
from kvloom.policies.scorer import RULES, Selector
from kvloom.policies.selection import keep_best
from kvloom.spec.method import Value

FULL = 4
"""Number of the policy that keeps everything; 0 to 3 are those that `FastGen` names, cheapest first."""


class FastGen(Selector):
    """Profiles every lane when the prompt is complete and keeps to the policy that it chose.

    Policies, each with all before it: special tokens; + punctuation; + the `frequent` part of the prompt with most
    attention; + the newest `recent` part; everything. Chosen is the first whose tokens received on average at least
    `recovery` of a query's attention (mean over the query group), as in the public reproduction; the paper compares
    attention maps instead. A mean over queries is a sum over columns, so no map is ever built. Position 0 always stays:
    text whose tokenizer adds no BOS would have no special token at all.
    """

    def __init__(self, recovery: float, recent: float, frequent: float) -> None:
        self.recovery = recovery
        self.recent = recent
        self.frequent = frequent

    def keep(self, context: ScoreContext) -> torch.Tensor:
        """Return the tokens that the chosen policies keep; the choice is made once and stored in the state."""
        sets = self._sets(context)
        if "profile" not in context.state:
            context.state["profile"] = self._profile(context, sets)
        chosen = context.state["profile"]
        return torch.stack([sets[int(policy)][head] for head, policy in enumerate(chosen)])

    def _sets(self, context: ScoreContext) -> list[torch.Tensor]:
        """Return what policies 0 to 4 keep, [G, S] bool each."""
        special = context.valid & (context.special | (context.positions == 0))
        punctuation = special | (context.valid & context.punctuation)
        count = torch.full((context.num_lanes,), int(self.frequent * context.prompt_tokens))
        frequent = punctuation | keep_best(context.key_mass, torch.zeros_like(special), context.valid, count)
        local = frequent | context.newest(int(self.recent * context.prompt_tokens))
        return [special, punctuation, frequent, local, context.valid]

    def _profile(self, context: ScoreContext, sets: list[torch.Tensor]) -> torch.Tensor:
        """Return the number of the cheapest sufficient policy of each lane, [G] int64."""
        mass, near = context.key_mass, context.near_mass
        recovered = []
        for number in range(FULL):
            fixed = sets[min(number, 2)]
            kept = torch.where(fixed, mass, near if number == 3 else torch.zeros_like(mass))
            recovered.append(torch.where(context.valid, kept, 0).sum(1) / context.seen >= self.recovery)
        enough = torch.stack([*recovered, torch.ones_like(recovered[0])], dim=1)
        return enough.int().argmax(1)


def _fastgen(args: Mapping[str, Value]) -> FastGen:
    return FastGen(float(args["recovery"]), float(args["recent"]), float(args["frequent"]))


RULES.register("fastgen", _fastgen)
