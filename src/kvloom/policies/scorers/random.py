"""Random eviction: the floor that every method must beat, with or without sinks."""

from collections.abc import Mapping

import torch

from kvloom.policies.context import ScoreContext
from kvloom.policies.scorer import RULES, Scorer
from kvloom.spec.method import Value


class Random(Scorer):
    """A fixed pseudo-random number for each (seed, layer, lane, position): the same in any batch or chunking."""

    per_chunk = True
    decodes = True

    def __init__(self, sinks: int, seed: int) -> None:
        self.sinks = sinks
        self.seed = seed

    def score(self, context: ScoreContext) -> torch.Tensor:
        """Return uniform numbers from an integer hash (the finaliser of splitmix64, in 62 bits)."""
        lanes = torch.arange(context.num_lanes, dtype=torch.int64)[:, None]
        x = context.positions * 0x9E3779B1 + lanes * 0x85EBCA77 + context.layer * 0xC2B2AE3D + self.seed * 0x27D4EB2F
        x = x & 0x3FFFFFFFFFFFFFFF
        for shift, factor in ((30, 0x1B03738712FAD5C9), (27, 0x14D049BB133111EB)):
            x = ((x ^ (x >> shift)) * factor) & 0x3FFFFFFFFFFFFFFF
        return (x ^ (x >> 31)).double()

    def protected(self, context: ScoreContext) -> torch.Tensor:
        """Protect the sinks."""
        return context.first(self.sinks)

    def num_protected(self, budget: int) -> int:
        """Return the number of sinks."""
        return self.sinks


def _random(args: Mapping[str, Value]) -> Random:
    return Random(int(args["sinks"]), int(args["seed"]))


RULES.register("random", _random)
