"""Slabs: the equal parts of an arena, each cut into blocks of one size or empty, and how many blocks are free.

    arena   | slab 0: 512 x 4096 B | slab 1: 963 x 2176 B | slab 2: empty | ...

An empty slab takes any block size; a slab becomes empty when its last block is freed. Torch-free.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from kvloom.spec.store import GRANULE_BYTES, SLAB_BYTES


class Slabs:
    """Counts the blocks of `num_slabs` slabs for blocks of a few declared sizes; knows no addresses."""

    def __init__(self, num_slabs: int, block_sizes: Iterable[int]) -> None:
        self.granules: NDArray[np.int32] = np.zeros(num_slabs, np.int32)  # of a block of each slab; 0: empty slab
        self.free: NDArray[np.int32] = np.zeros(num_slabs, np.int32)  # free blocks of each slab in use
        self._empty = list(range(num_slabs - 1, -1, -1))
        self._free_blocks = dict.fromkeys(block_sizes, 0)
        self._used_blocks = dict.fromkeys(block_sizes, 0)

    @staticmethod
    def capacity(block_bytes: int) -> int:
        """Return how many blocks of `block_bytes` a slab holds."""
        return SLAB_BYTES // block_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of all live blocks, each counted once."""
        return sum(size * count for size, count in self._used_blocks.items())

    @property
    def stranded_bytes(self) -> int:
        """Bytes of slabs in use that hold no live block: only blocks of the slab's own size can take them."""
        return (len(self.free) - len(self._empty)) * SLAB_BYTES - self.used_bytes

    def used_blocks(self, block_bytes: int) -> int:
        """Return the number of live blocks of this size."""
        return self._used_blocks[block_bytes]

    def available(self, needs: Mapping[int, int]) -> bool:
        """Return whether `needs` (block bytes -> number) can be allocated without evacuation or reclaim."""
        slabs = 0
        for size, count in needs.items():
            short = count - self._free_blocks[size]
            if short > 0:
                slabs += -(-short // self.capacity(size))
        return slabs <= len(self._empty)

    def members(self, block_bytes: int, least_free: int = 0) -> list[int]:
        """Return the slabs with blocks of this size, of which at least `least_free` are free, the fullest first."""
        found = np.flatnonzero((self.granules == block_bytes // GRANULE_BYTES) & (self.free >= least_free))
        fullest: list[int] = found[np.argsort(self.free[found], kind="stable")].tolist()
        return fullest

    def cut(self, block_bytes: int) -> int:
        """Cut an empty slab into blocks of this size and return its number."""
        slab = self._empty.pop()
        self.granules[slab] = block_bytes // GRANULE_BYTES
        self.free[slab] = self.capacity(block_bytes)
        self._free_blocks[block_bytes] += self.capacity(block_bytes)
        return slab

    def take(self, slab: int, number: int) -> None:
        """Count `number` free blocks of a slab as live."""
        self._count(slab, -number)

    def give_back(self, slab: int, number: int) -> int:
        """Count `number` live blocks of a slab as free, and the slab as empty after its last; returns their bytes."""
        size = self._count(slab, number)
        if self.free[slab] == self.capacity(size):
            self._free_blocks[size] -= self.capacity(size)
            self.granules[slab] = self.free[slab] = 0
            self._empty.append(slab)
        return number * size

    def _count(self, slab: int, freed: int) -> int:
        size = int(self.granules[slab]) * GRANULE_BYTES
        self.free[slab] += freed
        self._free_blocks[size] += freed
        self._used_blocks[size] -= freed
        return size

    def check_invariants(self, live: Mapping[int, int]) -> None:
        """Raise AssertionError unless the counters agree with the number of `live` blocks of each slab in use."""
        used, free = dict.fromkeys(self._used_blocks, 0), dict.fromkeys(self._used_blocks, 0)
        assert sorted(self._empty) == np.flatnonzero(self.granules == 0).tolist()
        assert sorted(live) == np.flatnonzero(self.granules).tolist()
        for slab, alive in live.items():
            size = int(self.granules[slab]) * GRANULE_BYTES
            assert alive > 0, "an empty slab was not given back"
            assert alive + self.free[slab] == self.capacity(size)
            used[size] += alive
            free[size] += int(self.free[slab])
        assert used == self._used_blocks and free == self._free_blocks
