"""BlockEncoder: encodes full native blocks of lanes in another store, permanently.

    lane   | native sinks | encoded ..... | first .. last - 1 | residual | open block |
                                            are encoded now

An encoded block is never written again and cannot be restored: `LaneTable.truncate` refuses to remove tokens that were
seen before a block was encoded. Compaction refuses lanes with encoded blocks.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvloom.cache.arena import Addresses
from kvloom.cache.lanes import LaneTable, ragged_arange
from kvloom.cache.segments import NATIVE
from kvloom.cache.stores.store import Store
from kvloom.errors import InvalidInputError, UnsupportedError
from kvloom.spec.store import STORES

Ints = NDArray[np.int64]


class BlockEncoder:
    """Encodes blocks of `lanes` in `stores` (by name, the native one as `NATIVE`)."""

    def __init__(self, lanes: LaneTable, stores: Mapping[str, Store]) -> None:
        self.lanes = lanes
        self.stores = stores
        self._widths = np.array([(x.k_width, x.v_width) for x in lanes.spec.lane_set], np.int64).reshape(-1, 2)

    def encode(
        self,
        sequence: int,
        lanes: Sequence[int] | Ints,
        store: str,
        first: ArrayLike,
        last: ArrayLike,
        digests: Sequence[bytes] | None = None,
    ) -> bool:
        """Encode the full native blocks in columns `first .. last - 1` of `lanes` [n]; both bounds are one or [n].

        The native blocks are released. Other sequences keep theirs. From its entries `digests` (None: all) the prefix
        index drops the copies that no other sequence reads, so that encoding never raises the bytes in use. While it
        runs, both copies of the blocks exist. False, and no change, when the new blocks cannot be allocated now. Raises
        `InvalidInputError` for blocks that are not full and `UnsupportedError` for lanes that cannot be encoded.
        """
        chosen = np.asarray(lanes, np.int64)
        low, high = (np.broadcast_to(np.asarray(bound, np.int64), len(chosen)) for bound in (first, last))
        self._check(sequence, chosen, store, low, high)
        spec, pool = self.lanes.spec, self.lanes.pool
        cost = np.array([spec.lane_block_bytes(lane, store) for lane in chosen.tolist()], np.int64)
        needs = {int(size): int((high - low)[cost == size].sum()) for size in np.unique(cost)}
        if not pool.ensure(needs):
            return False
        native = []
        kinds = np.column_stack((cost, self._widths[chosen]))
        for block_bytes, k_width, v_width in np.unique(kinds, axis=0).tolist():
            alike = (kinds == (block_bytes, k_width, v_width)).all(axis=1)
            number = (high - low)[alike]
            rows = np.repeat(chosen[alike], number)
            columns = np.repeat(low[alike], number) + ragged_arange(number.astype(np.int32)).astype(np.int64)
            native.append(self._encode_alike(sequence, rows, columns, store, block_bytes, (k_width, v_width)))
        for lane, begin, end in zip(chosen.tolist(), low.tolist(), high.tolist(), strict=True):
            self.lanes.segments.encode(sequence, lane, store, begin, end)
        self.lanes.note_loss(sequence)
        pool.index.drop_copies(np.concatenate(native), digests)
        return True

    def _encode_alike(
        self, sequence: int, rows: Ints, columns: Ints, store: str, block_bytes: int, widths: tuple[int, int]
    ) -> Addresses:
        """Encode the blocks in `columns` [N] of lanes `rows` [N] of these widths; returns the released native ones."""
        arena = self.lanes.pool.arena
        old: Addresses = self.lanes.table[sequence, rows, columns]
        fresh = arena.allocate(len(old), block_bytes)
        assert fresh is not None, "the pool promised these blocks"
        self.stores[store].encode(self.stores[NATIVE], old, fresh, *widths)
        self.lanes.table[sequence, rows, columns] = fresh
        arena.release(old)
        return old

    def _check(self, sequence: int, lanes: Ints, store: str, first: Ints, last: Ints) -> None:
        """Raise unless columns `first .. last - 1` of all `lanes` are full native blocks that `store` can take."""
        STORES.get(store)  # an unknown name is refused with the nearest known one
        table, size = self.lanes, self.lanes.spec.block_size
        if store not in self.stores or len(set(lanes.tolist())) != len(lanes):
            raise InvalidInputError(
                f"encode takes each lane once and a store among {sorted(filter(None, self.stores))}; "
                f"got {store!r} for lanes {lanes.tolist()}"
            )
        for k_width, v_width in np.unique(self._widths[lanes], axis=0).tolist():
            reasons = self.stores[store].unsupported(k_width, v_width)
            if reasons:
                raise UnsupportedError("encoding", reasons)
        begin = table.begin[sequence, lanes]
        end = begin + table.held[sequence, lanes]
        for place in np.flatnonzero((begin > first * size) | (last * size > end) | (first >= last)).tolist():
            columns = f"{first[place]}..{last[place] - 1}"
            raise InvalidInputError(f"columns {columns} of lane {lanes[place]} are not all full blocks")
        for lane, low, high in zip(lanes.tolist(), first.tolist(), last.tolist(), strict=True):
            if table.spec.lane_set[lane].window is not None:
                raise UnsupportedError("encoding", [f"lane {lane} is windowed; small windows stay in 16 bit"])
            if table.segments.overlaps(sequence, lane, low, high):
                reason = f"lane {lane} has encoded blocks there; a block is encoded once"
                raise UnsupportedError("encoding", [reason])
