"""Expected Attention: expected weights under a Gaussian of future queries (Devoto et al., arXiv 2510.00636)."""

from collections.abc import Mapping

import torch

from kvloom.policies.context import ScoreContext
from kvloom.policies.scorer import RULES, Scorer
from kvloom.spec.method import Value


class ExpectedAttention(Scorer):
    """Softmax of the log moment-generating function of the coming queries at each key, times the value's norm.

    Queries before rope are taken to be Gaussian with the prompt's mean and covariance (the first `sinks` left out);
    rope is averaged over the next `horizon` positions. Softmax over keys but the sinks, mean over the query group,
    then (a + eps) ||v||_2, as in kvpress; the sinks stay.
    """

    def __init__(self, horizon: int, sinks: int, eps: float) -> None:
        self.horizon = horizon
        self.sinks = sinks
        self.eps = eps

    def score(self, context: ScoreContext) -> torch.Tensor:
        """Return expected weights times value norms."""
        norms: torch.Tensor = torch.linalg.vector_norm(context.values.double(), dim=-1)
        moments = context.query_moments
        if moments is None:  # a prompt of sinks only has no statistics
            return norms
        turn = average_rotation(context.inverse_frequencies, context.seen, self.horizon, context.keys.shape[-1])
        mean = moments.mean @ turn.T  # [H, D]
        spread = turn @ moments.covariance @ turn.T  # [H, D, D]
        keys = context.keys.double()
        by_mean = torch.einsum("grd,gsd->grs", context.by_lane(mean), keys) * context.scale
        by_spread = torch.einsum("gsd,grde,gse->grs", keys, context.by_lane(spread), keys) * context.scale**2 / 2
        open_to = context.valid & ~context.first(self.sinks)
        logits = (by_mean + by_spread).masked_fill(~open_to[:, None], float("-inf"))
        weights = torch.nan_to_num(torch.softmax(logits, dim=-1)).mean(1)
        scores: torch.Tensor = (weights + self.eps) * norms
        return scores

    def protected(self, context: ScoreContext) -> torch.Tensor:
        """Protect the sinks."""
        return context.first(self.sinks)


def average_rotation(theta: torch.Tensor | None, start: int, count: int, width: int) -> torch.Tensor:
    """Return the mean [D, D] of the rope matrices of positions start .. start + count - 1, half-split pairs."""
    if theta is None:
        return torch.eye(width, dtype=torch.float64)
    angles = torch.arange(start, start + count, dtype=torch.float64)[:, None] * theta.double()
    cos, sin = torch.diag(angles.cos().mean(0)), torch.diag(angles.sin().mean(0))
    return torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)))


def _expected(args: Mapping[str, Value]) -> ExpectedAttention:
    return ExpectedAttention(int(args["horizon"]), int(args["sinks"]), float(args["eps"]))


RULES.register("expected", _expected)
