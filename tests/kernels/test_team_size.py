"""The number of threads of a call, from the time that threads of earlier calls lost."""

import pytest

from kvloom.kernels.cpu._ext import TeamSize


def calls(team: TeamSize, begin: float, count: int, took: float, off: float) -> float:
    """Record `count` calls in a row, each of `took` seconds with `off` not running; return when the last ended."""
    for _ in range(count):
        team.next(begin)
        team.record(begin, begin + took, off)
        begin += took
    return begin


@pytest.mark.parametrize("most", [1, 2, 16])
def test_alone_all_threads_take_part_from_the_first_call_on(most: int) -> None:
    team = TeamSize(most)
    end = calls(team, 0, 1000, 0.01, 0.0001)
    assert team.next(end) == most


@pytest.mark.parametrize("most", [2, 16])
def test_a_thread_s_whole_time_lost_costs_the_last_place(most: int) -> None:
    team = TeamSize(most)
    end = calls(team, 0, 5, 0.04, 0.04)
    assert team.next(end) == most
    end = calls(team, end, 1, 0.04, 0.04)
    assert team.next(end) == most - 1


def test_what_is_lost_in_many_short_calls_adds_up() -> None:
    team = TeamSize(2)
    end = calls(team, 0, 190, 0.001, 0.001)
    assert team.next(end) == 2
    end = calls(team, end, 20, 0.001, 0.001)
    assert team.next(end) == 1


def test_a_core_that_is_taken_away_for_some_milliseconds_costs_nothing() -> None:
    team, now = TeamSize(2), 0.0
    for _ in range(20):
        team.next(now)
        team.record(now, now + 0.02, 0.02)
        now = calls(team, now + 0.02, 3, 0.006, 0.0001)
        assert team.next(now) == 2


def test_a_hiccup_is_forgiven() -> None:
    team, now = TeamSize(2), 0.0
    for _ in range(100):
        team.next(now)
        team.record(now, now + 0.01, 0.012)  # more than a thread's time: some waited to be woken
        now = calls(team, now + 0.01, 5, 0.01, 0.0)
    assert team.next(now) == 2


def test_a_quota_that_stops_all_threads_for_a_quarter_of_the_time_costs_nobody_his_place() -> None:
    team = TeamSize(2)
    end = calls(team, 0, 1000, 0.02, 2 * 0.25 * 0.02)
    assert team.next(end) == 2


def test_a_place_is_tried_again_after_a_while_and_ever_more_seldom_in_vain() -> None:
    team, pauses = TeamSize(2), []
    now = calls(team, 0, 6, 0.04, 0.04)  # the first place lost; what follows are trials
    while team.next(now) == 1:
        now += 0.01
    for _ in range(7):
        assert team.next(now) == 2
        team.record(now, now + 0.03, 0.03)
        now = lost = now + 0.03
        while team.next(now) == 1:
            now += 0.01
        pauses.append(round(now - lost, 1))
    assert pauses == [0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]


def test_when_the_cores_are_free_again_all_places_are_filled_one_after_another() -> None:
    team, now = TeamSize(8), 0.0
    while team.next(now) > 2:
        team.record(now, now + 0.03, 0.1)
        now += 0.03
    sizes = []
    for _ in range(200):
        sizes.append(team.next(now))
        team.record(now, now + 0.01, 0.0)
        now += 0.01
    assert sizes[-1] == 8
    assert sizes == sorted(sizes)
    assert sizes.index(8) <= 10 + 6 * 11  # the pause, and the proof of each place


def test_one_thread_always_remains() -> None:
    team = TeamSize(3)
    end = calls(team, 0, 50, 0.05, 0.2)
    assert team.next(end) >= 1
    assert TeamSize(1).next(0) == 1
