"""A lane table without bytes: blocks of 4 tokens; lanes 0 and 1 have no window, lane 2 has one and larger blocks."""

from kvloom.cache.arena import Arena, Move
from kvloom.cache.lanes import LaneTable
from kvloom.cache.pool import BlockPool
from kvloom.cache.prefix import PrefixIndex
from kvloom.spec.kv import KVSpec, LayerKV
from kvloom.spec.store import SLAB_BYTES

P = 4
SPEC = KVSpec((LayerKV(2, 8192, 8192), LayerKV(1, 16384, 16384, window=6)), P, "fp32")
BIG, HUGE = 256 << 10, 512 << 10
"""Bytes of a block of lanes 0 and 1, eight to a slab, and of lane 2, four to a slab."""


class Desk:
    """A lane table on an arena of `num_slabs`, and the moves that it ordered."""

    def __init__(self, num_slabs: int = 8, sequences: int = 4) -> None:
        self.moves: list[Move] = []
        self.arena = Arena(num_slabs * SLAB_BYTES, [BIG, HUGE])
        self.index = PrefixIndex(SPEC, self.arena)
        self.pool = BlockPool(self.arena, self.index, self.moves.append)
        self.lanes = LaneTable(SPEC, self.pool, sequences)

    def opened(self, num_tokens: int = 0, step: int = 1000) -> int:
        """Return a new sequence with `num_tokens` tokens, given `step` at a time."""
        sequence = self.lanes.open()
        while num_tokens:
            number = min(step, num_tokens)
            assert self.lanes.extend(sequence, number)
            num_tokens -= number
        return sequence

    def blocks(self, sequence: int) -> list[int]:
        """Number of blocks of each lane."""
        counts: list[int] = (self.lanes.table[sequence] >= 0).sum(axis=1).tolist()
        return counts

    def check(self) -> None:
        self.pool.check_invariants()
        self.lanes.check_invariants()
