"""Random eviction: the floor that every method must beat, with or without sinks."""

from collections.abc import Mapping

import torch

from kvloom.policies.context import ScoreContext
from kvloom.policies.draws import uniform_draws
from kvloom.policies.scorer import RULES, Scorer
from kvloom.spec.method import Value


class Random(Scorer):
    """A fixed pseudo-random number for each (seed, layer, lane, position): the same in any batch or chunking."""

    def __init__(self, sinks: int, seed: int) -> None:
        self.sinks = sinks
        self.seed = seed

    def score(self, context: ScoreContext) -> torch.Tensor:
        """Return uniform numbers (see `uniform_draws`)."""
        return uniform_draws(context.positions, context.layer, self.seed)

    def protected(self, context: ScoreContext) -> torch.Tensor:
        """Protect the sinks."""
        return context.first(self.sinks)


def _random(args: Mapping[str, Value]) -> Random:
    return Random(int(args["sinks"]), int(args["seed"]))


RULES.register("random", _random)
