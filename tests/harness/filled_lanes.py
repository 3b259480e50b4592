"""Lanes of one layer filled with random tokens over an arena full of garbage, for tests of kernels."""

from dataclasses import dataclass

import numpy as np
import torch

from kvloom.kernels import cpu
from kvloom.spec.store import GRANULE_BYTES, STORES


@dataclass
class FilledLanes:
    """A lane table of one layer whose lanes hold k, v [G, length, D] of each sequence, as the store keeps them."""

    lanes: cpu.Lanes
    shape: cpu.LayerShape
    arena: torch.Tensor
    table: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    rows: np.ndarray
    k: list[torch.Tensor]
    v: list[torch.Tensor]


def fill_lanes(
    store: str, heads: int, groups: int, width: int, lengths: list[int], block_size: int = 16, window: int = 0
) -> FilledLanes:
    """Return filled lanes; blocks lie shuffled in an arena that is NaN wherever nothing was written."""
    generator = torch.Generator().manual_seed(7)
    size = STORES.get(store).block_bytes(block_size, width, width)
    columns, offset, total = max(-(-n // block_size) for n in lengths) + 1, 2, groups + 3
    count = len(lengths) * groups * columns
    arena = torch.full((count * size,), 255, dtype=torch.uint8)
    order = np.random.default_rng(7).permutation(count) * (size // GRANULE_BYTES)
    table = np.full((len(lengths), total, columns), -1, np.int32)
    table[:, offset : offset + groups] = order.reshape(len(lengths), groups, columns)
    begin, end = np.zeros((len(lengths), total), np.int32), np.zeros((len(lengths), total), np.int32)
    end[:, offset : offset + groups] = np.array(lengths)[:, None]
    lanes = cpu.Lanes(arena, table, begin, end, block_size, store)
    shape = cpu.LayerShape(heads, groups, width, width, offset, window)
    rows = np.arange(len(lengths), dtype=np.int32)
    k, v = (torch.randn(sum(lengths), groups, width, generator=generator) for _ in range(2))
    cpu.append(lanes, shape, np.cumsum([0, *lengths], dtype=np.int32), rows, None, k, v)
    keys, values = [], []
    for b, n in enumerate(lengths):
        slots = np.arange(n)
        sides = [
            cpu.read_slots(
                arena, store, block_size, table[b, offset + g][slots // block_size], slots % block_size, (width, width),
                torch.float32,
            )
            for g in range(groups)
        ]  # fmt: skip
        keys.append(torch.stack([side[0] for side in sides]))
        values.append(torch.stack([side[1] for side in sides]))
    return FilledLanes(lanes, shape, arena, table, begin, end, rows, keys, values)
