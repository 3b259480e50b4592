"""LanePacking: lanes that keep only some of their slots, which move to their front. Torch-free.

    lane   | kept, lost, kept, kept, lost ... |   ->   | kept, kept, kept | blocks left over |
"""

import numpy as np
from numpy.typing import NDArray

from kvloom.cache.arena import Addresses
from kvloom.cache.keptslots import KeptSlots
from kvloom.cache.lanes import Ints, LaneTable


class LanePacking:
    """Lays out lanes of `lanes` anew, and keeps their positions and counts; the bytes are the caller's."""

    def __init__(self, lanes: LaneTable) -> None:
        self.lanes = lanes

    def repack(
        self, sequence: int, lanes: NDArray[np.int64], kept: Ints, unchanged: Ints
    ) -> tuple[Addresses, Addresses] | None:
        """Lay out `kept[i]` tokens in lane `lanes[i]`, of which the first `unchanged[i]` blocks stay as they are.

        Later blocks are kept where they are private and replaced where they are shared. Returns the rows [n, C] of
        the table as they were, and the addresses that are left over: these are still referenced, so that their bytes
        can be read, and the caller releases them. None, and no change, when the blocks cannot be had now. `begin`
        becomes 0 and `held` becomes `kept`.
        """
        size = self.lanes.spec.block_size
        after = -(-kept // size)
        arena = self.lanes.pool.arena
        columns = np.arange(self.lanes.table.shape[2])[None, :]
        written = (columns >= unchanged[:, None]) & (columns < after[:, None])
        before = self.lanes.table[sequence, lanes]
        shared = written & (arena.references(before) > 1)
        needs: dict[int, int] = {}
        if shared.any():
            cost = np.repeat(self.lanes.block_bytes[lanes], np.count_nonzero(shared, axis=1))
            needs = {int(size): int(count) for size, count in zip(*np.unique(cost, return_counts=True), strict=True)}
            if not self.lanes.pool.ensure(needs):
                return None
            before = self.lanes.table[sequence, lanes]  # blocks may have moved
        beyond = (columns >= after[:, None]) & (before >= 0)
        old = [before[shared], before[beyond]]
        part = before.copy()
        for block_bytes, count in needs.items():
            fresh = arena.allocate(count, block_bytes)
            assert fresh is not None, "the pool promised these blocks"
            part[shared & (self.lanes.block_bytes[lanes] == block_bytes)[:, None]] = fresh
        part[beyond] = -1
        self.lanes.table[sequence, lanes] = part
        self.lanes.begin[sequence, lanes] = 0
        self.lanes.held[sequence, lanes] = kept
        self.lanes.room[sequence] = 0
        return before, np.concatenate(old)

    def pack_slots(self, sequence: int, kept: KeptSlots) -> None:
        """Note that the slots in `kept` were packed to the front of their lanes; starts explicit positions."""
        if sequence not in self.lanes.positions:
            capacity = self.lanes.table.shape[2] * self.lanes.spec.block_size
            self.lanes.positions.start(sequence, np.arange(capacity, dtype=np.int32))  # position = slot until now
        self.lanes.note_loss(sequence)
        self.lanes.positions.pack(sequence, kept)
        self.lanes.log_counts.pack(sequence, kept)

    def set_log_counts(self, sequence: int, lane: int, log_count: NDArray[np.float32]) -> None:
        """Set what is added to the logits of the first slots of a lane that was packed to the front."""
        if sequence not in self.lanes.log_counts:
            capacity = self.lanes.table.shape[2] * self.lanes.spec.block_size
            self.lanes.log_counts.start(sequence, np.zeros(capacity, np.float32))
        self.lanes.log_counts[sequence][lane, : len(log_count)] = log_count
