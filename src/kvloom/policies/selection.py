"""Selection: from scores and lengths to the tokens that stay."""

import torch


def keep_best(scores: torch.Tensor, protected: torch.Tensor, valid: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return [G, S] bool with exactly `counts[g]` (at most the valid) True in lane g.

    Protected tokens come first, then higher scores; equal scores are decided by position, the earlier stays.
    scores [G, S] float, protected and valid [G, S] bool, counts [G] int. A NaN score counts as the lowest.
    """
    if bool((protected.sum(1) <= counts).all()):  # then order among the protected does not matter
        leaving = valid.sum(1) - counts
        if int(leaving.max()) <= 1:
            return _without_last(scores, protected, valid, leaving > 0)
        value = _comparable(scores).masked_fill(protected & valid, float("inf")).masked_fill(~valid, float("-inf"))
        order = torch.argsort(value, dim=1, descending=True, stable=True)
    else:
        order = ranking(scores, protected, valid)
    keep = torch.zeros_like(valid)
    chosen = torch.arange(valid.shape[1], device=valid.device)[None, :] < counts[:, None]
    keep.scatter_(1, order, chosen)
    return keep & valid


def _without_last(
    scores: torch.Tensor, protected: torch.Tensor, valid: torch.Tensor, loses: torch.Tensor
) -> torch.Tensor:
    """Return `valid` [G, S] without the lowest-scored unprotected token, in the lanes where `loses` [G]."""
    value = torch.where(valid & ~protected, _comparable(scores), float("inf"))
    worst = valid.shape[1] - 1 - value.flip(1).argmin(1, keepdim=True)  # of equal ones the last
    return valid.scatter(1, worst, valid.gather(1, worst) & ~loses[:, None])


def ranking(scores: torch.Tensor, protected: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return slots [G, S]: protected ones first, then by descending score, padding last; ties in slot order."""
    by_score = torch.argsort(_comparable(scores), dim=1, descending=True, stable=True)
    tier = torch.where(valid, torch.where(protected, 2, 1), 0).gather(1, by_score)
    by_tier = torch.argsort(tier, dim=1, descending=True, stable=True)
    return by_score.gather(1, by_tier)


def _comparable(scores: torch.Tensor) -> torch.Tensor:
    """Return finite scores in float64; NaN counts as the lowest."""
    return torch.nan_to_num(scores.double(), nan=torch.finfo(torch.float64).min)


def standardised(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return scores with mean 0 and deviation 1 in each lane, so that lanes of any scale can be compared."""
    value = scores.double()
    count = valid.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(valid, value, 0).sum(1, keepdim=True) / count
    spread = torch.where(valid, (value - mean) ** 2, 0).sum(1, keepdim=True) / count
    return (value - mean) / spread.sqrt().clamp(min=1e-12)
