"""Intervals of shares cover the true share as often as they say."""

import math

import pytest

from kvloom.measure.interval import share_interval


def test_none_or_all_of_sixteen_leave_a_fifth_open() -> None:
    bound = 1 - 0.025 ** (1 / 16)  # the closed form where none was hit
    assert share_interval(0, 16) == (0.0, pytest.approx(bound))
    assert share_interval(16, 16) == (pytest.approx(1 - bound), 1.0)


def test_the_interval_of_ten_of_twenty_is_the_published_one() -> None:
    low, high = share_interval(10, 20)
    assert (round(low, 4), round(high, 4)) == (0.2720, 0.7280)


@pytest.mark.parametrize("trials", [5, 16, 40])
def test_every_true_share_is_covered_at_least_as_often_as_said(trials: int) -> None:
    intervals = [share_interval(hits, trials) for hits in range(trials + 1)]
    for share in (0.001, 0.03, 0.1, 0.25, 0.5, 0.77, 0.9, 0.999):
        chances = [math.comb(trials, n) * share**n * (1 - share) ** (trials - n) for n in range(trials + 1)]
        covered = [low <= share <= high for low, high in intervals]
        assert sum(chance for chance, inside in zip(chances, covered, strict=True) if inside) >= 0.95


@pytest.mark.parametrize(("hits", "trials"), [(-1, 3), (4, 3), (0, 0)])
def test_what_is_no_share_is_an_error(hits: int, trials: int) -> None:
    with pytest.raises(ValueError, match="are not a share"):
        share_interval(hits, trials)
