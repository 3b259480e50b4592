"""Refinement: changes the selection by another method's scores (VATP weighs them, CriticalKV selects in two stages)."""

from collections.abc import Callable, Mapping

import torch

from kvloom.policies.context import ScoreContext
from kvloom.policies.selection import keep_best
from kvloom.registry import Registry
from kvloom.spec.method import Value


class Refinement:
    """A modifier of any scorer; the default changes nothing. Instances are immutable.

    In a refinement whose row says `chooses`, `choose` replaces taking the best scores; at most one of a policy may.
    """

    def reweigh(self, scores: torch.Tensor, context: ScoreContext) -> torch.Tensor:
        """Return changed scores [G, S]; budgets are divided by these."""
        return scores

    def protected(self, context: ScoreContext) -> torch.Tensor:
        """Return [G, S] bool: further tokens that stay, at most as many as the method's row says."""
        return torch.zeros_like(context.valid)

    def choose(
        self, scores: torch.Tensor, protected: torch.Tensor, counts: torch.Tensor, context: ScoreContext
    ) -> torch.Tensor:
        """Return [G, S] bool with `counts` [G] True in each lane (called only where the row says `chooses`)."""
        return keep_best(scores, protected, context.valid, counts)


REFINEMENTS: Registry[Callable[[Mapping[str, Value]], Refinement]] = Registry("refinement")
