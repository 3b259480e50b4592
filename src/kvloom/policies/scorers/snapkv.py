"""SnapKV: the end of the prompt shows what the answer will attend to (Li et al., arXiv 2404.14469)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from kvloom.policies.context import ScoreContext
from kvloom.policies.needs import Needs
from kvloom.policies.scorer import RULES, Scorer
from kvloom.spec.method import Value


class SnapKV(Scorer):
    """Weights of the last `window` prompt queries, summed, pooled over neighbours, mean over the query group.

    Follows the authors' defaults (window 32, kernel 5, average) and one decision per KV head: scores are averaged over
    the group after pooling, as kvpress does; the authors' code decides per query head. The window stays.
    """

    weights = True

    def __init__(self, window: int, kernel: int, pooling: str) -> None:
        self.window = window
        self.kernel = kernel
        self.pooling = pooling
        self.needs = Needs(queries=window)

    def score(self, context: ScoreContext) -> torch.Tensor:
        """Return pooled attention mass of the window."""
        if self.pooling == "avg":  # then mean over the group and pooling may change places
            return pooled(context.window_mass(self.window), self.kernel, self.pooling)
        mass = context.window_attention(self.window).sum(1)  # [H, S]
        return context.by_lane(pooled(mass, self.kernel, self.pooling)).mean(1)

    def protected(self, context: ScoreContext) -> torch.Tensor:
        """Protect the window."""
        return context.newest(self.window)

    def num_protected(self, budget: int) -> int:
        """Return the window."""
        return self.window


def pooled(scores: torch.Tensor, kernel: int, kind: str) -> torch.Tensor:
    """Return scores [rows, S] pooled over neighbours, stride 1; an average counts the zeros beyond the ends."""
    if kernel == 1:
        return scores
    pool = F.avg_pool1d if kind == "avg" else F.max_pool1d
    smooth: torch.Tensor = pool(scores[:, None], kernel, stride=1, padding=kernel // 2)
    return smooth[:, 0, : scores.shape[1]]


def _snapkv(args: Mapping[str, Value]) -> SnapKV:
    return SnapKV(int(args["window"]), int(args["kernel"]), str(args["pooling"]))


RULES.register("snapkv", _snapkv)
