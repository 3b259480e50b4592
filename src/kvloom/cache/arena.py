"""Arena: which granules of one byte range are in use. Slabs of 2 MiB, each cut into blocks of one size. Torch-free.

    arena   | slab 0: 512 x 4096 B | slab 1: 963 x 2176 B | slab 2: empty | ...
    block     one lane's `block_size` tokens, named by its address (offset in granules of 128 bytes)

An empty slab takes any block size; a slab becomes empty when its last block is freed. Blocks have reference counts.
Allocation fills the fullest slab first, each in ascending order, so that a lane lies in long runs, which are read
faster. `evacuation` empties nearly empty slabs, so that stranded bytes stay below one slab for each block size (and
the tails of full slabs that a block size does not divide).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvloom.errors import DoesNotFitError, InvalidInputError
from kvloom.spec.store import GRANULE_BYTES, SLAB_BYTES
from kvloom.units import format_bytes

Addresses = NDArray[np.int32]
"""Block addresses in granules; -1 in a table means no block."""

SLAB_GRANULES = SLAB_BYTES // GRANULE_BYTES


@dataclass(frozen=True)
class Move:
    """Blocks of `block_bytes` that move: the bytes at `source[i]` are to be copied to `target[i]`."""

    block_bytes: int
    source: Addresses
    target: Addresses


class Arena:
    """Allocates blocks of a few declared sizes from equal slabs and counts the references to each block."""

    def __init__(self, num_bytes: int, block_sizes: Iterable[int]) -> None:
        """Manage `num_bytes` (rounded down to slabs) for blocks of the given sizes in bytes."""
        self.block_sizes = tuple(sorted(set(block_sizes)))
        for size in self.block_sizes:
            if size <= 0 or size % GRANULE_BYTES or size > SLAB_BYTES:
                raise InvalidInputError(
                    f"block size {size} must be a multiple of {GRANULE_BYTES} from {GRANULE_BYTES} to {SLAB_BYTES}"
                )
        if not self.block_sizes:
            raise InvalidInputError("an arena needs at least one block size")
        self.num_slabs = num_bytes // SLAB_BYTES
        if self.num_slabs < 1:
            raise DoesNotFitError(
                f"the KV cache has {format_bytes(num_bytes)}; it needs at least one slab of "
                f"{format_bytes(SLAB_BYTES)}. Raise --kv-cache-memory-bytes"
            )
        if self.num_slabs * SLAB_GRANULES > np.iinfo(np.int32).max:
            raise InvalidInputError(f"the KV cache has {format_bytes(num_bytes)}; addresses reach 256 GiB")
        # Blocks start at least `_cell` granules apart, so address // _cell is a different cell for each live block.
        self._cell = self.block_sizes[0] // GRANULE_BYTES
        self.refs: NDArray[np.int32] = np.zeros(self.num_slabs * SLAB_GRANULES // self._cell + 1, np.int32)
        self._size: NDArray[np.int32] = np.zeros(self.num_slabs, np.int32)  # granules a block; 0: empty slab
        self._free: NDArray[np.int32] = np.zeros(self.num_slabs, np.int32)  # free blocks of a slab in use
        self._empty = list(range(self.num_slabs - 1, -1, -1))
        self._free_blocks = dict.fromkeys(self.block_sizes, 0)
        self._used_blocks = dict.fromkeys(self.block_sizes, 0)
        self.peak_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes under management."""
        return self.num_slabs * SLAB_BYTES

    @property
    def used_bytes(self) -> int:
        """Bytes of all live blocks, each counted once."""
        return sum(size * count for size, count in self._used_blocks.items())

    @property
    def stranded_bytes(self) -> int:
        """Bytes of slabs in use that hold no live block: only blocks of the slab's own size can take them."""
        return (self.num_slabs - len(self._empty)) * SLAB_BYTES - self.used_bytes

    @staticmethod
    def blocks_per_slab(block_bytes: int) -> int:
        """Return how many blocks of `block_bytes` a slab holds."""
        return SLAB_BYTES // block_bytes

    def used_blocks(self, block_bytes: int) -> int:
        """Return the number of live blocks of this size."""
        return self._used_blocks[block_bytes]

    def available(self, needs: Mapping[int, int]) -> bool:
        """Return whether `needs` (block bytes -> number) can be allocated without evacuation or reclaim."""
        slabs = 0
        for size, count in needs.items():
            short = count - self._free_blocks[size]
            if short > 0:
                slabs += -(-short // self.blocks_per_slab(size))
        return slabs <= len(self._empty)

    def allocate(self, count: int, block_bytes: int) -> Addresses | None:
        """Return `count` fresh addresses with one reference each, or None (and change nothing) if they don't fit."""
        if not self.available({block_bytes: count}):
            return None
        granules = block_bytes // GRANULE_BYTES
        out = np.empty(count, np.int32)
        done = 0
        if self._free_blocks[block_bytes]:
            partial = np.flatnonzero((self._size == granules) & (self._free > 0))
            for slab in partial[np.argsort(self._free[partial], kind="stable")]:
                if done == count:
                    break
                done = self._take(int(slab), out, done)
        while done < count:
            slab = self._empty.pop()
            number = self.blocks_per_slab(block_bytes)
            self._size[slab] = granules
            self._free[slab] = number
            self._free_blocks[block_bytes] += number
            done = self._take(slab, out, done)
        self.refs[out // self._cell] = 1
        self._free_blocks[block_bytes] -= count
        self._used_blocks[block_bytes] += count
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return out

    def _take(self, slab: int, out: Addresses, done: int) -> int:
        """Put the first free blocks of `slab` into `out[done:]`; returns the new `done`. The caller references them."""
        number = min(int(self._free[slab]), len(out) - done)
        every, live = self._blocks(slab)
        out[done : done + number] = every[~live][:number]
        self._free[slab] -= number
        return done + number

    def _blocks(self, slab: int) -> tuple[Addresses, NDArray[np.bool_]]:
        """Return the addresses of the blocks of a slab in use, ascending, and which of them are live."""
        granules = int(self._size[slab])
        every = slab * SLAB_GRANULES + np.arange(SLAB_GRANULES // granules, dtype=np.int32) * granules
        return every, self.refs[every // self._cell] > 0

    def share(self, addresses: Addresses) -> None:
        """Add one reference to each block of `addresses` (each block once)."""
        cells = addresses // self._cell
        assert (self.refs[cells] > 0).all(), "a free block cannot be shared"
        self.refs[cells] += 1

    def references(self, addresses: Addresses) -> NDArray[np.int32]:
        """Return the reference count of each block."""
        counts: NDArray[np.int32] = self.refs[addresses // self._cell]
        return counts

    def release(self, addresses: Addresses) -> int:
        """Drop one reference to each block (each block once); returns the bytes that became free."""
        cells = addresses // self._cell
        assert (self.refs[cells] > 0).all(), "a block was released twice"
        self.refs[cells] -= 1
        gone = addresses[self.refs[cells] == 0]
        return self._give_back(gone) if len(gone) else 0

    def _give_back(self, gone: Addresses) -> int:
        """Count unreferenced blocks as free; returns their bytes."""
        slabs, numbers = np.unique(gone // SLAB_GRANULES, return_counts=True)
        freed = 0
        for slab, number in zip(slabs.tolist(), numbers.tolist(), strict=True):
            size = int(self._size[slab]) * GRANULE_BYTES
            self._free[slab] += number
            self._free_blocks[size] += number
            self._used_blocks[size] -= number
            freed += number * size
            if self._free[slab] == self.blocks_per_slab(size):
                self._retire(slab, size)
        return freed

    def _retire(self, slab: int, block_bytes: int) -> None:
        """Make a slab without live blocks available to all block sizes."""
        self._free_blocks[block_bytes] -= self.blocks_per_slab(block_bytes)
        self._size[slab] = 0
        self._free[slab] = 0
        self._empty.append(slab)

    def evacuation(self) -> list[Move]:
        """Empty every slab whose blocks fit into fuller slabs of their size; returns the moves.

        The bookkeeping is done on return (references moved, slabs retired); the caller copies the bytes at once and
        renames the addresses wherever it keeps them. Afterwards each block size has at most one slab that is not full.
        """
        moves: list[Move] = []
        for size in self.block_sizes:
            granules = size // GRANULE_BYTES
            capacity = self.blocks_per_slab(size)
            members = np.flatnonzero(self._size == granules)
            members = members[np.argsort(self._free[members], kind="stable")]  # fullest first
            keep = -(-self._used_blocks[size] // capacity)
            victims = members[keep:]
            if not len(victims):
                continue
            source = np.concatenate([self._live(int(slab)) for slab in victims])
            target = np.empty(len(source), np.int32)
            done = 0
            for slab in members[:keep]:
                done = self._take(int(slab), target, done)
            assert done == len(source), "the kept slabs must take every block"
            self.refs[target // self._cell] = self.refs[source // self._cell]
            self.refs[source // self._cell] = 0
            for slab in victims:
                self._free_blocks[size] += capacity - int(self._free[slab])
                self._retire(int(slab), size)
            self._free_blocks[size] -= len(source)
            moves.append(Move(size, source, target))
        return moves

    def _live(self, slab: int) -> Addresses:
        """Return the addresses of the live blocks of one slab, ascending."""
        every, live = self._blocks(slab)
        found: Addresses = every[live]
        return found

    def block_bytes_at(self, addresses: Addresses) -> NDArray[np.int64]:
        """Return the bytes of the block at each address."""
        sizes: NDArray[np.int64] = self._size[addresses // SLAB_GRANULES].astype(np.int64) * GRANULE_BYTES
        return sizes

    def cell_of(self, addresses: Addresses) -> NDArray[np.int32]:
        """Return a small integer that is unique for each live block (an index of tables over all blocks)."""
        cells: NDArray[np.int32] = addresses // self._cell
        return cells

    @property
    def num_cells(self) -> int:
        """Length of a table indexed by `cell_of`."""
        return len(self.refs)

    def check_invariants(self) -> None:
        """Raise AssertionError unless counters and references agree."""
        live = dict.fromkeys(self.block_sizes, 0)
        spare = dict.fromkeys(self.block_sizes, 0)
        assert sorted(self._empty) == np.flatnonzero(self._size == 0).tolist()
        for slab in np.flatnonzero(self._size):
            granules = int(self._size[slab])
            size = granules * GRANULE_BYTES
            alive = len(self._live(int(slab)))
            assert alive > 0, "an empty slab was not given back"
            assert alive + self._free[slab] == self.blocks_per_slab(size)
            live[size] += alive
            spare[size] += int(self._free[slab])
        assert live == self._used_blocks and spare == self._free_blocks
        assert int((self.refs > 0).sum()) == sum(live.values())
        assert (self.refs >= 0).all()
