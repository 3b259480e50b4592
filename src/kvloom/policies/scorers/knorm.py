"""Knorm: keeps keys of small L2 norm, which get much attention (Devoto et al., arXiv 2406.11430)."""

from collections.abc import Mapping

import torch

from kvloom.policies.context import ScoreContext
from kvloom.policies.scorer import RULES, Scorer
from kvloom.spec.method import Value


class Knorm(Scorer):
    """Keeps the lowest ||k||_2 in float32; rotation preserves norms, so cached keys serve.

    Nothing is evicted from the first `skip_layers` layers, as in the authors' code, because norms predict little there.
    Nothing is protected.
    """

    def score(self, context: ScoreContext) -> torch.Tensor:
        """Return minus the norm."""
        norms: torch.Tensor = torch.linalg.vector_norm(context.keys, dim=-1)
        return -norms


def _knorm(args: Mapping[str, Value]) -> Knorm:
    return Knorm()


RULES.register("knorm", _knorm)
