"""H2O: heavy hitters are the keys with the most attention so far (Zhang et al., arXiv 2306.14048)."""

from collections.abc import Mapping

import torch

from kvloom.policies.context import ScoreContext
from kvloom.policies.scorer import RULES, Scorer
from kvloom.spec.method import Value


class H2O(Scorer):
    """Mean attention over all past queries; `recent` of the budget goes to the newest tokens.

    Causal, as the authors' generation code is (their simulator looks ahead): the mass is exact at prefill, by the
    log-sum-exp, and goes on during decode over the surviving keys. Sinks are not protected: they win by score.
    """

    def __init__(self, recent: float) -> None:
        self.recent = recent

    def score(self, context: ScoreContext) -> torch.Tensor:
        """Return the accumulated mass over the number of queries: the sum's order, with a weight's unit."""
        return context.key_mass / context.seen

    def protected(self, context: ScoreContext) -> torch.Tensor:
        """Protect the newest tokens."""
        return context.newest(int(self.recent * context.budget))


def _h2o(args: Mapping[str, Value]) -> H2O:
    return H2O(float(args["recent"]))


RULES.register("h2o", _h2o)
