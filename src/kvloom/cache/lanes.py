"""LaneTable: the lanes of all running sequences, their blocks, and the tokens processed. Torch-free.

    sequence (row set)   one token sequence of one request; it owns one lane per KV head per layer
    slot                 place of a token in its lane: block column slot // P, offset slot % P
    seen                 tokens of the sequence processed so far: positions, stop rules
    begin, held          a lane's live slots are begin .. begin + held - 1

    lane   | freed (-1) | begin ....... held tokens ....... end | room in the last block |

A window moves `begin`. A policy that evicts tokens in the middle packs the kept ones to slots 0 .. held - 1, and their
positions are stored explicitly from then on. All bookkeeping of a sequence is done on arrays over its lanes.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kvloom.cache.arena import Addresses, Move
from kvloom.cache.pool import BlockPool
from kvloom.cache.segments import SegmentList
from kvloom.cache.slots import SlotValues
from kvloom.errors import InvalidInputError
from kvloom.spec.kv import KVSpec

Ints = NDArray[np.int32]


class LaneTable:
    """Block table of `max_sequences` sequences; rows persist between steps.

    table   [Q, R, C] int32   address of each block, -1 where there is none (Q sequences, R lanes, C columns)
    begin   [Q, R]    int32   first live slot of each lane
    held    [Q, R]    int32   live slots of each lane
    seen    [Q]       int64   tokens processed

    `group_lanes` are the lanes of each group of the spec.
    """

    def __init__(self, spec: KVSpec, pool: BlockPool, max_sequences: int) -> None:
        self.spec = spec
        self.pool = pool
        lanes = spec.num_lanes
        self.table: Ints = np.full((max_sequences, lanes, 16), -1, np.int32)
        self.begin: Ints = np.zeros((max_sequences, lanes), np.int32)
        self.held: Ints = np.zeros((max_sequences, lanes), np.int32)
        self.seen: NDArray[np.int64] = np.zeros(max_sequences, np.int64)
        self.segments = SegmentList(max_sequences, lanes)
        self.positions: SlotValues[np.int32] = SlotValues(
            lanes, np.int32
        )  # of sequences that lost tokens in the middle
        self.log_counts: SlotValues[np.float32] = SlotValues(lanes, np.float32)  # of sequences with merged tokens
        self.peak_bytes = [0] * max_sequences  # most bytes held since `open`
        self.lossy_until = [-1] * max_sequences  # tokens seen at the last loss, -1 where nothing was lost
        self.room = [0] * max_sequences  # tokens that fit without any bookkeeping
        self._free = list(range(max_sequences - 1, -1, -1))
        self.group_lanes = [np.asarray(group.lanes, np.int64) for group in spec.groups]
        self.block_bytes = np.zeros(lanes, np.int64)
        for group, members in zip(spec.groups, self.group_lanes, strict=True):
            self.block_bytes[members] = group.block_bytes
        pool.holders.append(self)

    # ---- open, close, fork ----------------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Sequences that can still be opened."""
        return len(self._free)

    def open(self) -> int:
        """Return an empty sequence; the caller makes sure that `num_free` is not zero."""
        sequence = self._free.pop()
        self.table[sequence] = -1
        self.begin[sequence] = 0
        self.held[sequence] = 0
        self.seen[sequence] = 0
        self.room[sequence] = 0
        self.peak_bytes[sequence] = 0
        self.lossy_until[sequence] = -1
        self.segments.clear(sequence)
        return sequence

    def close(self, sequence: int) -> None:
        """Release every block of `sequence` and free its row set."""
        row = self.table[sequence]
        self.pool.arena.release(row[row >= 0])
        row[:] = -1
        self.begin[sequence] = 0
        self.held[sequence] = 0
        self.seen[sequence] = 0
        self.segments.clear(sequence)
        self.positions.drop(sequence)
        self.log_counts.drop(sequence)
        self._free.append(sequence)

    def fork(self, parent: int) -> int:
        """Return a new sequence that shares every block of `parent`; each copies a shared block before it writes."""
        child = self.open()
        for array in (self.table, self.begin, self.held):
            array[child] = array[parent]
        self.seen[child] = self.seen[parent]
        self.lossy_until[child] = self.lossy_until[parent]
        self.segments.copy(parent, child)
        self.positions.copy(parent, child)
        self.log_counts.copy(parent, child)
        row = self.table[child]
        self.pool.arena.share(row[row >= 0])
        self.room[parent] = self.room[child] = 0
        return child

    def is_lossy(self, sequence: int) -> bool:
        """Return whether any lane has lost data: by eviction, merging or encoding."""
        return self.lossy_until[sequence] >= 0

    def note_loss(self, sequence: int) -> None:
        """Record a loss at the present length: tokens seen until now can no longer be removed."""
        self.lossy_until[sequence] = int(self.seen[sequence])

    @property
    def open_sequences(self) -> list[int]:
        """Sequences in use, ascending."""
        free = set(self._free)
        return [s for s in range(len(self.seen)) if s not in free]

    # ---- growth ---------------------------------------------------------------------------------------------------

    def extend(self, sequence: int, num_tokens: int) -> bool:
        """Give every lane slots for `num_tokens` more tokens and count them as seen and held.

        Windowed lanes first free the blocks that no later query attends to; shared last blocks are copied. Returns
        False when the blocks cannot be allocated now; then only window blocks have changed.
        """
        if self.room[sequence] < num_tokens and not self._grow(sequence, num_tokens):
            return False
        self.room[sequence] -= num_tokens
        if sequence in self.positions:
            end = self.begin[sequence] + self.held[sequence]
            seen = int(self.seen[sequence])
            self.positions.append(sequence, end, np.arange(seen, seen + num_tokens, dtype=np.int32))
            self.log_counts.append(sequence, end, np.zeros(num_tokens, np.float32))
        self.held[sequence] += num_tokens
        self.seen[sequence] += num_tokens
        return True

    def blocks_needed(self, sequence: int, num_tokens: int) -> dict[int, int]:
        """Return the fresh blocks (block bytes -> number) that `extend` would take, copies of shared ones included."""
        _, count, _ = self._growth(sequence, num_tokens)
        return self._by_size(count)

    def _growth(self, sequence: int, num_tokens: int) -> tuple[Ints, Ints, NDArray[np.bool_]]:
        """Return (first new column, new columns, last block is shared and must be copied) for each lane."""
        size = self.spec.block_size
        end = self.begin[sequence] + self.held[sequence]
        have = -(-end // size)
        count = -(-(end + num_tokens) // size) - have
        shared = np.zeros(len(end), np.bool_)
        partial = np.flatnonzero(end % size != 0)
        if len(partial):
            tails = self.table[sequence, partial, end[partial] // size]
            shared[partial] = self.pool.arena.references(tails) > 1
        return have - shared, count + shared, shared

    def _by_size(self, count: Ints) -> dict[int, int]:
        needs: dict[int, int] = {}
        for group, members in zip(self.spec.groups, self.group_lanes, strict=True):
            total = int(count[members].sum())
            if total:
                needs[group.block_bytes] = needs.get(group.block_bytes, 0) + total
        return needs

    def _grow(self, sequence: int, num_tokens: int) -> bool:
        self._leave_window(sequence)
        first, count, shared = self._growth(sequence, num_tokens)
        needs = self._by_size(count)
        if not self.pool.ensure(needs):
            return False
        self.widen(int((first + count).max()))
        for size, total in needs.items():
            fresh = self.pool.arena.allocate(total, size)
            assert fresh is not None, "the pool promised these blocks"
            lanes = np.flatnonzero((self.block_bytes == size) & (count > 0))
            number = count[lanes]
            rows = np.repeat(lanes, number)
            columns = np.repeat(first[lanes], number) + ragged_arange(number)
            copied = np.flatnonzero(shared[lanes])
            starts = np.cumsum(number) - number
            if len(copied):
                old = self.table[sequence, lanes[copied], first[lanes[copied]]].copy()
                self.pool.copy(Move(size, old, fresh[starts[copied]]))
                self.pool.arena.release(old)
            self.table[sequence, rows, columns] = fresh
        end = self.begin[sequence] + self.held[sequence]
        capacity = (first + count) * self.spec.block_size
        self.room[sequence] = int((capacity - end).min())
        self.peak_bytes[sequence] = max(self.peak_bytes[sequence], self.sequence_bytes(sequence))
        return True

    def _leave_window(self, sequence: int) -> None:
        """Free the blocks of windowed lanes that lie wholly before the window of the next query."""
        size = self.spec.block_size
        for group, members in zip(self.spec.groups, self.group_lanes, strict=True):
            if group.window is None:
                continue
            first = int(self.seen[sequence]) - (group.window - 1)
            old = int(self.begin[sequence, members[0]])
            if first <= old:
                continue
            gone = self.table[sequence, members, old // size : first // size]
            if gone.size:
                self.pool.arena.release(gone[gone >= 0])
                self.table[sequence, members, old // size : first // size] = -1
            self.begin[sequence, members] = first
            self.held[sequence, members] -= first - old

    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Remove the newest `num_tokens`, as if they had never been appended::

            lane   | begin ............... end - num_tokens | .......... end |
                   |               stays                    | blocks go back |

        A shared last block is left to its other owners and copied before the next write. Blocks that a window has freed
        are not restored, so the window of the next query must still be held. The tokens of one `extend` can always be
        removed. Raises `InvalidInputError` for more, and for tokens that were held at a loss.
        """
        seen, size = int(self.seen[sequence]) - num_tokens, self.spec.block_size
        bound = max(0, self.lossy_until[sequence])
        for group, members in zip(self.spec.groups, self.group_lanes, strict=True):
            if group.window is not None and self.begin[sequence, members[0]]:
                bound = max(bound, int(self.begin[sequence, members[0]]) + group.window - 1)
        if num_tokens < 0 or seen < bound:
            raise InvalidInputError(
                f"{num_tokens} of {seen + num_tokens} tokens cannot be taken back; the first {bound} must stay, "
                "because a window has moved past what comes before them, or they were there when tokens were lost"
            )
        self.held[sequence] -= num_tokens
        self.seen[sequence] = seen
        end = self.begin[sequence] + self.held[sequence]
        row = self.table[sequence]
        gone = (np.arange(row.shape[1]) >= -(-end // size)[:, None]) & (row >= 0)
        self.pool.arena.release(row[gone])
        row[gone] = -1
        self.room[sequence] = 0

    def widen(self, columns: int) -> None:
        """Make the table at least `columns` wide by doubling; rows without a sequence are undefined until `open`.

        Their memory is not written: most of a wide table is never used, and writing it would take longer than a step.
        """
        have = self.table.shape[2]
        if columns > have:
            wider = np.empty((*self.table.shape[:2], max(columns, 2 * have)), np.int32)
            for sequence in self.open_sequences:
                wider[sequence, :, :have] = self.table[sequence]
                wider[sequence, :, have:] = -1
            self.table = wider

    # ---- contents and holders ------------------------------------------------------------------------------------

    def positions_of(self, sequence: int, lane: int) -> Ints:
        """Return the positions [held] of what a lane holds, in slot order."""
        begin, held = int(self.begin[sequence, lane]), int(self.held[sequence, lane])
        if sequence in self.positions:
            return self.positions[sequence][lane, begin : begin + held].copy()
        return np.arange(begin, begin + held, dtype=np.int32)

    def rename(self, renamed: Addresses) -> None:
        """Update the addresses of blocks that moved (see `Holder`)."""
        for sequence in self.open_sequences:
            row = self.table[sequence]
            live = row >= 0
            new = renamed[self.pool.arena.cell_of(row[live])]
            row[live] = np.where(new >= 0, new, row[live])

    def held_blocks(self) -> Iterator[Addresses]:
        """Yield every address that a sequence references."""
        for sequence in self.open_sequences:
            row = self.table[sequence]
            yield row[row >= 0]

    def sequence_bytes(self, sequence: int, beside: int | None = None) -> int:
        """Return the bytes of all blocks of `sequence`, shared ones in full; without those of the sequence `beside`."""
        if beside is None:
            counts = (self.table[sequence] >= 0).sum(axis=1)
            return int((counts * self.block_bytes).sum()) + self.segments.extra_bytes(sequence, self.spec)
        own = (self.table[sequence] >= 0) & (self.table[sequence] != self.table[beside])
        return int(self.pool.arena.block_bytes_at(self.table[sequence][own]).sum())

    def check_invariants(self) -> None:
        """Raise AssertionError unless tables, counters and windows agree."""
        size = self.spec.block_size
        for sequence in self.open_sequences:
            end = self.begin[sequence] + self.held[sequence]
            assert (self.held[sequence] >= 0).all() and (self.begin[sequence] >= 0).all()
            columns = np.arange(self.table.shape[2])
            live = (columns >= (self.begin[sequence] // size)[:, None]) & (columns < (-(-end // size))[:, None])
            there = self.table[sequence] >= 0
            assert (there | ~live).all(), "a live slot has no block"
            assert (~there | (columns >= (self.begin[sequence] // size)[:, None])).all(), "a freed slot has a block"
            for lane in range(self.spec.num_lanes):
                positions = self.positions_of(sequence, lane)
                assert (np.diff(positions) > 0).all() and (not len(positions) or positions[-1] < self.seen[sequence])
            if sequence not in self.positions:
                assert (end == self.seen[sequence]).all(), "only a lossy lane may hold fewer slots than were seen"


def ragged_arange(counts: Ints) -> Ints:
    """Return 0..counts[0]-1, 0..counts[1]-1, ... in one array."""
    total = int(counts.sum())
    starts = np.cumsum(counts) - counts
    return (np.arange(total) - np.repeat(starts, counts)).astype(np.int32)
