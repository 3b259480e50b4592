"""Intervals: studentised bootstrap intervals of means and exact intervals of shares. Torch-free."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182}
"""The 97.5 % point of Student's t for a mean of so few values, whose resamples are too few for a bootstrap."""

CHUNK = 1 << 22
"""Values drawn at once."""


def bootstrap_interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % interval of the mean of `values` (studentised bootstrap, Hall 1988), with a fixed seed.

    Each resample gives (its mean - the mean) / its standard error; the interval turns the 2.5 % and 97.5 % points of
    these over the standard error of the values. Of a few skewed values it covers the true mean nearly as often as it
    says, where percentiles of the resampled means do not. For differences between paired values, give the differences.
    Of equal values, or of one, the interval is that value alone.
    """
    found = np.asarray(values, np.float64)
    mean, error = float(found.mean()), _standard_error(found[None])[0]
    if error <= 1e-12 * abs(mean):
        return mean, mean
    if len(found) in STUDENT:
        reach = STUDENT[len(found)] * error
        return mean - reach, mean + reach
    rng, scores = np.random.default_rng(0), []
    step = max(1, CHUNK // len(found))
    for start in range(0, draws, step):
        drawn = found[rng.integers(0, len(found), (min(step, draws - start), len(found)))]
        errors = _standard_error(drawn)
        usable = errors > 1e-9 * error  # not where one value was drawn again and again
        scores.append((drawn.mean(axis=1)[usable] - mean) / errors[usable])
    low, high = np.quantile(np.concatenate(scores), [0.025, 0.975])
    return mean - float(high) * error, mean - float(low) * error


def _standard_error(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard error of the mean of each row of [B, n]; 0 where n is 1."""
    count = rows.shape[1]
    if count == 1:
        return np.zeros(len(rows))
    found: NDArray[np.float64] = rows.std(axis=1, ddof=1) / math.sqrt(count)
    return found


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
        chance = sum(math.comb(trials, n) * share**n * (1 - share) ** (trials - n) for n in range(hits, trials + 1))
        low, high = (share, high) if chance < tail else (low, share)
    return (low + high) / 2
