"""Lane table: slots, windows, sharing and repacking, on exact counts. No bytes, and no torch.

Blocks of 4 tokens; lanes 0 and 1 have no window, lane 2 has a window of 6 and larger blocks.
"""

import numpy as np
import pytest

from harness.lane_desk import BIG, HUGE, SPEC, Desk, P
from kvloom.cache.arena import Arena
from kvloom.cache.keptslots import KeptSlots
from kvloom.cache.laneprefixes import LanePrefixes
from kvloom.cache.lanes import LaneTable, ragged_arange
from kvloom.cache.packing import LanePacking
from kvloom.cache.pool import BlockPool
from kvloom.cache.prefix import PrefixChain, PrefixIndex
from kvloom.errors import InvalidInputError
from kvloom.spec.kv import KVSpec, LayerKV
from kvloom.spec.store import SLAB_BYTES


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_the_block_sizes_are_those_that_the_tests_name() -> None:
    assert [group.block_bytes for group in SPEC.groups] == [BIG, HUGE]


# ---- growth ----------------------------------------------------------------------------------------------------------


def test_lanes_grow_by_a_block_when_the_last_one_is_full(desk: Desk) -> None:
    sequence = desk.opened()
    seen = []
    for _ in range(9):
        assert desk.lanes.extend(sequence, 1)
        seen.append(desk.blocks(sequence)[0])
        desk.check()
    assert seen == [1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert desk.lanes.seen[sequence] == 9 and desk.lanes.held[sequence, :2].tolist() == [9, 9]


def test_the_blocks_that_growth_will_take_are_known_beforehand(desk: Desk) -> None:
    sequence = desk.opened(6)
    assert desk.lanes.blocks_needed(sequence, 2) == {}
    assert desk.lanes.blocks_needed(sequence, 3) == {BIG: 2, HUGE: 1}
    assert desk.lanes.blocks_needed(sequence, 11) == {BIG: 6, HUGE: 3}


def test_growth_that_does_not_fit_changes_nothing() -> None:
    desk = Desk(num_slabs=2)  # 8 blocks of lanes 0 and 1 together, 4 of lane 2
    sequence = desk.opened(4)
    before = desk.lanes.table.copy()
    assert not desk.lanes.extend(sequence, 13)
    assert (desk.lanes.table[sequence, :, :16] == before[sequence, :, :16]).all()
    assert desk.lanes.seen[sequence] == 4 and desk.lanes.held[sequence].tolist() == [4, 4, 4]
    desk.check()
    assert desk.lanes.extend(sequence, 12)
    desk.check()


def test_the_table_widens_beyond_any_first_guess() -> None:
    desk = Desk(num_slabs=40)
    sequence = desk.opened(300, step=7)
    assert desk.blocks(sequence)[:2] == [75, 75]
    desk.check()


def test_the_bytes_of_a_sequence_now_and_at_peak_are_counted_in_whole_blocks(desk: Desk) -> None:
    sequence = desk.opened(9)
    assert desk.lanes.sequence_bytes(sequence) == 3 * (2 * BIG + HUGE)
    assert desk.lanes.extend(sequence, 4)  # slots 9..12; lane 2 sees back to 4, so its first block is gone
    assert desk.lanes.sequence_bytes(sequence) == 4 * 2 * BIG + 3 * HUGE
    assert desk.lanes.peak_bytes[sequence] == 4 * 2 * BIG + 3 * HUGE


# ---- windows ---------------------------------------------------------------------------------------------------------


def test_a_windowed_lane_frees_the_blocks_that_no_coming_query_sees(desk: Desk) -> None:
    """Token by token: before position p is processed, slots p - 5 .. p - 1 must be there, and no whole block more."""
    sequence = desk.opened()
    for position in range(30):
        assert desk.lanes.extend(sequence, 1)
        desk.check()
        begin, held = int(desk.lanes.begin[sequence, 2]), int(desk.lanes.held[sequence, 2])
        assert begin <= max(0, position - 5) and begin + held == position + 1
        columns = np.flatnonzero(desk.lanes.table[sequence, 2] >= 0)
        assert columns.tolist() == list(range(begin // P, position // P + 1))
        assert len(columns) <= SPEC.lane_blocks(position + 1, 6)
    assert desk.blocks(sequence)[:2] == [8, 8]


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 17])
def test_a_windowed_lane_never_holds_more_blocks_than_the_formula_says(desk: Desk, chunk: int) -> None:
    sequence = desk.opened()
    most = 0
    for _ in range(34 // chunk):
        assert desk.lanes.extend(sequence, chunk)
        most = max(most, desk.blocks(sequence)[2])
        desk.check()
    assert most <= SPEC.lane_blocks(34, 6, chunk)
    assert desk.lanes.begin[sequence, 2] <= max(0, int(desk.lanes.seen[sequence]) - chunk - 5)


def test_freed_window_blocks_can_be_used_by_other_lanes() -> None:
    desk = Desk(num_slabs=4)
    sequence = desk.opened(40, step=4)  # 20 blocks in lanes 0 and 1 (3 slabs); lane 2 keeps to one slab
    assert desk.blocks(sequence) == [10, 10, 3]
    desk.check()


# ---- sharing ---------------------------------------------------------------------------------------------------------


def test_a_fork_shares_every_block_until_one_of_the_two_writes(desk: Desk) -> None:
    parent = desk.opened(6)
    child = desk.lanes.fork(parent)
    desk.check()
    assert desk.arena.used_bytes == 2 * (2 * BIG + HUGE)
    assert (desk.lanes.table[child] == desk.lanes.table[parent]).all()

    shared = desk.lanes.table[parent, :, :2].copy()
    assert desk.lanes.blocks_needed(child, 1) == {BIG: 2, HUGE: 1}
    assert desk.lanes.extend(child, 1)
    desk.check()
    assert (desk.lanes.table[child, :, 0] == shared[:, 0]).all()
    assert (desk.lanes.table[child, :, 1] != shared[:, 1]).all()
    assert (desk.lanes.table[parent, :, :2] == shared).all()
    copied = [(int(s), int(t)) for move in desk.moves for s, t in zip(move.source, move.target, strict=True)]
    assert sorted(copied) == sorted((int(shared[lane, 1]), int(desk.lanes.table[child, lane, 1])) for lane in range(3))

    desk.moves.clear()
    assert desk.lanes.blocks_needed(parent, 1) == {}  # the last block is the parent's own again
    assert desk.lanes.extend(parent, 1)
    assert desk.moves == [] and (desk.lanes.table[parent, :, :2] == shared).all()
    desk.check()


def test_full_blocks_are_shared_without_any_copy(desk: Desk) -> None:
    parent = desk.opened(8)
    child = desk.lanes.fork(parent)
    assert desk.lanes.extend(child, 1) and desk.lanes.extend(parent, 1)
    assert desk.moves == []
    assert desk.arena.references(desk.lanes.table[parent, 0, :3]).tolist() == [2, 2, 1]
    desk.check()


def test_a_shared_block_of_a_window_of_one_is_copied_before_a_write_too() -> None:
    spec = KVSpec((LayerKV(1, 8192, 8192), LayerKV(1, 8192, 8192, window=1)), P, "fp32")
    arena = Arena(4 * SLAB_BYTES, [BIG])
    lanes = LaneTable(spec, BlockPool(arena, PrefixIndex(spec, arena), lambda move: None), 2)
    parent = lanes.open()
    assert lanes.extend(parent, 2)
    child = lanes.fork(parent)
    assert lanes.extend(parent, 1) and lanes.extend(child, 1)
    assert lanes.table[parent, 1, 0] != lanes.table[child, 1, 0]
    lanes.check_invariants()
    lanes.pool.check_invariants()


def test_closing_a_sharer_leaves_the_other_one_whole(desk: Desk) -> None:
    parent = desk.opened(9)
    child = desk.lanes.fork(parent)
    desk.lanes.close(parent)
    desk.check()
    assert desk.arena.used_bytes == 3 * (2 * BIG + HUGE)
    desk.lanes.close(child)
    assert desk.arena.used_bytes == 0 and desk.lanes.num_free == 4


def test_an_adopted_prefix_is_shared_and_its_windowed_lane_starts_at_the_window(desk: Desk) -> None:
    tokens, chain = list(range(20)), PrefixChain()
    first = desk.opened(16, step=4)
    LanePrefixes(desk.lanes).publish(first, chain, tokens, 0, 4)  # of lane 2 only the last blocks are left to publish
    match = desk.index.match(tokens, PrefixChain(), 20)
    assert match.num_blocks == 4
    second = desk.lanes.open()
    LanePrefixes(desk.lanes).adopt(second, match)
    desk.check()
    assert desk.lanes.seen[second] == 16
    assert desk.lanes.begin[second].tolist() == [0, 0, 11] and desk.lanes.held[second].tolist() == [16, 16, 5]
    assert (desk.lanes.table[second, :2] == desk.lanes.table[first, :2]).all()
    assert desk.blocks(second)[2] == 2
    assert desk.lanes.extend(second, 1)
    desk.check()
    assert desk.moves == []


def test_a_forked_or_adopted_sequence_that_lost_tokens_is_never_published(desk: Desk) -> None:
    sequence = desk.opened(8)
    LanePacking(desk.lanes).pack_slots(sequence, first_slots({0: 8}))
    child = desk.lanes.fork(sequence)
    for each in (sequence, child):
        LanePrefixes(desk.lanes).publish(each, PrefixChain(), list(range(8)), 0, 2)
    assert len(desk.index) == 0


# ---- taking tokens back ----------------------------------------------------------------------------------------------


def test_tokens_that_are_taken_back_leave_nothing_but_what_the_window_let_go(desk: Desk) -> None:
    sequence = desk.opened(9)
    assert desk.lanes.extend(sequence, 6)  # frees the first block of lane 2
    desk.lanes.truncate(sequence, 6)
    desk.check()
    assert desk.lanes.seen[sequence] == 9 and desk.lanes.held[sequence].tolist() == [9, 9, 5]
    assert desk.blocks(sequence) == [3, 3, 2]
    assert desk.arena.used_bytes == 6 * BIG + 2 * HUGE


def test_a_shared_block_that_becomes_the_last_stays_with_its_other_owner(desk: Desk) -> None:
    sequence = desk.opened(8)
    child = desk.lanes.fork(sequence)
    before = desk.lanes.table[sequence].copy()
    desk.lanes.truncate(child, 3)
    assert (desk.lanes.table[child, 0] == before[0]).all()
    assert desk.lanes.extend(child, 1)
    desk.check()
    assert desk.lanes.table[child, 0, 1] != before[0, 1] and (desk.lanes.table[sequence] == before).all()
    assert desk.moves[-1].source.size and desk.lanes.held[child].tolist()[:2] == [6, 6]


def test_lossy_lanes_drop_the_positions_of_truncated_tokens(desk: Desk) -> None:
    sequence = desk.opened(16)
    repack(desk, sequence, [3, 10], [0, 2])
    for number in (5, 2):
        assert desk.lanes.extend(sequence, number)
        desk.lanes.truncate(sequence, number)
    assert desk.lanes.extend(sequence, 1)
    desk.check()
    assert desk.lanes.positions_of(sequence, 0).tolist() == [0, 1, 2, 16]
    assert desk.lanes.positions_of(sequence, 1).tolist() == [*range(10), 16]


def test_what_was_there_at_a_loss_and_what_the_window_needs_cannot_be_taken_back(desk: Desk) -> None:
    sequence, windowed = desk.opened(16), desk.opened(16, step=8)
    repack(desk, sequence, [3, 10], [0, 2])
    assert desk.lanes.is_lossy(sequence) and not desk.lanes.is_lossy(windowed)
    assert desk.lanes.is_lossy(desk.lanes.fork(sequence))
    with pytest.raises(InvalidInputError, match="the first 16 must stay"):
        desk.lanes.truncate(sequence, 1)
    with pytest.raises(InvalidInputError, match="9 of 16 tokens cannot be taken back; the first 8 must stay"):
        desk.lanes.truncate(windowed, 9)
    desk.lanes.truncate(windowed, 8)
    desk.check()


# ---- repacking -------------------------------------------------------------------------------------------------------


def first_slots(counts: dict[int, int]) -> KeptSlots:
    """Return as many first slots of each lane as `counts` says."""
    begin, held = np.zeros(3, np.int32), np.full(3, 16, np.int32)
    return KeptSlots.of({lane: np.arange(count) for lane, count in counts.items()}, begin, held, P)


def repack(desk: Desk, sequence: int, kept: list[int], unchanged: list[int]) -> int:
    """Repack lanes 0 and 1 and return how many bytes came free."""
    packing = LanePacking(desk.lanes)
    done = packing.repack(sequence, np.array([0, 1]), np.array(kept, np.int32), np.array(unchanged, np.int32))
    assert done is not None
    packing.pack_slots(sequence, first_slots(dict(enumerate(kept))))
    freed = desk.arena.release(done[1])
    desk.check()
    return freed


def test_lanes_are_repacked_to_unequal_lengths_and_their_blocks_come_back(desk: Desk) -> None:
    sequence = desk.opened(16)
    assert repack(desk, sequence, [3, 10], [0, 2]) == (3 + 1) * BIG
    assert desk.blocks(sequence) == [1, 3, 4]
    assert desk.lanes.held[sequence].tolist() == [3, 10, 16] and desk.lanes.seen[sequence] == 16
    assert desk.lanes.extend(sequence, 2)
    desk.check()
    assert desk.blocks(sequence) == [2, 3, 3]  # lane 2 dropped slots 0..10 and with them two blocks, and got one
    assert desk.lanes.positions_of(sequence, 0).tolist() == [0, 1, 2, 16, 17]


def test_a_lane_may_lose_everything(desk: Desk) -> None:
    sequence = desk.opened(9)
    assert repack(desk, sequence, [0, 9], [0, 2]) == 3 * BIG
    assert desk.blocks(sequence) == [0, 3, 3]
    assert desk.lanes.extend(sequence, 1)
    desk.check()
    assert desk.lanes.positions_of(sequence, 0).tolist() == [9]


def test_shared_blocks_are_replaced_and_stay_with_their_other_owner(desk: Desk) -> None:
    sequence = desk.opened(12)
    other = desk.lanes.fork(sequence)
    before = desk.lanes.table[other].copy()
    assert repack(desk, sequence, [5, 12], [1, 3]) == 0  # the other owner still holds all of them
    assert (desk.lanes.table[other] == before).all()
    assert desk.lanes.table[sequence, 0, 0] == before[0, 0]  # unchanged, still shared
    assert desk.lanes.table[sequence, 0, 1] != before[0, 1]  # to be written, so private
    assert desk.arena.references(before[:1, :3].ravel()).tolist() == [2, 1, 1]


def test_repacking_without_room_for_the_copies_changes_nothing() -> None:
    desk = Desk(num_slabs=2)
    sequence = desk.opened(16)  # every block of the arena
    desk.lanes.fork(sequence)
    before = desk.lanes.table.copy()
    packing = LanePacking(desk.lanes)
    assert packing.repack(sequence, np.array([0]), np.array([2], np.int32), np.array([0], np.int32)) is None
    assert (desk.lanes.table == before).all()
    desk.check()


def test_ragged_ranges_are_laid_end_to_end() -> None:
    assert ragged_arange(np.array([3, 0, 1, 2], np.int32)).tolist() == [0, 1, 2, 0, 0, 1]
    assert ragged_arange(np.array([], np.int32)).tolist() == []


def test_a_table_without_free_rows_says_so(desk: Desk) -> None:
    rows = [desk.lanes.open() for _ in range(4)]
    assert desk.lanes.num_free == 0 and sorted(rows) == desk.lanes.open_sequences == [0, 1, 2, 3]
    desk.lanes.close(rows[1])
    assert desk.lanes.open() == rows[1]
