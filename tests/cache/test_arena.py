"""Arena: which blocks are live, where the next one comes from, and what an evacuation moves. Exact addresses."""

import numpy as np
import pytest

from kvloom.cache.arena import SLAB_GRANULES, Addresses, Arena
from kvloom.errors import DoesNotFitError, InvalidInputError
from kvloom.spec.store import SLAB_BYTES

HALF, QUARTER, THIRD = SLAB_BYTES // 2, SLAB_BYTES // 4, 640 << 10
"""Block sizes of 2, 4 and 3 blocks a slab; three of 640 KiB leave a tail of 128 KiB."""

TAIL = SLAB_BYTES - 3 * THIRD


def arena(num_slabs: int = 4) -> Arena:
    return Arena(num_slabs * SLAB_BYTES, [HALF, QUARTER, THIRD])


def take(pool: Arena, count: int, size: int) -> Addresses:
    addresses = pool.allocate(count, size)
    assert addresses is not None
    pool.check_invariants()
    return addresses


def slabs(addresses: Addresses) -> list[int]:
    found: list[int] = (addresses // SLAB_GRANULES).tolist()
    return found


def test_a_fresh_arena_hands_out_ascending_addresses_from_its_first_slab() -> None:
    pool = arena()
    assert take(pool, 4, QUARTER).tolist() == [0, 4096, 8192, 12288]
    assert take(pool, 1, HALF).tolist() == [16384]
    assert pool.used_bytes == SLAB_BYTES + HALF


def test_a_slab_serves_one_block_size_and_the_rest_of_it_is_stranded() -> None:
    pool = arena()
    take(pool, 1, QUARTER)
    take(pool, 1, THIRD)
    assert pool.slabs.stranded_bytes == 2 * SLAB_BYTES - QUARTER - THIRD
    assert pool.slabs.available({HALF: 4})
    assert not pool.slabs.available({HALF: 5})
    assert pool.slabs.available({HALF: 4, QUARTER: 3, THIRD: 2})
    assert not pool.slabs.available({HALF: 4, QUARTER: 4})


def test_what_does_not_fit_is_refused_without_a_change() -> None:
    pool = arena(1)
    take(pool, 3, QUARTER)
    assert pool.allocate(2, QUARTER) is None
    assert pool.allocate(1, HALF) is None
    pool.check_invariants()
    assert pool.used_bytes == 3 * QUARTER
    assert len(take(pool, 1, QUARTER)) == 1


def test_allocation_fills_the_fullest_slab_first() -> None:
    pool = arena()
    blocks = take(pool, 12, QUARTER)
    pool.release(blocks[[0, 1, 2, 4, 8, 9]])  # live: 1 in slab 0, 3 in slab 1, 2 in slab 2
    pool.check_invariants()
    assert slabs(take(pool, 6, QUARTER)) == [1, 2, 2, 0, 0, 0]


def test_a_new_slab_is_opened_only_when_the_open_ones_are_full() -> None:
    pool = arena()
    take(pool, 3, QUARTER)
    assert slabs(take(pool, 2, QUARTER)) == [0, 1]


def test_a_block_comes_free_with_its_last_reference() -> None:
    pool = arena()
    blocks = take(pool, 2, HALF)
    pool.share(blocks)
    pool.share(blocks[:1])
    assert pool.references(blocks).tolist() == [3, 2]
    assert pool.release(blocks) == 0
    assert pool.release(blocks) == HALF
    assert pool.release(blocks[:1]) == HALF
    pool.check_invariants()
    assert pool.used_bytes == 0


def test_a_block_that_is_released_twice_is_caught() -> None:
    pool = arena()
    blocks = take(pool, 2, HALF)
    pool.release(blocks[:1])
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks[:1])
    with pytest.raises(AssertionError, match="cannot be shared"):
        pool.share(blocks[:1])


def test_a_slab_without_live_blocks_takes_any_block_size_again() -> None:
    pool = arena(1)
    blocks = take(pool, 3, THIRD)
    assert pool.allocate(1, HALF) is None
    pool.release(blocks)
    assert pool.slabs.stranded_bytes == 0
    assert len(take(pool, 2, HALF)) == 2


def test_the_peak_is_the_most_that_was_ever_live() -> None:
    pool = arena()
    blocks = take(pool, 3, HALF)
    pool.release(blocks)
    take(pool, 1, QUARTER)
    assert pool.peak_bytes == 3 * HALF


def test_evacuation_moves_the_emptiest_slabs_into_the_fullest_and_keeps_references() -> None:
    pool = arena()
    blocks = take(pool, 12, QUARTER)
    pool.share(blocks[3:4])
    pool.release(blocks[[0, 1, 2, 4, 8, 9]])  # live: block 3; 5, 6, 7; 10, 11
    (move,) = pool.evacuation()
    pool.check_invariants()
    assert move.block_bytes == QUARTER
    assert move.source.tolist() == [blocks[3]]
    assert slabs(move.target) == [1]
    assert pool.references(move.target).tolist() == [2]
    assert pool.references(blocks[5:8]).tolist() == [1, 1, 1]
    assert pool.slabs.stranded_bytes == SLAB_BYTES - 2 * QUARTER


def test_evacuation_moves_nothing_when_no_slab_can_be_emptied() -> None:
    pool = arena()
    take(pool, 5, QUARTER)
    take(pool, 1, HALF)
    assert pool.evacuation() == []


def test_evacuation_handles_each_block_size_by_itself() -> None:
    pool = arena(6)
    quarters, thirds = take(pool, 8, QUARTER), take(pool, 6, THIRD)
    pool.release(quarters[[1, 2, 3, 5, 6, 7]])
    pool.release(thirds[[0, 2, 3, 4]])
    moves = pool.evacuation()
    pool.check_invariants()
    assert sorted((m.block_bytes, len(m.source)) for m in moves) == [(QUARTER, 1), (THIRD, 1)]
    assert pool.slabs.stranded_bytes == 2 * SLAB_BYTES - 2 * QUARTER - 2 * THIRD
    assert pool.slabs.available({HALF: 8})


def test_block_sizes_are_read_off_the_address() -> None:
    pool = arena()
    mixed = np.concatenate([take(pool, 1, THIRD), take(pool, 2, HALF), take(pool, 1, QUARTER)])
    assert pool.block_bytes_at(mixed).tolist() == [THIRD, HALF, HALF, QUARTER]


def test_every_live_block_has_a_cell_of_its_own() -> None:
    pool = Arena(2 * SLAB_BYTES, [17 * 128, 32 * 128])
    everything = np.concatenate([take(pool, 963, 17 * 128), take(pool, 512, 32 * 128)])
    cells = pool.cell_of(everything)
    assert len(np.unique(cells)) == len(everything)
    assert cells.max() < pool.num_cells


@pytest.mark.parametrize("size", [0, -128, 100, SLAB_BYTES + 128])
def test_a_block_size_that_is_no_multiple_of_the_granule_or_above_a_slab_is_refused(size: int) -> None:
    with pytest.raises(InvalidInputError, match="must be a multiple of 128"):
        Arena(SLAB_BYTES, [size])


def test_an_arena_below_one_slab_is_refused_with_what_to_do() -> None:
    with pytest.raises(DoesNotFitError, match=r"1 MiB; it needs at least one slab of 2 MiB. Raise --kv-cache-memory"):
        Arena(SLAB_BYTES // 2, [HALF])


def test_an_arena_beyond_the_reach_of_addresses_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="addresses reach 256 GiB"):
        Arena(256 << 30, [SLAB_BYTES])
