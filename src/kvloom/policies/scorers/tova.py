"""TOVA: keep what the newest query attends to (Oren et al., arXiv 2401.06104)."""

from collections.abc import Mapping

import torch

from kvloom.policies.context import ScoreContext
from kvloom.policies.needs import Needs
from kvloom.policies.scorer import RULES, Scorer
from kvloom.spec.method import Value


class Tova(Scorer):
    """Weights of the newest query, averaged over all heads of the layer: every lane keeps the same tokens.

    Nothing is protected, as in the paper. When lanes of a layer hold different tokens (shared budgets), each is scored
    by its own keys and the average runs over its own query group.
    """

    needs = Needs(queries=1)
    per_chunk = True
    decodes = True
    weights = True

    def score(self, context: ScoreContext) -> torch.Tensor:
        """Return the mean weight over the heads of the layer."""
        weights = context.window_mass(1)  # [G, S]
        if bool((context.positions == context.positions[0]).all()):
            return weights.mean(0).expand(context.num_lanes, -1)
        return weights


def _tova(args: Mapping[str, Value]) -> Tova:
    return Tova()


RULES.register("tova", _tova)
