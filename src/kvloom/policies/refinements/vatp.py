"""VATP: attention times the size of the value it brings (Guo et al., arXiv 2406.12335)."""

from collections.abc import Mapping

import torch

from kvloom.policies.context import ScoreContext
from kvloom.policies.refinement import REFINEMENTS, Refinement
from kvloom.spec.method import Value


class VATP(Refinement):
    """Multiplies a score by ||v||_1 of the token's value, and protects the first `sinks` positions.

    Sinks have much attention and tiny values: without protection the product would evict them.
    """

    def __init__(self, sinks: int) -> None:
        self.sinks = sinks

    def reweigh(self, scores: torch.Tensor, context: ScoreContext) -> torch.Tensor:
        """Return score * ||v||_1."""
        return scores * context.values.abs().sum(-1)

    def protected(self, context: ScoreContext) -> torch.Tensor:
        """Protect the sinks."""
        return context.first(self.sinks)


def _vatp(args: Mapping[str, Value]) -> VATP:
    return VATP(int(args["sinks"]))


REFINEMENTS.register("vatp", _vatp)
