"""CaM: adds the values of evicted tokens to later kept ones (Zhang et al., ICML 2024)."""

from collections.abc import Mapping

import torch

from kvloom.cache.survivors import Survivors
from kvloom.policies.action import ACTIONS, Action
from kvloom.policies.context import ScoreContext
from kvloom.policies.draws import uniform_draws
from kvloom.spec.method import Value


class CaM(Action):
    """Adds v / m of an evicted token to the values of the next m = `window` kept ones, with a probability.

    The probability is the token's attention so far over the mean of those m, at most 1 (0 / 0 counts as 0); keys are
    dropped. Near the end of a lane m is the number of kept tokens that follow. Draws depend on the request's seed,
    layer, lane and position alone. Attention is the mass of all queries, mean over the query group.
    """

    def __init__(self, window: int) -> None:
        self.window = window

    def merge(self, context: ScoreContext, keep: torch.Tensor, scores: torch.Tensor) -> list[Survivors] | None:
        """Return survivors with what was added to their values."""
        draws = uniform_draws(context.positions, context.layer, context.request_seed)
        survivors = []
        for head in range(context.num_lanes):
            kept = torch.nonzero(keep[head]).flatten()
            gone = torch.nonzero(context.valid[head] & ~keep[head]).flatten()
            mass = context.key_mass[head]
            first = torch.searchsorted(kept, gone)  # of the kept ones that follow
            count = (len(kept) - first).clamp(max=self.window)
            sums = torch.cat((torch.zeros(1, dtype=torch.float64), mass[kept].double().cumsum(0)))
            mean = (sums[first + count] - sums[first]) / count
            chance = torch.nan_to_num(mass[gone] / mean, nan=0.0, posinf=1.0).clamp(0, 1)
            merges = (draws[head, gone] < chance) & (count > 0)
            # each merge adds v / m to a run of kept slots: differences at its ends, then a running sum
            width = context.values.shape[2]
            steps = torch.zeros(len(kept) + 1, width, dtype=torch.float64)
            part = context.values[head, gone[merges]].double() / count[merges, None]
            steps.index_add_(0, first[merges], part).index_add_(0, (first + count)[merges], -part)
            values = context.values[head, kept].double() + steps.cumsum(0)[:-1]
            survivors.append(Survivors(context.keys[head, kept], values.float()))
        return survivors


def _cam(args: Mapping[str, Value]) -> CaM:
    return CaM(int(args["window"]))


ACTIONS.register("cam", _cam)
