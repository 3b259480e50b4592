"""LaneView: the lane table of a cache as the CPU kernels read it."""

import numpy as np
from numpy.typing import NDArray

from kvloom.attention.batch import AttentionBatch
from kvloom.cache.kvcache import KVCache
from kvloom.kernels.cpu import Lanes


class LaneView:
    """What the kernels are given of the lanes of a step; kept from step to step while the table is the same."""

    def __init__(self) -> None:
        self._lanes: Lanes | None = None
        self._end: NDArray[np.int32] = np.zeros((0, 0), np.int32)
        self._table: NDArray[np.int32] | None = None
        self._segments = 0  # their version

    def of(self, batch: AttentionBatch, cache: KVCache) -> Lanes:
        """Return the kernels' view of the lane table, which is made again only after the table was reallocated."""
        table = cache.lanes.table
        if self._lanes is None or self._table is not table:
            self._end = np.zeros(table.shape[:2], np.int32)
            self._lanes = Lanes(
                cache.memory.bytes, table, cache.lanes.begin, self._end, cache.spec.block_size, cache.spec.store
            )
            self._table, self._segments = table, 0
        if cache.lanes.segments.version != self._segments:
            self._lanes.set_segments(*cache.lanes.segments.arrays(), cache.lanes.segments.store_names)
            self._segments = cache.lanes.segments.version
        rows = batch.sequences
        self._end[rows] = cache.lanes.begin[rows] + cache.lanes.held[rows]
        return self._lanes

    def positions(self, batch: AttentionBatch, cache: KVCache) -> NDArray[np.int64] | None:
        """Return the addresses of positions of lanes with evicted tokens [rows, 2], for ALiBi; None without such."""
        held = cache.lanes.positions
        lossy = [int(row) for row in batch.sequences if int(row) in held]
        if not lossy:
            return None
        found = np.zeros((len(self._end), 2), np.int64)
        for row in lossy:
            found[row] = held[row].ctypes.data, held[row].shape[1]
        return found

    def bias(self, batch: AttentionBatch, cache: KVCache) -> NDArray[np.float32] | None:
        """Return the terms added to scores [sequences, lanes, slots] where tokens were merged, None for none."""
        merged = [int(row) for row in batch.sequences if int(row) in cache.lanes.log_counts]
        if not merged:
            return None
        bias = np.zeros((*cache.lanes.table.shape[:2], cache.lanes.table.shape[2] * cache.spec.block_size), np.float32)
        for row in merged:
            values = cache.lanes.log_counts[row]
            width = min(values.shape[1], bias.shape[2])
            bias[row, :, :width] = values[:, :width]
        return bias
