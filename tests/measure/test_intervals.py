"""Intervals of means cover the true mean as often as they say."""

import numpy as np
import pytest

from kvloom.measure.interval import bootstrap_interval


def test_an_interval_of_equal_values_is_that_value() -> None:
    assert bootstrap_interval([0.25] * 9) == (0.25, 0.25)
    assert bootstrap_interval([0.1]) == (0.1, 0.1)


def test_an_interval_holds_the_mean_and_is_the_same_every_time() -> None:
    values = [0.1, 0.4, 0.2, 0.9, 0.3]
    low, high = bootstrap_interval(values)
    assert low < sum(values) / 5 < high
    assert bootstrap_interval(values) == (low, high)


def test_the_interval_of_three_values_is_that_of_student() -> None:
    # mean 2, standard deviation 1: 4.303 / sqrt(3)
    assert bootstrap_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.4843, 2 + 2.4843), abs=1e-4)


@pytest.mark.parametrize("shape", ["normal", "exponential", "uniform"])
def test_sixteen_values_cover_the_mean_nearly_as_often_as_said(shape: str) -> None:
    """The percentile bootstrap covers 93 %, 87 % and 91 % of the time here."""
    rng, inside = np.random.default_rng(1), []
    means = {"normal": 0.0, "exponential": 1.0, "uniform": 0.5}
    for _ in range(800):
        values = {"normal": rng.normal, "exponential": rng.exponential, "uniform": rng.uniform}[shape](size=16)
        low, high = bootstrap_interval(values.tolist(), draws=600)
        inside.append(low <= means[shape] <= high)
    assert np.mean(inside) >= 0.93
