"""D2O: an evicted token is folded into its nearest survivor if that is near enough (Wan et al., arXiv 2406.13035)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from kvloom.cache.survivors import Survivors
from kvloom.policies.action import ACTIONS, Action, folded
from kvloom.policies.context import ScoreContext
from kvloom.spec.method import Value


class D2O(Action):
    """Nearest by cosine of cached keys; merged when at least as similar as a running mean of such similarities.

    The running mean starts at the mean of the first eviction and moves by `1 - decay` with each later one. Weights are
    the paper's, exp(cosine) against e for the survivor itself, normalised (the authors' code leaves them unnormalised,
    so that norms shrink). Each lane decides for itself; keys are merged as they lie in the cache, rotated. The paper's
    budget by layers (dense layers get more) is not part of merging: name a budget for that.
    """

    def __init__(self, decay: float, mass: bool) -> None:
        self.decay = decay
        self.mass = mass

    def merge(self, context: ScoreContext, keep: torch.Tensor, scores: torch.Tensor) -> list[Survivors] | None:
        """Return survivors with what was folded into them."""
        target = torch.full(keep.shape, -1, dtype=torch.int64)
        weight = torch.zeros(keep.shape, dtype=torch.float64)
        threshold = context.state.get("d2o", torch.full((context.num_lanes,), float("nan"), dtype=torch.float64))
        updated = threshold.clone()
        for head in range(context.num_lanes):
            kept = torch.nonzero(keep[head]).flatten()
            gone = torch.nonzero(context.valid[head] & ~keep[head]).flatten()
            if not len(kept) or not len(gone):
                continue
            direction = F.normalize(context.keys[head].double(), dim=-1)
            similarity, nearest = (direction[gone] @ direction[kept].T).max(dim=1)
            mean = similarity.mean()
            known = threshold[head]
            updated[head] = mean if bool(known.isnan()) else self.decay * known + (1 - self.decay) * mean
            merges = similarity >= updated[head]
            target[head, gone[merges]] = kept[nearest[merges]]
            weight[head, gone[merges]] = torch.exp(similarity[merges] - 1)
        context.state["d2o"] = updated
        return folded(context, keep, target, weight, self.mass)


def _d2o(args: Mapping[str, Value]) -> D2O:
    return D2O(float(args["decay"]), bool(args["mass"]))


ACTIONS.register("d2o", _d2o)
