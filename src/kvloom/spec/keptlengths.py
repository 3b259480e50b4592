"""KeptLengths: how many tokens the lanes of a group hold, and what that comes to in bytes. Torch-free."""

from dataclasses import dataclass

from kvloom.spec.bounds import Bounds
from kvloom.spec.kv import KVSpec, LaneGroup
from kvloom.spec.lanestore import LaneStore


@dataclass(frozen=True)
class KeptLengths:
    """Tokens that the lanes of a group hold: from `low` to `high` per layer where lengths are known, else totals."""

    low: tuple[int, ...]
    high: tuple[int, ...]
    low_total: int
    high_total: int
    least: int
    most: int

    def plus(self, tokens: int, limit: int, lanes: int) -> "KeptLengths":
        """Return the lengths when up to `tokens` more are held on top in `lanes` lanes, none above `limit`."""
        return KeptLengths(self.low, tuple(min(limit, n + tokens) for n in self.high), self.low_total,
                     self.high_total + lanes * tokens, self.least, min(limit, self.most + tokens))

    def bounds(self, kv: KVSpec, group: LaneGroup, store: LaneStore) -> Bounds:
        """Return bounds of the bytes of the group, over all lengths from `low` to `high`."""
        if not self.high:
            return self._ragged(group, store)
        low = high = 0
        for a, b, layer in zip(self.low, self.high, group.layers, strict=True):
            lanes = kv.layers[layer].num_lanes
            low += lanes * store.fewest(a, b)
            high += lanes * store.most(a, b)
        return Bounds(low, high)

    def highest(self, kv: KVSpec, group: LaneGroup, store: LaneStore) -> Bounds:
        """Return the most bytes of the group while its lanes grow to their lengths."""
        if not self.high:
            found = self._ragged(group, store)
            return Bounds(found.low, found.high + len(group.lanes) * (store.encoded_bytes or 0))
        most = 0
        for b, layer in zip(self.high, group.layers, strict=True):
            most += kv.layers[layer].num_lanes * store.peak(0, b)
        return Bounds(self.bounds(kv, group, store).low, most)

    def turning(self, kv: KVSpec, group: LaneGroup, store: LaneStore) -> Bounds:
        """Return the most bytes that the group has while a prompt of which it keeps this is encoded."""
        if not self.high:
            lanes = len(group.lanes)
            native = LaneStore(store.block_size, store.native_bytes, None)
            found = native.ragged_bytes(lanes, self.high_total, self.least, self.most)
            extra = store.turning_bytes(self.most) - native.lane_bytes(self.most)
            return Bounds(found.low, found.high + lanes * extra)
        lanes_of = [kv.layers[layer].num_lanes for layer in group.layers]
        low, high = (sum(map(int.__mul__, lanes_of, map(store.turning_bytes, part))) for part in (self.low, self.high))
        return Bounds(low, high)

    def _ragged(self, group: LaneGroup, store: LaneStore) -> Bounds:
        lanes = len(group.lanes)
        low = store.ragged_bytes(lanes, self.low_total, self.least, self.most).low
        return Bounds(low, store.ragged_bytes(lanes, self.high_total, self.least, self.most).high)
