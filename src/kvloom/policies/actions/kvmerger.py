"""KVMerger: runs of similar neighbours become one token each (Wang et al., arXiv 2407.08454)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from kvloom.cache.survivors import Survivors
from kvloom.policies.action import ACTIONS, Action, folded
from kvloom.policies.context import ScoreContext
from kvloom.spec.method import Value


class KVMerger(Action):
    """Evicted tokens are folded into the best-scored survivor of their run, with weights of a Gaussian kernel.

    A run is a stretch of held tokens each of whose keys has a cosine above `similarity` to the one before. The weight
    is exp(-||k - k_p||^2 / (2 sigma^2)) against 1 for the survivor p, sigma being the mean distance to p within the
    run over sqrt(2). In the paper the runs alone decide how much is kept; here scorer and budget do, and evicted
    tokens in a run without survivor are dropped. Keys are merged as they lie in the cache, rotated.
    """

    def __init__(self, similarity: float, mass: bool) -> None:
        self.similarity = similarity
        self.mass = mass

    def merge(self, context: ScoreContext, keep: torch.Tensor, scores: torch.Tensor) -> list[Survivors] | None:
        """Return survivors with what was folded into them."""
        target = torch.full(keep.shape, -1, dtype=torch.int64)
        weight = torch.zeros(keep.shape, dtype=torch.float64)
        slots = torch.arange(keep.shape[1])
        for head in range(context.num_lanes):
            keys = context.keys[head].double()
            alike = F.cosine_similarity(keys[1:], keys[:-1], dim=-1) > self.similarity
            run = torch.cat((torch.zeros(1, dtype=torch.int64), (~alike).cumsum(0)))
            pivot = torch.full((int(run[-1]) + 1,), -1, dtype=torch.int64)
            order = torch.argsort(scores[head].double(), descending=True, stable=True)
            for slot in order[keep[head, order]].flip(0).tolist():  # the best of each run comes last
                pivot[run[slot]] = slot
            into = torch.where(context.valid[head] & ~keep[head], pivot[run], -1)
            moved = slots[into >= 0]
            distance = torch.linalg.vector_norm(keys[moved] - keys[into[moved]], dim=-1)
            members = torch.zeros(len(pivot), dtype=torch.float64).index_add(0, run[moved], torch.ones_like(distance))
            sigma = torch.zeros_like(members).index_add(0, run[moved], distance) / members / 2**0.5
            spread = 2 * sigma[run[moved]] ** 2
            target[head] = into
            weight[head, moved] = torch.where(spread > 0, torch.exp(-(distance**2) / spread), 1.0)
        return folded(context, keep, target, weight, self.mass)


def _kvmerger(args: Mapping[str, Value]) -> KVMerger:
    return KVMerger(float(args["similarity"]), bool(args["mass"]))


ACTIONS.register("kvmerger", _kvmerger)
