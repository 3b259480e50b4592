"""Mxfp4Tensors: tensors that a safetensors folder holds in MXFP4, presented as floating-point tensors.

The format is that of the OCP Microscaling specification 1.0: codes of four bits (one of sign, two of exponent, one of
mantissa), two in a byte, the first in the low half; 32 of them share a scale, which is a power of two with a bias of
127. A tensor X lies in two parts, `X_blocks` [E, R, n / 32, 16] and `X_scales` [E, R, n / 32], both of bytes, and its
shape is [E, n, R]: rows are stored where columns are meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvloom.errors import CheckpointError
from kvloom.models.tensor_file import TensorFile

if TYPE_CHECKING:
    import torch

BLOCKS, SCALES = "_blocks", "_scales"
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127
_BYTES, _VALUES = 16, 32
"""Bytes and values of a block."""


@dataclass(frozen=True)
class Mxfp4Weight:
    """Weights in MXFP4, one row for each output: codes [..., out, in / 32, 16] and exponents [..., out, in / 32].

    Both are uint8; the exponents have a bias of 127.
    """

    codes: torch.Tensor
    exponents: torch.Tensor

    def __getitem__(self, index: int) -> Mxfp4Weight:
        """Return one matrix of several."""
        return Mxfp4Weight(self.codes[index], self.exponents[index])

    def rows(self, first: int, apart: int) -> Mxfp4Weight:
        """Return the outputs from `first` on that are `apart`, in memory of their own where they are not all."""
        codes, exponents = self.codes[..., first::apart, :, :], self.exponents[..., first::apart, :]
        return Mxfp4Weight(codes.contiguous(), exponents.contiguous())


class Mxfp4Tensors:
    """A `TensorFile` over `file` where every pair of blocks and scales is one tensor of floating-point numbers.

    Raises `CheckpointError` for a part without its other part, and for parts whose shapes or types do not match.
    """

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        stored = file.shapes
        packed = [name.removesuffix(BLOCKS) for name in stored if name.endswith(BLOCKS)]
        scaled = [name.removesuffix(SCALES) for name in stored if name.endswith(SCALES)]
        self._shapes = {name: shape for name, shape in stored.items() if not name.endswith((BLOCKS, SCALES))}
        faults = [f"{name} has only one of {BLOCKS} and {SCALES}" for name in sorted({*packed} ^ {*scaled})]
        for name in sorted({*packed} & {*scaled}):
            blocks, scales = stored[name + BLOCKS], stored[name + SCALES]
            kinds = {file.unreadable.get(name + part) for part in (BLOCKS, SCALES)}
            if len(blocks) != 4 or blocks[:3] != scales or blocks[3] != _BYTES or kinds != {"U8"}:
                faults.append(f"{name} has blocks {list(blocks)} and scales {list(scales)} of {kinds}")
            else:
                self._shapes[name] = (blocks[0], blocks[2] * _VALUES, blocks[1])
        if faults:
            raise CheckpointError(f"the weights in MXFP4 do not go together: {'; '.join(faults)}; fetch them again")
        self._packed = frozenset(packed)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, those in MXFP4 as [experts, in, out]."""
        return self._shapes

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Tensors of other types that are not supported."""
        return {name: kind for name, kind in self._file.unreadable.items() if name in self._shapes}

    def stored(self, name: str) -> Mxfp4Weight | None:
        """Return a tensor as it is stored, perhaps in the mapped file; None if that is not MXFP4."""
        if name not in self._packed:
            return None
        import torch

        codes = self._file.read(name + BLOCKS, torch.uint8, borrowed=True)
        return Mxfp4Weight(codes, self._file.read(name + SCALES, torch.uint8, borrowed=True))

    def read(self, name: str, dtype: torch.dtype, *, borrowed: bool = False) -> torch.Tensor:
        """Return a tensor of `dtype`, fresh if it was in MXFP4 (see `TensorFile`).

        While it is decoded, the codes and one expert in float32 lie beside it.
        """
        if name not in self._packed:
            return self._file.read(name, dtype, borrowed=borrowed)
        import torch

        blocks = self._file.read(name + BLOCKS, torch.uint8, borrowed=True)
        scales = self._file.read(name + SCALES, torch.uint8, borrowed=True)
        values = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)])
        experts, rows, groups, _ = blocks.shape
        out = torch.empty(experts, rows, groups * _VALUES, dtype=dtype)
        for expert in range(experts):
            codes = torch.stack((blocks[expert] & 15, blocks[expert] >> 4), dim=-1)  # [R, n / 32, 16, 2]
            exponents = scales[expert].int()[..., None] - _BIAS
            decoded = torch.ldexp(values[codes.flatten(2).int()], exponents)
            out[expert] = decoded.flatten(1)
        return out.transpose(1, 2)
