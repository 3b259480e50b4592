"""StreamingLLM and the plain window: keep the first and the newest tokens (Xiao et al., arXiv 2309.17453)."""

from collections.abc import Mapping

import torch

from kvloom.policies.context import ScoreContext
from kvloom.policies.scorer import RULES, Scorer
from kvloom.spec.method import Value


class Streaming(Scorer):
    """Keeps the first `sinks` positions and the newest tokens; 0 sinks is the plain window."""

    def __init__(self, sinks: int) -> None:
        self.sinks = sinks

    def score(self, context: ScoreContext) -> torch.Tensor:
        """Return the position: newer is better."""
        return context.positions.double()

    def protected(self, context: ScoreContext) -> torch.Tensor:
        """Protect the sinks."""
        return context.first(self.sinks)


def _streaming(args: Mapping[str, Value]) -> Streaming:
    return Streaming(int(args["sinks"]))


def _window(args: Mapping[str, Value]) -> Streaming:
    return Streaming(0)


RULES.register("streaming", _streaming)
RULES.register("window", _window)
