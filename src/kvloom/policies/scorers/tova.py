"""TOVA: keeps tokens to which the newest query attends (Oren et al., arXiv 2401.06104)."""

from collections.abc import Mapping

import torch

from kvloom.policies.context import ScoreContext
from kvloom.policies.scorer import RULES, Scorer
from kvloom.spec.method import Value


class Tova(Scorer):
    """Weights of the newest query, averaged over all heads of the layer: every lane keeps the same tokens.

    Nothing is protected, as in the paper. When lanes of a layer hold different tokens (shared budgets), each is scored
    by its own keys and the average runs over its own query group.
    """

    def score(self, context: ScoreContext) -> torch.Tensor:
        """Return the mean weight over the heads of the layer."""
        weights, positions = context.window_mass(1), context.positions
        alike = (positions == positions[..., :1, :]).all(-1, keepdim=True).all(-2, keepdim=True)  # in each layer
        return torch.where(alike, weights.mean(-2, keepdim=True), weights)


def _tova(args: Mapping[str, Value]) -> Tova:
    return Tova()


RULES.register("tova", _tova)
