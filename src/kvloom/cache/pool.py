"""BlockPool: blocks for lanes, found by evacuating slabs, then by reclaiming cached prefixes. Torch-free."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np

from kvloom.cache.arena import Addresses, Arena, Move
from kvloom.cache.prefix import PrefixIndex


class Holder(Protocol):
    """An object that holds block addresses and must update them when blocks move."""

    def rename(self, renamed: Addresses) -> None:
        """Replace every kept address a by `renamed[cell of a]` where that is not -1."""

    def held_blocks(self) -> Iterator[Addresses]:
        """Yield arrays of the addresses kept, one entry for each reference held."""


class BlockPool:
    """One arena, its prefix index, and all other holders of addresses.

    `copy` carries out moves of bytes; it is called before the moved blocks are used again.
    """

    def __init__(self, arena: Arena, index: PrefixIndex, copy: Callable[[Move], None]) -> None:
        self.arena = arena
        self.index = index
        self.copy = copy
        self.holders: list[Holder] = [index]
        self.num_evacuated = 0

    def ensure(self, needs: Mapping[int, int]) -> bool:
        """Make room for `needs` (block bytes -> number): evacuate, then reclaim. False when that is not possible now.

        Blocks may move. Blocks of requests are kept. Cached prefixes are reclaimed only if the room then suffices.
        """
        if self.arena.slabs.available(needs):
            return True
        self.evacuate()
        if self.arena.slabs.available(needs):
            return True
        if not self._attainable(needs):
            return False
        pending = 0
        for freed in self.index.reclaim():
            pending += freed
            if self.arena.slabs.available(needs):
                return True
            if pending >= sum(size * count for size, count in needs.items()):
                self.evacuate()
                pending = 0
                if self.arena.slabs.available(needs):
                    return True
        self.evacuate()
        return self.arena.slabs.available(needs)

    def _attainable(self, needs: Mapping[int, int]) -> bool:
        """Return whether `needs` would fit beside the blocks of requests if every cached prefix were reclaimed."""
        idle = self.index.idle_blocks()
        slabs = 0
        for size in self.arena.block_sizes:
            live = self.arena.slabs.used_blocks(size) - idle.get(size, 0) + needs.get(size, 0)
            slabs += -(-live // self.arena.slabs.capacity(size))
        return slabs <= self.arena.num_slabs

    def evacuate(self) -> None:
        """Empty nearly empty slabs into fuller ones; addresses change everywhere at once."""
        moves = self.arena.evacuation()
        if not moves:
            return
        renamed = np.full(self.arena.num_cells, -1, np.int32)
        for move in moves:
            self.copy(move)
            renamed[self.arena.cell_of(move.source)] = move.target
            self.num_evacuated += len(move.source)
        for holder in self.holders:
            holder.rename(renamed)

    def check_invariants(self) -> None:
        """Raise AssertionError unless every reference count equals the number of references that holders have."""
        self.arena.check_invariants()
        counted = np.zeros(self.arena.num_cells, np.int32)
        for holder in self.holders:
            for addresses in holder.held_blocks():
                np.add.at(counted, self.arena.cell_of(addresses), 1)
        assert (counted == self.arena.refs).all(), "references and holders disagree"
