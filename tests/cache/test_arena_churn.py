"""Stranded bytes under adversarial churn of mixed block sizes.

Bound. Let block size s have u(s) live blocks, and let c(s) = SLAB // s fit into a slab. After an allocation that does
not fit at once, the pool has evacuated, so u(s) blocks lie in ceil(u(s) / c(s)) slabs: at most one slab of each size
is not full. Stranded are then

    sum over s with u(s) > 0 of   ceil(u(s) / c(s)) * SLAB - u(s) * s
      <  sum over s of  SLAB  +  floor(u(s) / c(s)) * (SLAB mod s)

that is, less than one slab for each block size, beyond the tails that a size leaves in its full slabs because it does
not divide them (2,176 bytes of int8: 1,664 bytes of 2 MiB, 0.08 %). So a failed allocation of `need` bytes proves that
fewer than `need` + one slab for each block size + tails were free.
"""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.cache.arena import Addresses, Arena, Move
from kvloom.cache.pool import BlockPool
from kvloom.cache.prefix import PrefixIndex
from kvloom.spec.kv import KVSpec, LayerKV
from kvloom.spec.store import SLAB_BYTES

SIZES = (2176, 4096, 8192, 18432, 65536, 98304, 655360)
"""int8 and 16-bit blocks of 16 tokens of a 64-wide head, others of wider heads, and two that fit badly."""


class Ledger:
    """A holder that knows what it allocated and follows when blocks move."""

    def __init__(self) -> None:
        self.blocks: list[tuple[int, int]] = []  # (address, block bytes)
        self.arena: Arena | None = None

    def rename(self, renamed: Addresses) -> None:
        assert self.arena is not None
        cells = [int(self.arena.cell_of(np.array([a], np.int32))[0]) for a, _ in self.blocks]
        self.blocks = [
            (int(renamed[cell]) if renamed[cell] >= 0 else a, size)
            for cell, (a, size) in zip(cells, self.blocks, strict=True)
        ]

    def held_blocks(self) -> list[Addresses]:  # type: ignore[override]
        return [np.array([address for address, _ in self.blocks], np.int32)]


def build(num_slabs: int) -> tuple[BlockPool, Ledger]:
    arena = Arena(num_slabs * SLAB_BYTES, SIZES)
    spec = KVSpec((LayerKV(1, 64, 64),), 16, "bf16")
    moved: list[Move] = []
    pool = BlockPool(arena, PrefixIndex(spec, arena), moved.append)
    ledger = Ledger()
    ledger.arena = arena
    pool.holders.append(ledger)
    return pool, ledger


def stranded_after_evacuation(ledger: Ledger) -> int:
    """Sum over the live blocks alone, without a look into the arena."""
    total = 0
    for size, count in Counter(size for _, size in ledger.blocks).items():
        total += -(-count // (SLAB_BYTES // size)) * SLAB_BYTES - count * size
    return total


def tails(ledger: Ledger) -> int:
    counts = Counter(size for _, size in ledger.blocks)
    return sum(count // (SLAB_BYTES // size) * (SLAB_BYTES % size) for size, count in counts.items())


def assert_bounded(pool: BlockPool, ledger: Ledger) -> None:
    sizes = len({size for _, size in ledger.blocks})
    assert pool.arena.slabs.stranded_bytes == stranded_after_evacuation(ledger)
    assert pool.arena.slabs.stranded_bytes < sizes * SLAB_BYTES + tails(ledger) or not sizes
    pool.check_invariants()


def allocate(pool: BlockPool, ledger: Ledger, size: int, count: int) -> bool:
    if not pool.ensure({size: count}):
        return False
    addresses = pool.arena.allocate(count, size)
    assert addresses is not None, "what the pool promised was not there"
    ledger.blocks += [(int(address), size) for address in addresses]
    return True


def release(pool: BlockPool, ledger: Ledger, chosen: set[int]) -> None:
    gone = [ledger.blocks[i][0] for i in chosen]
    ledger.blocks = [block for i, block in enumerate(ledger.blocks) if i not in chosen]
    pool.arena.release(np.array(gone, np.int32))


def test_one_survivor_in_every_slab_of_every_size_is_gathered_when_a_slab_is_wanted() -> None:
    pool, ledger = build(len(SIZES) * 3 + 1)
    for size in SIZES:  # three full slabs each, and then all but one block of each slab is freed
        assert allocate(pool, ledger, size, 3 * (SLAB_BYTES // size))
    by_slab: dict[tuple[int, int], list[int]] = {}
    for i, (address, size) in enumerate(ledger.blocks):
        by_slab.setdefault((size, address // (SLAB_BYTES // 128)), []).append(i)
    release(pool, ledger, {i for members in by_slab.values() for i in members[1:]})
    assert pool.arena.slabs.stranded_bytes == 3 * len(SIZES) * SLAB_BYTES - 3 * sum(SIZES)
    # one slab was never used; two of three of each size can be emptied
    assert allocate(pool, ledger, 4096, (1 + 2 * len(SIZES)) * 512 + 509)
    assert_bounded(pool, ledger)
    assert not allocate(pool, ledger, 4096, 1)


@pytest.mark.parametrize("seed", range(4))
def test_stranded_bytes_stay_below_one_slab_a_block_size_after_every_failed_allocation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pool, ledger = build(40)
    failures = 0
    for _ in range(300):
        size = int(rng.choice(SIZES))
        count = int(rng.integers(1, max(2, 3 * SLAB_BYTES // size)))
        if not allocate(pool, ledger, size, count):
            failures += 1
            assert_bounded(pool, ledger)
            free = pool.arena.num_bytes - pool.arena.used_bytes
            assert free < count * size + count // (SLAB_BYTES // size) * (SLAB_BYTES % size) + SLAB_BYTES * (
                len(SIZES)
            ) + tails(ledger)
            # the worst that a client can do: keep a few blocks of each slab
            keep = rng.random(len(ledger.blocks)) < rng.choice([0.01, 0.3, 0.9])
            release(pool, ledger, set(np.flatnonzero(~keep).tolist()))
    assert failures > 10
    release(pool, ledger, set(range(len(ledger.blocks))))
    assert pool.arena.slabs.stranded_bytes == 0 and pool.arena.used_bytes == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(SIZES), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32)), max_size=25)
)
def test_an_allocation_fails_only_when_the_live_blocks_really_leave_no_room(
    steps: list[tuple[int, int, float, int]],
) -> None:
    pool, ledger = build(9)
    for size, count, gone, seed in steps:
        wanted = Counter({size: count})
        wanted.update(s for _, s in ledger.blocks)
        slabs = sum(-(-number // (SLAB_BYTES // s)) for s, number in wanted.items())
        assert allocate(pool, ledger, size, count) == (slabs <= 9)
        pool.check_invariants()
        chosen = np.random.default_rng(seed).random(len(ledger.blocks)) < gone
        release(pool, ledger, set(np.flatnonzero(chosen).tolist()))
        pool.check_invariants()
