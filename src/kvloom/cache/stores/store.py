"""Store: the layout of K and V of one lane's tokens inside a block. Only stores make views of the arena."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray

from kvloom.cache.arena import Addresses
from kvloom.cache.memory import ArenaMemory
from kvloom.spec.store import STORES, StoreSpec


class Store(ABC):
    """Encodes tokens into blocks and decodes blocks; `spec` gives the bytes."""

    def __init__(self, name: str, dtype: torch.dtype, memory: ArenaMemory, block_size: int) -> None:
        """Store by the format called `name`; `dtype` is what `read` returns."""
        self.spec: StoreSpec = STORES.get(name)
        self.dtype = dtype
        self.memory = memory
        self.block_size = block_size

    @abstractmethod
    def write(self, addresses: Addresses, slots: NDArray[np.integer], k: torch.Tensor, v: torch.Tensor) -> None:
        """Put token i, k[i] [N, Dk] and v[i] [N, Dv], into slot `slots[i]` (0..P-1) of the block at `addresses[i]`."""

    @abstractmethod
    def read(self, addresses: Addresses, k_width: int, v_width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K [N, P, Dk] and V [N, P, Dv] of the blocks at `addresses` [N], in the store's compute dtype."""

    def move(
        self,
        source: tuple[Addresses, NDArray[np.integer]],
        target: tuple[Addresses, NDArray[np.integer]],
        runs: NDArray[np.int64],
        k_width: int,
        v_width: int,
    ) -> None:
        """Copy tokens as they are encoded from `source` to `target`, each (addresses [N], slots [N]).

        Run r is moves `runs[r] .. runs[r + 1] - 1`: a lane that is packed to its front, in order, with no target behind
        its source. Different runs touch different slots.
        """
        blocks, inverse = np.unique(source[0], return_inverse=True)
        k, v = self.read(blocks, k_width, v_width)
        at, slot = torch.from_numpy(inverse), torch.from_numpy(source[1])
        self.write(*target, k[at, slot], v[at, slot])

    def encode(self, native: "Store", source: Addresses, target: Addresses, k_width: int, v_width: int) -> None:
        """Encode the whole blocks at `source` [N], which `native` holds, into others at `target` [N]."""
        k, v = native.read(source, k_width, v_width)
        slots = np.tile(np.arange(self.block_size, dtype=np.int64), len(source))
        self.write(np.repeat(target, self.block_size), slots, k.flatten(0, 1), v.flatten(0, 1))

    def block_bytes(self, k_width: int, v_width: int) -> int:
        """Return the bytes of one block."""
        return self.spec.block_bytes(self.block_size, k_width, v_width)

    def unsupported(self, k_width: int, v_width: int) -> list[str]:
        """Return every reason why lanes of these widths cannot be held; [] means that they can."""
        return []
