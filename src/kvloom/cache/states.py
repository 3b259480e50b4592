"""StateTable: the recurrent states of all running sequences, in blocks of the same arena as the lanes.

    sequence   | layer 0: head 0, head 1, ... | layer 3: head 0, ... |     one block each, of constant size

States are overwritten at every step, so all of them are treated like the last block of a lane: a fork shares every
block, and a sequence gets its own copies before it writes (`own`).
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvloom.cache.arena import Addresses, Move
from kvloom.cache.memory import ArenaMemory
from kvloom.cache.pool import BlockPool
from kvloom.spec.state import LayerState


class StateTable:
    """Blocks of `max_sequences` sequences; rows are numbered like those of the lane table, and opened beside them.

    table   [Q, N] int32   address of the block of each state, -1 for sequences without any (N heads over all layers)
    """

    def __init__(
        self,
        states: Sequence[LayerState],
        pool: BlockPool,
        memory: ArenaMemory,
        max_sequences: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Keep `states` in `dtype`, of which the pool's arena has the block sizes. Registers with the pool."""
        assert all(state.element_bytes == dtype.itemsize for state in states), "states are planned in another dtype"
        self.states = {state.layer: state for state in states}
        self.pool = pool
        self.memory = memory
        self.dtype = dtype
        ends = np.cumsum([state.num_heads for state in states]).tolist()
        self._columns = {s.layer: slice(end - s.num_heads, end) for s, end in zip(states, ends, strict=True)}
        sizes = [(state.block_bytes, state.num_heads) for state in states]
        self._block_bytes: NDArray[np.int64] = np.repeat([size for size, _ in sizes], [heads for _, heads in sizes])
        self.table: NDArray[np.int32] = np.full((max_sequences, len(self._block_bytes)), -1, np.int32)
        pool.holders.append(self)

    def open(self, row: int) -> bool:
        """Give an empty sequence states of zeros; False, and no change, when the blocks cannot be had now."""
        fresh = self._allocate()
        if fresh is None:
            return False
        assert (self.table[row] < 0).all(), "the sequence has states already"
        self.table[row] = fresh
        for layer in self.states:
            self.write(row, layer, torch.zeros(()))
        return True

    def close(self, row: int) -> None:
        """Release the states of a sequence, if it has any."""
        self.pool.arena.release(self.table[row][self.table[row] >= 0])
        self.table[row] = -1

    def fork(self, parent: int, child: int) -> None:
        """Let `child`, which is empty, share the states of `parent` until one of them writes."""
        assert (self.table[child] < 0).all(), "the sequence has states already"
        self.table[child] = self.table[parent]
        self.pool.arena.share(self.table[parent])

    def own(self, row: int) -> bool:
        """Replace shared states by copies, before a step writes; False, and no change, when blocks are short now."""
        if not (self.pool.arena.references(self.table[row]) > 1).any():
            return True
        fresh = self._allocate()
        if fresh is None:
            return False
        old = self.table[row].copy()  # now: blocks may have moved
        for size in np.unique(self._block_bytes).tolist():
            alike = self._block_bytes == size
            self.pool.copy(Move(size, old[alike], fresh[alike]))
        self.pool.arena.release(old)
        self.table[row] = fresh
        return True

    def _allocate(self) -> Addresses | None:
        """Return a block for every state of a sequence, None when they cannot be had now."""
        sizes, counts = np.unique(self._block_bytes, return_counts=True)
        needs = dict(zip(sizes.tolist(), counts.tolist(), strict=True))
        if not self.pool.ensure(needs):
            return None
        fresh: Addresses = np.empty(len(self._block_bytes), np.int32)
        for size, count in needs.items():
            blocks = self.pool.arena.allocate(count, size)
            assert blocks is not None, "the pool promised these blocks"
            fresh[self._block_bytes == size] = blocks
        return fresh

    def read(self, row: int, layer: int) -> torch.Tensor:
        """Return a copy of the states [heads, elements] of a layer."""
        state = self.states[layer]
        content = self.memory.load(self.table[row, self._columns[layer]], state.block_bytes)
        return content.view(self.dtype)[:, : state.elements]

    def write(self, row: int, layer: int, states: torch.Tensor) -> None:
        """Replace the states [heads, elements] of a layer; the sequence must `own` them."""
        addresses, state = self.table[row, self._columns[layer]], self.states[layer]
        assert (self.pool.arena.references(addresses) == 1).all(), "shared states are read-only"
        content = torch.zeros(state.num_heads, state.block_bytes // self.dtype.itemsize, dtype=self.dtype)
        content[:, : state.elements] = states
        self.memory.save(addresses, content.view(torch.uint8))

    def sequence_bytes(self, row: int) -> int:
        """Return the bytes of the states of a sequence, shared ones in full."""
        return int(self._block_bytes[self.table[row] >= 0].sum())

    def rename(self, renamed: Addresses) -> None:
        """Follow blocks that moved (see `Holder`)."""
        live = self.table >= 0
        new = renamed[self.pool.arena.cell_of(self.table[live])]
        self.table[live] = np.where(new >= 0, new, self.table[live])

    def held_blocks(self) -> Iterator[Addresses]:
        """Yield the addresses that each sequence references."""
        for row in self.table:
            yield row[row >= 0]
