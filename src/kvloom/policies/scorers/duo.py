"""DuoAttention: retrieval heads keep everything, streaming heads sinks and newest (Xiao et al., arXiv 2410.10819)."""

from collections.abc import Mapping, Sequence

import torch

from kvloom.errors import InvalidInputError
from kvloom.policies.context import ScoreContext
from kvloom.policies.scorer import RULES, Selector
from kvloom.spec.headpattern import read_pattern
from kvloom.spec.kv import KVSpec
from kvloom.spec.method import Value


class Duo(Selector):
    """A pattern [layers][KV heads] of numbers from 0 to 1, learned elsewhere, tells the heads apart.

    Heads of at least `threshold` are retrieval heads; the others keep the first `sinks` positions and the newest
    `window` tokens.
    """

    def __init__(self, pattern: Sequence[Sequence[float]], threshold: float, sinks: int, window: int) -> None:
        self.retrieves = [[value >= threshold for value in row] for row in pattern]
        self.sinks = sinks
        self.window = window

    def keep(self, context: ScoreContext) -> torch.Tensor:
        """Return everything for retrieval heads, sinks and window for the others."""
        streaming = context.first(self.sinks) | context.newest(self.window)
        retrieval = torch.tensor(self.retrieves[context.layer])[:, None]
        return torch.where(retrieval, context.valid, streaming)

    def refusals(self, kv: KVSpec) -> list[str]:
        """Refuse a pattern of another model."""
        shape, own = [len(row) for row in self.retrieves], [layer.num_lanes for layer in kv.layers]
        if shape == own:
            return []
        heads = sorted(set(shape))
        return [
            f"the pattern has {len(shape)} layers of {heads} heads; "
            f"this model has {len(own)} layers of {sorted(set(own))} KV heads"
        ]


def _duo(args: Mapping[str, Value]) -> Duo:
    if "pattern" not in args:
        raise InvalidInputError("duo needs the file that says which heads retrieve: duo(pattern=heads.json)")
    pattern = read_pattern(str(args["pattern"]))
    return Duo(pattern, float(args["threshold"]), int(args["sinks"]), int(args["window"]))


RULES.register("duo", _duo)
