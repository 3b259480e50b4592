"""Int8Store: symmetric 8-bit codes with one scale per token for K and one for V.

    block   | K codes [P, Dk] | V codes [P, Dv] | K scales [P] | V scales [P] |   int8, int8, float32, float32

scale = amax / 127, code = round(x / scale); an all-zero vector has scale 0 and decodes to zeros. Every token is encoded
by itself, so blocks may be filled in any order and survivors of an eviction keep their codes.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from kvloom.cache.arena import Addresses
from kvloom.cache.memory import ArenaMemory
from kvloom.cache.stores.store import Store
from kvloom.spec.store import GRANULE_BYTES


class Int8Store(Store):
    """Per-token symmetric int8; decodes to `dtype`."""

    def __init__(self, dtype: torch.dtype, memory: ArenaMemory, block_size: int) -> None:
        super().__init__("int8", dtype, memory, block_size)
        self._codes = memory.elements(torch.int8)
        self._scales = memory.elements(torch.float32)

    def write(self, addresses: Addresses, slots: NDArray[np.integer], k: torch.Tensor, v: torch.Tensor) -> None:
        """Encode token i into slot `slots[i]` of the block at `addresses[i]` (see `Store.write`)."""
        size, k_width, v_width = self.block_size, k.shape[1], v.shape[1]
        base = addresses.astype(np.int64) * GRANULE_BYTES
        scales = base // 4 + size * (k_width + v_width) // 4
        v_scale_offset = size if k_width else 0
        for tensor, width, code_at, scale_at in (
            (k, k_width, base + slots * k_width, scales + slots),
            (v, v_width, base + size * k_width + slots * v_width, scales + v_scale_offset + slots),
        ):
            if not width:
                continue
            codes, scale = quantize_int8(tensor)
            at = torch.from_numpy(code_at).to(tensor.device)[:, None] + torch.arange(width, device=tensor.device)
            self._codes[at] = codes
            self._scales[torch.from_numpy(scale_at).to(tensor.device)] = scale

    def read(self, addresses: Addresses, k_width: int, v_width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return decoded K [N, P, Dk] and V [N, P, Dv]."""
        number, size = len(addresses), self.block_size
        content = self.memory.load(addresses, self.block_bytes(k_width, v_width))
        codes = content.view(torch.int8)
        first = size * (k_width + v_width)
        sides = (k_width > 0) + (v_width > 0)
        scales = content[:, first : first + 4 * size * sides].contiguous().view(torch.float32)
        k = codes[:, : size * k_width].reshape(number, size, k_width).float() * scales[:, :size, None]
        v = codes[:, size * k_width : first].reshape(number, size, v_width).float() * scales[:, -size:, None]
        return k.to(self.dtype), v.to(self.dtype)

    def unsupported(self, k_width: int, v_width: int) -> list[str]:
        """Refuse widths whose scales would not be aligned (see `Store.unsupported`)."""
        if self.block_size * (k_width + v_width) % 4 == 0:
            return []
        codes = f"{self.block_size} x ({k_width} + {v_width})"
        return [f"int8 scales follow the codes at multiples of 4 bytes; {codes} bytes of codes are none"]


def quantize_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes [N, D] and float32 scales [N] of the rows of x [N, D]."""
    values = x.float()
    scale = values.abs().amax(dim=1) / 127.0
    codes = torch.round(values / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None])
    return codes.clamp_(-127, 127).to(torch.int8), scale
