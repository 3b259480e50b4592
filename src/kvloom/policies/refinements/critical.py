"""CriticalKV: half of the budget by attention, the rest by attention times output (Feng et al., arXiv 2502.03805)."""

from collections.abc import Mapping

import torch

from kvloom.policies.context import ScoreContext
from kvloom.policies.refinement import REFINEMENTS, Refinement
from kvloom.policies.selection import keep_best
from kvloom.spec.method import Value


class Critical(Refinement):
    """The first half goes to the best scores, the second to the best (score + eps) * ||W_O v||_1.

    `eps` has the unit of the scores, mean attention weights of one query (from 0 to 1), as in the authors' code. The
    norm is the mean over the query group, as in kvpress; protected tokens count into the first half.
    """

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def choose(
        self, scores: torch.Tensor, protected: torch.Tensor, counts: torch.Tensor, context: ScoreContext
    ) -> torch.Tensor:
        """Return the tokens of both stages (see `Refinement`)."""
        first = keep_best(scores, protected, context.valid, counts // 2)
        norms = context.by_lane(context.output_norms(1)).mean(1)
        second = keep_best((scores + self.eps) * norms, protected | first, context.valid, counts)
        return second


def _critical(args: Mapping[str, Value]) -> Critical:
    return Critical(float(args["eps"]))


REFINEMENTS.register("critical", _critical)
