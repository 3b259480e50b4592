"""SegmentList: which store encodes which blocks of a lane. Torch-free.

    lane   | 16-bit sinks | int4 ...... | int8 ... | native, open ...

A lane is native from end to end until some of its full blocks are encoded. Segments are listed in column order; the
last one is always native and open, so that tokens are appended in the model's own precision.
"""

from dataclasses import dataclass

from kvloom.spec.kv import KVSpec

NATIVE = ""
"""Store name of a segment in the model's own dtype."""


@dataclass(frozen=True)
class Segment:
    """Blocks in columns `first .. last - 1` of a lane, all in `store`; `last` is None for the open end."""

    store: str
    first: int
    last: int | None


class SegmentList:
    """The segments of every lane of every sequence; empty for lanes that are native throughout."""

    def __init__(self, max_sequences: int, num_lanes: int) -> None:
        self._encoded: list[dict[int, list[Segment]]] = [{} for _ in range(max_sequences)]
        self.num_lanes = num_lanes

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

    def native_from(self, sequence: int) -> int:
        """Return the first column from which on all lanes are native."""
        ends = [s.last or 0 for segments in self._encoded[sequence].values() for s in segments]
        return max(ends, default=0)

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

    def clear(self, sequence: int) -> None:
        """Make every lane of the sequence native."""
        self._encoded[sequence] = {}

    def copy(self, source: int, target: int) -> None:
        """Give `target` the segments of `source`."""
        self._encoded[target] = {lane: list(segments) for lane, segments in self._encoded[source].items()}

    def extra_bytes(self, sequence: int, spec: KVSpec) -> int:
        """Return what the encoded blocks of a sequence cost beyond native ones (negative: they cost less)."""
        total = 0
        for lane, segments in self._encoded[sequence].items():
            layer = spec.lane_layer[lane]
            native = spec.layer_block_bytes(layer)
            for segment in segments:
                assert segment.last is not None
                total += (segment.last - segment.first) * (spec.layer_block_bytes(layer, segment.store) - native)
        return total
