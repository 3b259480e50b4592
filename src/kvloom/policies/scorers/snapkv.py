"""SnapKV: keeps tokens to which the end of the prompt attends (Li et al., arXiv 2404.14469)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from kvloom.policies.context import ScoreContext
from kvloom.policies.scorer import RULES, Scorer
from kvloom.spec.method import Value


class SnapKV(Scorer):
    """Mean weight over the last `window` prompt queries, pooled over neighbours, then mean over the query group.

    The window stays, and only the tokens before it are pooled, as in the authors' code (`[..., :-window]`): the last
    of them have neighbours on one side. Follows the authors' defaults (window 32, kernel 5, average) and one decision
    per KV head, with the mean over the group after pooling, as kvpress does; the authors' code decides per query head.
    Tokens of the window have their own mean weight as a score, for actions that merge.
    """

    def __init__(self, window: int, kernel: int, pooling: str) -> None:
        self.window = window
        self.kernel = kernel
        self.pooling = pooling

    def score(self, context: ScoreContext) -> torch.Tensor:
        """Return mean weights from 0 to 1, pooled before the window."""
        if self.pooling == "avg":  # then mean over the group and pooling may change places
            scores = self._pooled(context.window_mass(self.window))
        else:
            scores = context.by_lane(self._pooled(context.window_attention(self.window).sum(1))).mean(1)
        return scores / min(self.window, context.seen)

    def _pooled(self, mass: torch.Tensor) -> torch.Tensor:
        """Return mass [rows, S], whose last `window` slots are the window, pooled in the slots before it."""
        before = max(0, mass.shape[1] - self.window)
        return torch.cat((pooled(mass[:, :before], self.kernel, self.pooling), mass[:, before:]), dim=1)

    def protected(self, context: ScoreContext) -> torch.Tensor:
        """Protect the window."""
        return context.newest(self.window)


def pooled(scores: torch.Tensor, kernel: int, kind: str) -> torch.Tensor:
    """Return scores [rows, S] pooled over neighbours, stride 1; an average counts the zeros beyond the ends."""
    if kernel == 1 or not scores.shape[1]:
        return scores
    pool = F.avg_pool1d if kind == "avg" else F.max_pool1d
    smooth: torch.Tensor = pool(scores[:, None], kernel, stride=1, padding=kernel // 2)
    return smooth[:, 0, : scores.shape[1]]


def _snapkv(args: Mapping[str, Value]) -> SnapKV:
    return SnapKV(int(args["window"]), int(args["kernel"]), str(args["pooling"]))


RULES.register("snapkv", _snapkv)
