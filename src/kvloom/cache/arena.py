"""Arena: which granules of one byte range are in use, by blocks in slabs of 2 MiB (`Slabs`). Torch-free.

    block     one lane's `block_size` tokens, named by its address (offset in granules of 128 bytes)

Blocks have reference counts. Allocation fills the fullest slab first, each in ascending order, so that a lane lies in
long runs, which are read faster. `evacuation` empties nearly empty slabs, so that stranded bytes stay below one slab
for each block size (and the tails of full slabs that a block size does not divide).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvloom.cache.slabs import Slabs
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
        self.slabs = Slabs(self.num_slabs, self.block_sizes)
        self.peak_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes under management."""
        return self.num_slabs * SLAB_BYTES

    @property
    def used_bytes(self) -> int:
        """Bytes of all live blocks, each counted once."""
        return self.slabs.used_bytes

    def allocate(self, count: int, block_bytes: int) -> Addresses | None:
        """Return `count` fresh addresses with one reference each, or None (and change nothing) if they don't fit."""
        slabs = self.slabs
        if not slabs.available({block_bytes: count}):
            return None
        out = np.empty(count, np.int32)
        done = 0
        for slab in slabs.members(block_bytes, least_free=1):
            if done == count:
                break
            done = self._take(slab, out, done)
        while done < count:
            done = self._take(slabs.cut(block_bytes), out, done)
        self.refs[out // self._cell] = 1
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return out

    def _take(self, slab: int, out: Addresses, done: int) -> int:
        """Put the first free blocks of `slab` into `out[done:]`; returns the new `done`. The caller references them."""
        number = min(int(self.slabs.free[slab]), len(out) - done)
        if number:
            every, live = self._blocks(slab)
            out[done : done + number] = every[~live][:number]
            self.slabs.take(slab, number)
        return done + number

    def _blocks(self, slab: int) -> tuple[Addresses, NDArray[np.bool_]]:
        """Return the addresses of the blocks of a slab in use, ascending, and which of them are live."""
        granules = int(self.slabs.granules[slab])
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
        if not len(gone):
            return 0
        slabs, numbers = np.unique(gone // SLAB_GRANULES, return_counts=True)
        return sum(map(self.slabs.give_back, slabs.tolist(), numbers.tolist()))

    def evacuation(self) -> list[Move]:
        """Empty every slab whose blocks fit into fuller slabs of their size; returns the moves.

        The bookkeeping is done on return (references moved, slabs retired); the caller copies the bytes at once and
        renames the addresses wherever it keeps them. Afterwards each block size has at most one slab that is not full.
        """
        moves: list[Move] = []
        for size in self.block_sizes:
            members = self.slabs.members(size)
            keep = -(-self.slabs.used_blocks(size) // self.slabs.capacity(size))
            if keep == len(members):
                continue
            leaving = [self._live(slab) for slab in members[keep:]]
            source = np.concatenate(leaving)
            target = np.empty(len(source), np.int32)
            done = 0
            for slab in members[:keep]:
                done = self._take(slab, target, done)
            assert done == len(source), "the kept slabs must take every block"
            self.refs[target // self._cell] = self.refs[source // self._cell]
            self.refs[source // self._cell] = 0
            for slab, blocks in zip(members[keep:], leaving, strict=True):
                self.slabs.give_back(slab, len(blocks))
            moves.append(Move(size, source, target))
        return moves

    def _live(self, slab: int) -> Addresses:
        """Return the addresses of the live blocks of one slab, ascending."""
        every, live = self._blocks(slab)
        found: Addresses = every[live]
        return found

    def block_bytes_at(self, addresses: Addresses) -> NDArray[np.int64]:
        """Return the bytes of the block at each address."""
        sizes: NDArray[np.int64] = self.slabs.granules[addresses // SLAB_GRANULES].astype(np.int64) * GRANULE_BYTES
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
        live = {int(slab): len(self._live(int(slab))) for slab in np.flatnonzero(self.slabs.granules)}
        self.slabs.check_invariants(live)
        assert int((self.refs > 0).sum()) == sum(live.values())
        assert (self.refs >= 0).all()
