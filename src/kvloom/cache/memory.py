"""ArenaMemory: the bytes of an arena, and moves of blocks within them."""

import ctypes
import mmap

import numpy as np
import torch

from kvloom.cache.arena import Addresses, Move
from kvloom.errors import DoesNotFitError
from kvloom.spec.store import GRANULE_BYTES, SLAB_BYTES
from kvloom.units import format_bytes

MADV_POPULATE_WRITE = 23
"""Linux 5.14: commit pages as a first write would, without changing them."""


class ArenaMemory:
    """`num_bytes` of zeroed memory, aligned to slabs, on huge pages where the system has them.

    On the CPU pages are committed as they are first written or by `populate`, so an arena costs no more than its
    high-water mark and those.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.device = device
        try:
            if device.type == "cpu":
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                self._map = mmap.mmap(-1, num_bytes + SLAB_BYTES, flags=flags)
                if hasattr(mmap, "MADV_HUGEPAGE"):
                    self._map.madvise(mmap.MADV_HUGEPAGE)
                whole = torch.frombuffer(self._map, dtype=torch.uint8)
                offset = -whole.data_ptr() % SLAB_BYTES
                self.bytes = whole[offset : offset + num_bytes]
            else:
                self.bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        except (OSError, torch.cuda.OutOfMemoryError) as error:
            raise DoesNotFitError(
                f"the KV cache of {format_bytes(num_bytes)} cannot be had from {device}: {error}. "
                "Lower --kv-cache-memory-bytes"
            ) from error
        self._granules = self.bytes.view(-1, GRANULE_BYTES)

    def populate(self, num_bytes: int) -> None:
        """Make the system commit the first `num_bytes` of pages now; contents stay.

        So the first prompt need not wait: a huge page takes up to 4 ms where the host of a virtual machine must provide
        it. Where the system cannot do it, pages are committed when they are written.
        """
        if self.device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE"):
            start, length = ctypes.c_void_p(self.bytes.data_ptr()), ctypes.c_size_t(min(num_bytes, self.bytes.numel()))
            ctypes.CDLL(None).madvise(start, length, MADV_POPULATE_WRITE)  # mmap's own holds the interpreter lock

    def elements(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the whole memory as one flat tensor of `dtype`; writes go through."""
        return self.bytes.view(dtype)

    def rows(self, addresses: Addresses, block_bytes: int) -> torch.Tensor:
        """Return granule numbers [N, granules a block] of the blocks at `addresses` [N]."""
        start = torch.from_numpy(np.ascontiguousarray(addresses, dtype=np.int64)).to(self.device)
        return start[:, None] + torch.arange(block_bytes // GRANULE_BYTES, device=self.device)

    def load(self, addresses: Addresses, block_bytes: int) -> torch.Tensor:
        """Return a copy [N, block_bytes] uint8 of the blocks at `addresses`."""
        return self._granules[self.rows(addresses, block_bytes)].view(len(addresses), block_bytes)

    def save(self, addresses: Addresses, content: torch.Tensor) -> None:
        """Write `content` [N, block_bytes] uint8 to the blocks at `addresses`."""
        rows = self.rows(addresses, content.shape[1])
        self._granules[rows] = content.view(len(addresses), -1, GRANULE_BYTES)

    def copy(self, move: Move) -> None:
        """Copy the bytes of `move`, a slab's worth at a time; sources and targets are distinct blocks."""
        step = max(1, SLAB_BYTES // move.block_bytes)
        for start in range(0, len(move.source), step):
            chunk = slice(start, start + step)
            self.save(move.target[chunk], self.load(move.source[chunk], move.block_bytes))
