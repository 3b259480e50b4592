"""KeptSlots: the slots that are kept in the lanes of one sequence, and where they move. Torch-free."""

from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvloom.errors import InvalidInputError

Slots = NDArray[np.int64]
Ints = NDArray[np.int32]
Mask = NDArray[np.bool_]


class KeptSlots(Mapping[int, Slots]):
    """Slots that stay, of n lanes; as a mapping: lane -> its slots that stay, ascending.

    lanes      [n]     int64  ascending
    stays      [n, W]  bool   by slot; W is a number of whole blocks; False beyond what a lane holds
    counts     [n]     int32  slots that stay
    unchanged  [n]     int32  blocks at the start of each lane that lose nothing

    Survivors are packed to slots 0 .. counts - 1.
    """

    def __init__(self, lanes: NDArray[np.int64], stays: Mask, block_size: int) -> None:
        assert len(lanes) == len(stays) and stays.shape[1] % block_size == 0, "one row a lane, in whole blocks"
        self.lanes = lanes
        self.stays = stays
        self.block_size = block_size
        self.counts: Ints = np.count_nonzero(stays, axis=1).astype(np.int32)
        leading = np.where(self.counts == stays.shape[1], stays.shape[1], stays.argmin(1))
        self.unchanged: Ints = (leading // block_size).astype(np.int32)

    @classmethod
    def of(cls, keep: Mapping[int, Slots], begin: Ints, held: Ints, block_size: int) -> "KeptSlots":
        """Return the slots `keep` of lanes that hold `held` [R] slots from `begin` [R] on.

        Raises `InvalidInputError` for slots that are not ascending or not held.
        """
        lanes = np.array(sorted(keep), np.int64)
        longest = int((begin + held)[lanes].max(initial=1))
        stays = np.zeros((len(lanes), -(-longest // block_size) * block_size), np.bool_)
        for row, lane in enumerate(lanes.tolist()):
            slots, first, end = keep[lane], int(begin[lane]), int(begin[lane] + held[lane])
            if len(slots) and (slots[0] < first or slots[-1] >= end or (np.diff(slots) <= 0).any()):
                raise InvalidInputError(
                    f"lane {lane} holds slots {first}..{end - 1}; keep must be ascending slots among them"
                )
            stays[row, slots] = True
        return cls(lanes, stays, block_size)

    def __getitem__(self, lane: int) -> Slots:
        row = int(np.searchsorted(self.lanes, lane))
        if row == len(self.lanes) or self.lanes[row] != lane:
            raise KeyError(lane)
        return np.flatnonzero(self.stays[row])

    def __iter__(self) -> Iterator[int]:
        return iter(self.lanes.tolist())

    def __len__(self) -> int:
        return len(self.lanes)

    @property
    def width(self) -> int:
        """W, slots of a row."""
        return int(self.stays.shape[1])

    @cached_property
    def moves(self) -> tuple[Mask, Mask]:
        """Masks [n, W] of the slots that survivors behind the unchanged blocks are in, and of those that they go to.

        Both have as many in each lane, and survivors go in slot order.
        """
        return self.moves_from(self.unchanged * self.block_size, np.zeros_like(self.counts))

    def moves_from(self, first: Ints, written: Ints) -> tuple[Mask, Mask]:
        """Return `moves` of the slots from `first` [n] on, without the first `written` [n] survivors of each lane."""
        slot = np.arange(self.width, dtype=np.int32)
        source, target = self.stays & (slot >= first[:, None]), slot < self.counts[:, None]
        target &= slot >= np.maximum(first, written)[:, None]
        for row in np.flatnonzero(written > first).tolist():
            source[row] &= np.cumsum(self.stays[row]) > written[row]
        return source, target

    def pack(self, values: NDArray[np.generic]) -> None:
        """Move the survivors' `values` [n, W] to the front; what lies behind them is left as it is."""
        source, target = self.moves
        values[target] = values[source]
