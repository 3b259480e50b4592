"""RowStore: tokens row by row, each side by its own codec.

    block   | K codes [P, Dk] | V codes [P, Dv] | K scales [P] | V scales [P] |   float32 scales, where a side has them
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kvloom.cache.arena import Addresses
from kvloom.cache.memory import ArenaMemory
from kvloom.cache.stores.codec import Codec, codec_of
from kvloom.cache.stores.store import Store
from kvloom.spec.store import GRANULE_BYTES

SCALE_BYTES = 4


class _Place(NamedTuple):
    """Where one side lies in a block: bytes from its start to codes and scales, bytes of a token's codes, elements."""

    codec: Codec
    codes: int
    scales: int
    row: int
    width: int


class RowStore(Store):
    """Any runtime store in row-major blocks, for torch."""

    def __init__(self, name: str, dtype: torch.dtype, memory: ArenaMemory, block_size: int) -> None:
        super().__init__(name, dtype, memory, block_size)
        self._codecs = codec_of(self.spec.k, dtype), codec_of(self.spec.v, dtype)
        self._views = {d: memory.elements(d) for d in (torch.float32, *(codec.dtype for codec in self._codecs))}

    def _places(self, *widths: int) -> list[_Place]:
        """Return where K and V lie in a block of these widths."""
        rows = [codec.dtype.itemsize * width for codec, width in zip(self._codecs, widths, strict=True)]
        codes, scales = [0, self.block_size * rows[0]], []
        end = self.block_size * sum(rows)
        for codec, width in zip(self._codecs, widths, strict=True):
            scales.append(end)
            end += self.block_size * SCALE_BYTES if codec.scaled and width else 0
        return [_Place(*place) for place in zip(self._codecs, codes, scales, rows, widths, strict=True)]

    def write(self, addresses: Addresses, slots: NDArray[np.integer], k: torch.Tensor, v: torch.Tensor) -> None:
        """Encode token i into slot `slots[i]` of the block at `addresses[i]` (see `Store.write`)."""
        base = addresses.astype(np.int64) * GRANULE_BYTES
        for place, tensor in zip(self._places(k.shape[1], v.shape[1]), (k, v), strict=True):
            if not place.width:
                continue
            codes, scales = place.codec.encode(tensor)
            first = torch.from_numpy((base + place.codes + slots * place.row) // codes.itemsize).to(codes.device)
            self._views[codes.dtype][first[:, None] + torch.arange(place.width, device=codes.device)] = codes
            if scales is not None:
                at = torch.from_numpy((base + place.scales) // SCALE_BYTES + slots).to(codes.device)
                self._views[torch.float32][at] = scales

    def read(self, addresses: Addresses, k_width: int, v_width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K [N, P, Dk] and V [N, P, Dv] of whole blocks (see `Store.read`)."""
        number, size = len(addresses), self.block_size
        content = self.memory.load(addresses, self.block_bytes(k_width, v_width))
        sides = []
        for place in self._places(k_width, v_width):
            codes = content[:, place.codes : place.codes + size * place.row].contiguous().view(place.codec.dtype)
            scales = None
            if place.codec.scaled and place.width:
                end = place.scales + size * SCALE_BYTES
                scales = content[:, place.scales : end].contiguous().view(torch.float32)
            codes = codes.reshape(number, size, place.width)
            sides.append(place.codec.decode(codes, scales).to(self.dtype) if place.width else codes.to(self.dtype))
        return sides[0], sides[1]

    def unsupported(self, k_width: int, v_width: int) -> list[str]:
        """Refuse widths whose scales would not be aligned (see `Store.unsupported`)."""
        if all(place.scales % SCALE_BYTES == 0 for place in self._places(k_width, v_width) if place.codec.scaled):
            return []
        codes = f"{self.block_size} x ({k_width} + {v_width})"
        return [f"{self.spec.name} scales follow the codes at multiples of 4 bytes; {codes} bytes of codes are none"]
