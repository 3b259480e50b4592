"""NativeStore: K and V exactly as the model computes them.

    block   | K [P, Dk] | V [P, Dv] |   row-major, in the model's dtype
"""

import numpy as np
import torch
from numpy.typing import NDArray

from kvloom.cache.arena import Addresses
from kvloom.cache.memory import ArenaMemory
from kvloom.cache.stores.store import Store
from kvloom.spec.store import GRANULE_BYTES, NATIVE_STORE


class NativeStore(Store):
    """Lossless storage in bfloat16, float16 or float32."""

    def __init__(self, dtype: torch.dtype, memory: ArenaMemory, block_size: int) -> None:
        super().__init__(NATIVE_STORE[str(dtype).removeprefix("torch.")], dtype, memory, block_size)
        self._elements = memory.elements(dtype)
        self._scale = GRANULE_BYTES // dtype.itemsize

    def write(self, addresses: Addresses, slots: NDArray[np.integer], k: torch.Tensor, v: torch.Tensor) -> None:
        """Put token i into slot `slots[i]` of the block at `addresses[i]` (see `Store.write`)."""
        base = addresses.astype(np.int64) * self._scale
        k_width, v_width = k.shape[1], v.shape[1]
        for tensor, width, start in (
            (k, k_width, base + slots * k_width),
            (v, v_width, base + self.block_size * k_width + slots * v_width),
        ):
            if width:
                at = torch.from_numpy(start).to(tensor.device)[:, None] + torch.arange(width, device=tensor.device)
                self._elements[at] = tensor

    def read(self, addresses: Addresses, k_width: int, v_width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies K [N, P, Dk] and V [N, P, Dv] of whole blocks."""
        content = self.memory.load(addresses, self.block_bytes(k_width, v_width)).view(self.dtype)
        number, size = len(addresses), self.block_size
        k = content[:, : size * k_width].reshape(number, size, k_width)
        v = content[:, size * k_width : size * (k_width + v_width)].reshape(number, size, v_width)
        return k, v
