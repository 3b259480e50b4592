"""Selection: from scores and lengths to the tokens that stay."""

import torch


def keep_best(scores: torch.Tensor, protected: torch.Tensor, valid: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return [G, S] bool with exactly `counts[g]` (at most the valid) True in lane g.

    Protected tokens come first, then higher scores; equal scores are decided by position, the earlier stays.
    scores [G, S] float, protected and valid [G, S] bool, counts [G] int. A NaN score counts as the lowest.
    """
    if bool((protected.sum(1) <= counts).all()):  # then order among the protected does not matter
        value = _comparable(scores).masked_fill(protected & valid, float("inf"))
        leaving = valid.sum(1) - counts
        if int(leaving.max()) <= 1:
            return _without_last(value, valid, leaving > 0)
        value = value.masked_fill(~valid, float("-inf"))
        order = torch.argsort(value, dim=1, descending=True, stable=True)
    else:
        order = ranking(scores, protected, valid)
    keep = torch.zeros_like(valid)
    chosen = torch.arange(valid.shape[1], device=valid.device)[None, :] < counts[:, None]
    keep.scatter_(1, order, chosen)
    return keep & valid


def _without_last(value: torch.Tensor, valid: torch.Tensor, loses: torch.Tensor) -> torch.Tensor:
    """Return `valid` [G, S] without the lowest value, of equal ones the last, in the lanes where `loses` [G]."""
    backwards = value.masked_fill(~valid, float("inf")).flip(1)
    worst = valid.shape[1] - 1 - backwards.argmin(1)  # the first of equal ones
    return valid.scatter(1, worst[:, None], valid.gather(1, worst[:, None]) & ~loses[:, None])


def ranking(scores: torch.Tensor, protected: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return slots [G, S] from the most to the least deserving, padding last; ties in slot order."""
    by_score = torch.argsort(_comparable(scores), dim=1, descending=True, stable=True)
    tier = torch.where(valid, torch.where(protected, 2, 1), 0).gather(1, by_score)
    by_tier = torch.argsort(tier, dim=1, descending=True, stable=True)
    return by_score.gather(1, by_tier)


def _comparable(scores: torch.Tensor) -> torch.Tensor:
    """Return finite scores in float64; NaN counts as the lowest."""
    value = torch.nan_to_num(scores.double(), nan=float("-inf"), posinf=torch.finfo(torch.float64).max)
    return value.clamp(min=torch.finfo(torch.float64).min)


def standardised(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return scores with mean 0 and deviation 1 in each lane, so that lanes of any scale can be compared."""
    value = scores.double()
    count = valid.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(valid, value, 0).sum(1, keepdim=True) / count
    spread = torch.where(valid, (value - mean) ** 2, 0).sum(1, keepdim=True) / count
    return (value - mean) / spread.sqrt().clamp(min=1e-12)
