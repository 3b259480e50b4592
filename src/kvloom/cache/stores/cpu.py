"""CPUStore: the inner layout of blocks that the CPU kernels read fastest; `kernels.cpu.slots` draws it."""

import numpy as np
import torch
from numpy.typing import NDArray

from kvloom.cache.arena import Addresses
from kvloom.cache.stores.store import Store
from kvloom.kernels import cpu


class CPUStore(Store):
    """Any store that the CPU kernels know, by name; decodes to `dtype`. Same bytes a block as everywhere."""

    def write(self, addresses: Addresses, slots: NDArray[np.integer], k: torch.Tensor, v: torch.Tensor) -> None:
        """Encode token i into slot `slots[i]` of the block at `addresses[i]` (see `Store.write`)."""
        cpu.write_slots(
            self.memory.bytes, self.spec.name, self.block_size, addresses, slots, k.contiguous(), v.contiguous()
        )

    def read(self, addresses: Addresses, k_width: int, v_width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K [N, P, Dk] and V [N, P, Dv] of whole blocks (see `Store.read`)."""
        size, number = self.block_size, len(addresses)
        k, v = cpu.read_slots(
            self.memory.bytes,
            self.spec.name,
            size,
            np.repeat(addresses, size),
            np.tile(np.arange(size, dtype=np.int32), number),
            (k_width, v_width),
            self.dtype,
        )
        return k.view(number, size, k_width), v.view(number, size, v_width)

    def encode(self, native: Store, source: Addresses, target: Addresses, k_width: int, v_width: int) -> None:
        """Encode whole blocks by all threads of the kernels (see `Store.encode`)."""
        names = native.spec.name, self.spec.name
        cpu.encode_blocks(self.memory.bytes, *names, self.block_size, (k_width, v_width), source, target)

    def move(
        self,
        source: tuple[Addresses, NDArray[np.integer]],
        target: tuple[Addresses, NDArray[np.integer]],
        runs: NDArray[np.int64],
        k_width: int,
        v_width: int,
    ) -> None:
        """Copy tokens without decoding them (see `Store.move`)."""
        widths = (k_width, v_width)
        cpu.copy_slots(self.memory.bytes, self.spec.name, self.block_size, widths, source, target, runs)
