"""SegmentList: which store encodes which blocks of a lane. Torch-free.

    lane   | 16-bit sinks | int4 ...... | int8 ... | native, open ...

A lane is native from end to end until some of its full blocks are encoded. Segments are listed in column order; the
last one is always native and open, so that tokens are appended in the model's own precision.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvloom.spec.kv import KVSpec

Ints = NDArray[np.int32]

NATIVE = ""
"""Store name of a segment in the model's own dtype."""


@dataclass(frozen=True)
class Segment:
    """Blocks in columns `first .. last - 1` of a lane, all in `store`; `last` is None for the open end."""

    store: str
    first: int
    last: int | None


class SegmentArrays(NamedTuple):
    """All segments but the open ends, as kernels read them; int32.

    start  [Q * R + 1]  segments start[i] .. start[i + 1] - 1 are those of lane i of the flattened [Q, R], in order
    store  [S]          index of each segment's store in `SegmentList.store_names`
    last   [S]          column behind its last one
    """

    start: Ints
    store: Ints
    last: Ints


class SegmentList:
    """The segments of every lane of every sequence; empty for lanes that are native throughout.

    `version` changes whenever a segment changes.
    """

    def __init__(self, max_sequences: int, num_lanes: int) -> None:
        self._encoded: list[dict[int, list[Segment]]] = [{} for _ in range(max_sequences)]
        self._arrays: list[tuple[Ints, Ints, Ints] | None] = [None] * max_sequences
        self._none = np.zeros(num_lanes, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int32)
        self.num_lanes = num_lanes
        self.version = 0
        self.store_names = [NATIVE]

    def of(self, sequence: int, lane: int) -> list[Segment]:
        """Return the segments of a lane in column order, from column 0 to the open end."""
        whole: list[Segment] = []
        column = 0
        for segment in self._encoded[sequence].get(lane, []):
            if segment.first > column:
                whole.append(Segment(NATIVE, column, segment.first))
            whole.append(segment)
            assert segment.last is not None
            column = segment.last
        whole.append(Segment(NATIVE, column, None))
        return whole

    def is_native(self, sequence: int, lane: int) -> bool:
        """Return whether no block of the lane is encoded."""
        return lane not in self._encoded[sequence]

    def any_encoded(self, sequence: int) -> bool:
        """Return whether any block of the sequence is encoded."""
        return bool(self._encoded[sequence])

    def encoded(self, sequence: int) -> Iterator[tuple[int, Segment]]:
        """Yield each lane with each of its encoded segments."""
        for lane, segments in self._encoded[sequence].items():
            for segment in segments:
                yield lane, segment

    def overlaps(self, sequence: int, lane: int, first: int, last: int) -> bool:
        """Return whether any of the columns `first .. last - 1` of a lane is encoded."""
        return any(s.first < last and first < (s.last or last) for s in self._encoded[sequence].get(lane, ()))

    def encode(self, sequence: int, lane: int, store: str, first: int, last: int) -> None:
        """Note that columns `first .. last - 1`, native until now, are in `store`."""
        segments = [*self._encoded[sequence].get(lane, []), Segment(store, first, last)]
        segments.sort(key=lambda s: s.first)
        merged: list[Segment] = []
        for segment in segments:
            if merged and merged[-1].last == segment.first and merged[-1].store == segment.store:
                merged[-1] = Segment(segment.store, merged[-1].first, segment.last)
            else:
                assert not merged or (merged[-1].last or 0) <= segment.first, "segments must not overlap"
                merged.append(segment)
        self._encoded[sequence][lane] = merged
        if store not in self.store_names:
            self.store_names.append(store)
        self._changed(sequence)

    def clear(self, sequence: int) -> None:
        """Make every lane of the sequence native."""
        if self._encoded[sequence]:
            self._encoded[sequence] = {}
            self._changed(sequence)

    def copy(self, source: int, target: int) -> None:
        """Give `target` the segments of `source`."""
        if self._encoded[source] or self._encoded[target]:
            self._encoded[target] = {lane: list(segments) for lane, segments in self._encoded[source].items()}
            self._changed(target)

    def _changed(self, sequence: int) -> None:
        self.version += 1
        self._arrays[sequence] = None

    def arrays(self) -> SegmentArrays:
        """Return the segments of all lanes as arrays, those of unchanged sequences from memory."""
        parts = []
        for sequence, lanes in enumerate(self._encoded):
            found = self._arrays[sequence] if lanes else self._none
            if found is None:
                found = self._arrays[sequence] = self._as_arrays(sequence)
            parts.append(found)
        counts, stores, lasts = (np.concatenate(column) for column in zip(*parts, strict=True))
        return SegmentArrays(np.concatenate(([0], np.cumsum(counts))).astype(np.int32), stores, lasts)

    def _as_arrays(self, sequence: int) -> tuple[Ints, Ints, Ints]:
        """Return segments of each lane, their stores and ends; open ends are left out."""
        closed = [self.of(sequence, lane)[:-1] for lane in range(self.num_lanes)]
        together = [segment for segments in closed for segment in segments]
        return (
            np.array([len(segments) for segments in closed], np.int32),
            np.array([self.store_names.index(segment.store) for segment in together], np.int32),
            np.array([segment.last for segment in together], np.int32),
        )

    def extra_bytes(self, sequence: int, spec: KVSpec) -> int:
        """Return what the encoded blocks of a sequence cost beyond native ones (negative: they cost less)."""
        total = 0
        for lane, segment in self.encoded(sequence):
            assert segment.last is not None
            saved = spec.lane_block_bytes(lane, segment.store) - spec.lane_block_bytes(lane)
            total += (segment.last - segment.first) * saved
        return total
