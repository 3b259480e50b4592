"""Kept slots: what stays, what is unchanged and what goes where, on small rows written out."""

import numpy as np
import pytest

from kvloom.cache.keptslots import KeptSlots
from kvloom.errors import InvalidInputError

P = 4
BEGIN, HELD = np.zeros(6, np.int32), np.full(6, 7, np.int32)


def kept(keep: dict[int, list[int]]) -> KeptSlots:
    """Return slots of lanes that hold 0 to 6."""
    return KeptSlots.of({lane: np.array(slots, np.int64) for lane, slots in keep.items()}, BEGIN, HELD, P)


def test_as_a_mapping_it_gives_what_it_was_made_of_by_ascending_lane() -> None:
    found = kept({4: [0, 6], 1: [], 2: [0, 1, 2, 3, 4, 5, 6]})
    assert {lane: slots.tolist() for lane, slots in found.items()} == {1: [], 2: list(range(7)), 4: [0, 6]}
    assert list(found) == [1, 2, 4] and len(found) == 3 and 3 not in found and 5 not in found


def test_counts_and_whole_blocks_at_the_start_that_lose_nothing() -> None:
    found = kept({0: [0, 1, 2, 3, 5], 1: [0, 1, 2, 4, 5, 6], 2: list(range(7)), 3: []})
    assert found.counts.tolist() == [5, 6, 7, 0] and found.unchanged.tolist() == [1, 0, 1, 0]


def test_lanes_of_whole_blocks_that_lose_nothing_are_unchanged_to_the_end() -> None:
    found = KeptSlots.of({0: np.arange(8)}, BEGIN, np.full(6, 8, np.int32), P)
    assert found.unchanged.tolist() == [2] and not found.moves[0].any() and not found.moves[1].any()


def test_moves_name_survivors_behind_the_unchanged_blocks_in_slot_order() -> None:
    found = kept({0: [0, 1, 2, 3, 5, 6], 3: [1, 4]})
    assert found.width == 8
    source, target = (np.argwhere(mask).tolist() for mask in found.moves)
    assert source == [[0, 5], [0, 6], [1, 1], [1, 4]] and target == [[0, 4], [0, 5], [1, 0], [1, 1]]


def test_survivors_that_are_written_are_not_moved() -> None:
    found = kept({0: [0, 1, 2, 3, 5, 6], 3: [1, 4]})
    masks = found.moves_from(np.array([0, 0], np.int32), np.array([5, 1], np.int32))
    source, target = (np.argwhere(mask).tolist() for mask in masks)
    assert source == [[0, 6], [1, 4]] and target == [[0, 5], [1, 1]]


def test_values_are_packed_to_the_front_and_those_behind_are_left() -> None:
    values = np.arange(16, dtype=np.float32).reshape(2, 8)
    kept({0: [0, 1, 2, 3, 5, 6], 3: [1, 4]}).pack(values)
    assert values.tolist() == [[0, 1, 2, 3, 5, 6, 6, 7], [9, 12, 10, 11, 12, 13, 14, 15]]


@pytest.mark.parametrize("slots", [[0, 0], [3, 1], [-1], [7], [1, 6, 7]])
def test_slots_that_are_not_ascending_or_not_held_are_refused(slots: list[int]) -> None:
    with pytest.raises(InvalidInputError, match=r"lane 2 holds slots 0\.\.6; keep must be ascending slots among them"):
        kept({2: slots})
