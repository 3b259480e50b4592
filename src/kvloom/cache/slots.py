"""SlotValues: one number per slot of every lane, for the few sequences that need it. Torch-free."""

from typing import Generic, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kvloom.cache.keptslots import KeptSlots

Number = TypeVar("Number", np.int32, np.float32)


class SlotValues(Generic[Number]):
    """Arrays [R, capacity] by sequence (R lanes); they widen as lanes grow and are compacted with them."""

    def __init__(self, num_lanes: int, dtype: DTypeLike) -> None:
        self.num_lanes = num_lanes
        self.dtype = np.dtype(dtype)
        self._values: dict[int, NDArray[Number]] = {}

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._values

    def __getitem__(self, sequence: int) -> NDArray[Number]:
        return self._values[sequence]

    def start(self, sequence: int, everywhere: NDArray[Number]) -> None:
        """Begin to track a sequence with the values `everywhere` [capacity] in every lane."""
        self._values[sequence] = np.repeat(everywhere.astype(self.dtype)[None, :], self.num_lanes, axis=0)

    def append(self, sequence: int, end: NDArray[np.int32], new: NDArray[Number]) -> None:
        """Write `new` [n] into the slots that follow `end` [R] in every lane, if the sequence is tracked."""
        values = self._values.get(sequence)
        if values is None:
            return
        short = int(end.max()) + len(new) - values.shape[1]
        if short > 0:
            values = np.pad(values, ((0, 0), (0, max(short, values.shape[1]))))
            self._values[sequence] = values
        slots = end[:, None] + np.arange(len(new))
        values[np.arange(len(end))[:, None], slots] = new

    def pack(self, sequence: int, kept: KeptSlots) -> None:
        """Follow lanes that keep only some slots, packed to their front, if the sequence is tracked."""
        values = self._values.get(sequence)
        if values is None:
            return
        if values.shape[1] < kept.width:
            values = self._values[sequence] = np.pad(values, ((0, 0), (0, kept.width - values.shape[1])))
        own = values[kept.lanes, : kept.width]
        kept.pack(own)
        values[kept.lanes, : kept.width] = own

    def copy(self, source: int, target: int) -> None:
        """Give `target` its own copy of the values of `source`, if that is tracked."""
        if source in self._values:
            self._values[target] = self._values[source].copy()

    def drop(self, sequence: int) -> None:
        """Stop tracking a sequence."""
        self._values.pop(sequence, None)
