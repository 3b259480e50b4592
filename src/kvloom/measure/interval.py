"""Intervals by the bootstrap. Torch-free."""

import random
import statistics
from collections.abc import Sequence


def bootstrap_interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % interval of the mean of `values` (percentile bootstrap, Efron 1979), with a fixed seed.

    It says nothing beyond the values themselves: of one value it is that value.
    """
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]
