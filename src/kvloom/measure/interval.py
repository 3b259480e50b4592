"""Intervals: bootstrap intervals of means and exact intervals of shares. Torch-free."""

import math
import random
import statistics
from collections.abc import Sequence


def bootstrap_interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % interval of the mean of `values` (percentile bootstrap, Efron 1979), with a fixed seed.

    Of one value the interval is that value alone.
    """
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def share_interval(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a share, given `hits` of `trials` (Clopper and Pearson 1934).

    It covers the true share with at least `confidence`, also where none or all were hits; a bootstrap has no width
    there. Raises `ValueError` unless 0 <= hits <= trials and trials > 0.
    """
    if not 0 <= hits <= trials or trials < 1:
        raise ValueError(f"{hits} hits of {trials} trials are not a share: 0 <= hits <= trials must hold")
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else _share_with_tail(hits, trials, tail)
    high = 1.0 if hits == trials else 1 - _share_with_tail(trials - hits, trials, tail)
    return low, high


def _share_with_tail(hits: int, trials: int, tail: float) -> float:
    """Return the share at which `hits` or more of `trials` have the probability `tail`, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        chance = sum(
            math.comb(trials, n) * share**n * (1 - share) ** (trials - n) for n in range(hits, trials + 1)
        )
        low, high = (share, high) if chance < tail else (low, share)
    return (low + high) / 2
