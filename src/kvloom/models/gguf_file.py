"""GGUFFile: the tensors of a GGUF file, decoded in pieces when they are read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from kvloom.errors import CheckpointError
from kvloom.spec.gguf_header import GGUFHeader, GGUFTensor

if TYPE_CHECKING:
    import torch

    from kvloom.models.mxfp4 import Mxfp4Weight

QUANT_TYPES = frozenset(
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "MXFP4")
    if name in GGMLQuantizationType.__members__  # older versions of the package know no MXFP4
)
"""Tensor types that can be read."""

_CHUNK_ELEMENTS = 1 << 18
"""Elements that are read and decoded at once: few enough for intermediate values to fit the caches."""


class GGUFFile:
    """A GGUF file as a `TensorFile` with its `header` (`GGUFHeader` says what is refused).

    Bytes of tensors are read in pieces by `read`, so that no part of the file stays in memory beside the weights. Only
    one thread at a time may read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = GGUFHeader(path)
        self._file = self.header.file

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata by key: numbers, strings, lists or arrays."""
        return self.header.metadata

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, the slowest dimension first."""
        return self.header.shapes

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Tensors of types outside `QUANT_TYPES`, with the name of the type."""
        known = {quant_type.name for quant_type in QUANT_TYPES}
        return {name: tensor.type_name for name, tensor in self.header.tensors.items() if tensor.type_name not in known}

    def read_array(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the decoded values as a fresh float32 array of the tensor's shape."""
        tensor = self.header.tensors[name]
        out = np.empty(math.prod(tensor.shape), np.float32)
        for start, values in self._decoded(tensor):
            out[start : start + values.size] = values
        return out.reshape(tensor.shape)

    def read(self, name: str, dtype: torch.dtype, *, borrowed: bool = False) -> torch.Tensor:
        """Return the decoded values as a fresh tensor of `dtype`; a few MiB more than it are in use meanwhile."""
        import torch

        tensor = self.header.tensors[name]
        out = torch.empty(math.prod(tensor.shape), dtype=dtype)
        for start, values in self._decoded(tensor):
            out[start : start + values.size] = torch.from_numpy(values)
        return out.view(tensor.shape)

    def stored(self, name: str) -> Mxfp4Weight | None:
        """Return a tensor [..., out, in] that is stored in MXFP4 as it is; None if it is not.

        A block here is a byte of exponent and 16 of codes, whose low halves hold the first 16 values.
        """
        from kvloom.models.mxfp4 import Mxfp4Weight

        tensor = self.header.tensors[name]
        if tensor.type_name != "MXFP4":
            return None
        import torch

        raw = np.empty(tensor.num_bytes, np.uint8)
        self._file.seek(tensor.offset)
        self._fill(raw)
        blocks = raw.reshape(*tensor.shape[:-1], tensor.shape[-1] // 32, 17)
        codes = np.empty((*blocks.shape[:-1], 16), np.uint8)
        codes[..., :8] = (blocks[..., 1::2] & 15) | (blocks[..., 2::2] & 15) << 4
        codes[..., 8:] = blocks[..., 1::2] >> 4 | (blocks[..., 2::2] & 0xF0)
        return Mxfp4Weight(torch.from_numpy(codes), torch.from_numpy(blocks[..., 0].copy()))

    def _decoded(self, tensor: GGUFTensor) -> Iterator[tuple[int, np.ndarray[Any, np.dtype[np.float32]]]]:
        """Yield (first element, float32 values) in pieces, each valid until the next. Blocks may span rows."""
        quant_type = GGMLQuantizationType[tensor.type_name]
        block, block_bytes = GGML_QUANT_SIZES[quant_type]
        num_blocks = tensor.num_bytes // block_bytes
        step = max(1, _CHUNK_ELEMENTS // block)
        raw = np.empty(min(step, num_blocks) * block_bytes, np.uint8)
        self._file.seek(tensor.offset)
        for first in range(0, num_blocks, step):
            piece = raw[: min(step, num_blocks - first) * block_bytes]
            self._fill(piece)
            with np.errstate(all="ignore"):
                values = dequantize(piece.reshape(1, -1), quant_type)
            yield first * block, np.asarray(values, np.float32).reshape(-1)

    def _fill(self, piece: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Read the file's next bytes into `piece`; raises `CheckpointError` where it has become shorter."""
        rest = piece.data
        while rest:
            count = self._file.readinto(rest)
            if not count:
                raise CheckpointError(f"{self.path} was cut off while it was read; fetch it again")
            rest = rest[count:]
