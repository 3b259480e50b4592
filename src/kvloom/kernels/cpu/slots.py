"""Slots of blocks: write, read back, move; and whole blocks: encode. No other module depends on the inner layout.

A block of P slots holds K as [Dk / e][P][e] and V as [P / e][Dv][e], with e = 2 in bf16, 4 in int8 and 1 in float32
and float16; int8 codes are followed by float32 scales, K [P] then V [P]. So keys are the right-hand side of a
product over the width, and values that of a product over the slots, without rearranging.
"""

import numpy as np
import torch
from numpy.typing import NDArray

import kvloom.kernels.cpu._ext as _ext
from kvloom.kernels.cpu.elements import STORE_ELEMENT, contiguous, element_of
from kvloom.kernels.cpu.threads import follow_torch


def _int32(x: NDArray[np.integer]) -> NDArray[np.int32]:
    return np.ascontiguousarray(x, dtype=np.int32)


def write_slots(
    arena: torch.Tensor,
    store: str,
    block_size: int,
    addresses: NDArray[np.integer],
    within: NDArray[np.integer],
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """Encode k [N, Dk] and v [N, Dv] into slots `within` [N] of the blocks at `addresses` [N]; mutates the arena."""
    contiguous(k, "k")
    contiguous(v, "v", k.dtype)
    follow_torch()
    _ext.write_slots(
        arena.data_ptr(), STORE_ELEMENT.get(store), block_size, k.shape[1], v.shape[1], _int32(addresses),
        _int32(within), element_of(k, "k"), k.data_ptr(), v.data_ptr(),
    )  # fmt: skip


def read_slots(
    arena: torch.Tensor,
    store: str,
    block_size: int,
    addresses: NDArray[np.integer],
    within: NDArray[np.integer],
    widths: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K [N, Dk] and V [N, Dv] in `dtype`, decoded from the slots; `widths` are (Dk, Dv)."""
    k, v = (torch.empty(len(addresses), width, dtype=dtype) for width in widths)
    follow_torch()
    _ext.read_slots(
        arena.data_ptr(), STORE_ELEMENT.get(store), block_size, *widths, _int32(addresses), _int32(within),
        element_of(k, "k"), k.data_ptr(), v.data_ptr(),
    )  # fmt: skip
    return k, v


def copy_slots(
    arena: torch.Tensor,
    store: str,
    block_size: int,
    widths: tuple[int, int],
    source: tuple[NDArray[np.integer], NDArray[np.integer]],
    target: tuple[NDArray[np.integer], NDArray[np.integer]],
    runs: NDArray[np.integer],
) -> None:
    """Move encoded slots from `source` to `target`, each (addresses [N], within [N]); mutates the arena.

    Run r is moves runs[r] .. runs[r + 1] - 1, done in order: a lane may be compacted onto itself, front to back.
    Different runs must not touch the same slots.
    """
    follow_torch()
    _ext.copy_slots(
        arena.data_ptr(), STORE_ELEMENT.get(store), block_size, *widths, _int32(source[0]), _int32(source[1]),
        _int32(target[0]), _int32(target[1]), _int32(runs),
    )  # fmt: skip


def encode_blocks(
    arena: torch.Tensor,
    store: str,
    to_store: str,
    block_size: int,
    widths: tuple[int, int],
    source: NDArray[np.integer],
    target: NDArray[np.integer],
) -> None:
    """Encode the blocks at `source` [N], which are in the native `store`, into those at `target` [N] in `to_store`.

    Gives the bits that `write_slots` gives of each slot. Mutates the arena; no block may be in both.
    """
    assert len(source) == len(target), "each block is encoded into one"
    follow_torch()
    _ext.encode_blocks(
        arena.data_ptr(), STORE_ELEMENT.get(store), STORE_ELEMENT.get(to_store), block_size, *widths,
        _int32(source), _int32(target),
    )  # fmt: skip
