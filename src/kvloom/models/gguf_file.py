"""GGUFFile: metadata and tensors of a GGUF file, mapped into memory and checked before anything is believed."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from kvloom.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    import torch

QUANT_TYPES = frozenset(
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "MXFP4")
    if name in GGMLQuantizationType.__members__  # older versions of the package know no MXFP4
)
"""Tensor types that can be read."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_MAX_ARRAY_DEPTH = 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8",
            12: "<f8"}  # fmt: skip
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies in the file: `shape` with the slowest dimension first, extent in bytes."""

    shape: tuple[int, ...]
    type_name: str
    offset: int
    num_bytes: int


class _Cursor:
    """Reads the header; running over the end of the file is a `CheckpointError`."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, num_bytes: int) -> int:
        start = self.at
        if num_bytes > len(self.data) - start:
            raise CheckpointError(
                f"{self.path} is truncated or damaged: its header goes on past the end of the file, at byte "
                f"{len(self.data)}. Delete it and fetch it again"
            )
        self.at += num_bytes
        return start

    def integer(self, form: str) -> int:
        value: int = struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0]
        return value

    def string(self) -> str:
        length = self.integer("<Q")
        start = self.take(length)
        return self.data[start : start + length].decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.integer("<I"), self.integer("<Q")
            if item in _SCALARS:
                dtype = np.dtype(_SCALARS[item])
                start = self.take(count * dtype.itemsize)
                return np.frombuffer(self.data, dtype, count, start)
            if depth == _MAX_ARRAY_DEPTH:
                raise CheckpointError(f"{self.path} is damaged: arrays nested deeper than {_MAX_ARRAY_DEPTH}")
            return [self.value(item, depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path} is damaged: metadata of unknown type {kind} at byte {self.at}")
        dtype = np.dtype(_SCALARS[kind])
        number = np.frombuffer(self.data, dtype, 1, self.take(dtype.itemsize))[0].item()
        return bool(number) if kind == _BOOL else number


class GGUFFile:
    """A GGUF file, version 2 or 3, little endian. `metadata` maps keys to numbers, strings, lists or arrays.

    Raises `CheckpointError` when the file is not GGUF, is truncated or contradicts itself, and `UnsupportedError`
    for one part of a split file. Bytes of tensors are mapped, not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = self._map(path)
        cursor = _Cursor(self._data, path)
        version = self._version(cursor)
        num_tensors, num_entries = cursor.integer("<Q"), cursor.integer("<Q")
        self.metadata: dict[str, Any] = {"GGUF.version": version}
        for _ in range(num_entries):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.integer("<I"))
        if self.metadata.get("split.count", 1) > 1:
            raise UnsupportedError(str(path), ["it is one part of a split GGUF file; merge the parts into one file"])
        self._tensors = self._read_tensors(cursor, num_tensors)

    @staticmethod
    def _map(path: Path) -> mmap.mmap:
        try:
            with path.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as a GGUF file: {error}") from error

    def _version(self, cursor: _Cursor) -> int:
        if self._data[:4] != _MAGIC:
            raise CheckpointError(f"{self.path} is not a GGUF file: it starts with {self._data[:4]!r}, not {_MAGIC!r}")
        cursor.take(4)
        version = cursor.integer("<I")
        if version not in _VERSIONS:
            raise CheckpointError(
                f"{self.path} is GGUF version {version}; versions {_VERSIONS[0]} and {_VERSIONS[1]} (little endian) "
                "can be read. Convert the model again"
            )
        return version

    def _read_tensors(self, cursor: _Cursor, num_tensors: int) -> dict[str, GGUFTensor]:
        found: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(num_tensors):
            name, num_dims = cursor.string(), cursor.integer("<I")
            if not 1 <= num_dims <= _MAX_DIMS:
                raise CheckpointError(f"{self.path} is damaged: tensor {name!r} has {num_dims} dimensions")
            dims = tuple(cursor.integer("<Q") for _ in range(num_dims))
            if 0 in dims:
                raise CheckpointError(f"{self.path} is damaged: tensor {name!r} is empty")
            found.append((name, dims[::-1], cursor.integer("<I"), cursor.integer("<Q")))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(f"{self.path} is damaged: its alignment is {alignment!r}, not a power of two")
        base = -(-cursor.at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in found:
            if name in tensors:
                raise CheckpointError(f"{self.path} is damaged: tensor {name!r} appears twice")
            tensors[name] = self._extent(name, shape, kind, base + offset)
        return tensors

    def _extent(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
        try:
            quant_type = GGMLQuantizationType(kind)
        except ValueError:
            return GGUFTensor(shape, f"type {kind}", offset, 0)
        block, block_bytes = GGML_QUANT_SIZES[quant_type]
        if shape[-1] % block:
            raise CheckpointError(
                f"{self.path} is damaged: rows of tensor {name!r} have {shape[-1]} elements, "
                f"which is no multiple of the {block} of {quant_type.name}"
            )
        num_bytes = math.prod(shape) // block * block_bytes
        if offset + num_bytes > len(self._data):
            raise CheckpointError(
                f"{self.path} is truncated: tensor {name!r} ends at byte {offset + num_bytes}, the file has "
                f"{len(self._data)}. Delete it and fetch it again"
            )
        return GGUFTensor(shape, quant_type.name, offset, num_bytes)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, the slowest dimension first."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Tensors of types outside `QUANT_TYPES`, with the name of the type."""
        known = {quant_type.name for quant_type in QUANT_TYPES}
        return {name: tensor.type_name for name, tensor in self._tensors.items() if tensor.type_name not in known}

    def read_array(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the decoded values as a fresh float32 array of the tensor's shape."""
        tensor = self._tensors[name]
        parts = [part for _, part in self._decoded(tensor)]
        return np.concatenate(parts).reshape(tensor.shape)

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return the decoded values as a fresh tensor of `dtype`; at most 16 MiB more than it are in use meanwhile."""
        import torch

        tensor = self._tensors[name]
        out = torch.empty(math.prod(tensor.shape), dtype=dtype)
        for start, values in self._decoded(tensor):
            out[start : start + values.size] = torch.from_numpy(values)
        self._let_go(tensor)
        return out.view(tensor.shape)

    def _let_go(self, tensor: GGUFTensor) -> None:
        """Unmap the pages of a tensor that was read, so that the file does not lie in memory beside the weights."""
        if hasattr(mmap, "MADV_DONTNEED"):
            first = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._data.madvise(mmap.MADV_DONTNEED, first, tensor.offset + tensor.num_bytes - first)

    def _decoded(self, tensor: GGUFTensor) -> Iterator[tuple[int, np.ndarray[Any, np.dtype[np.float32]]]]:
        """Yield (first element, float32 values) in pieces. Blocks are independent, so rows may be regrouped."""
        quant_type = GGMLQuantizationType[tensor.type_name]
        block, block_bytes = GGML_QUANT_SIZES[quant_type]
        num_blocks = tensor.num_bytes // block_bytes
        step = max(1, _CHUNK_ELEMENTS // block)
        for first in range(0, num_blocks, step):
            count = min(step, num_blocks - first)
            raw = np.frombuffer(self._data, np.uint8, count * block_bytes, tensor.offset + first * block_bytes).reshape(
                _groups(count), -1
            )
            with np.errstate(all="ignore"):
                values = dequantize(raw, quant_type)
            yield first * block, np.array(values, np.float32).reshape(-1)


def _groups(count: int) -> int:
    """Return in how many equal rows `count` blocks are decoded: many enough to stay in the processor's caches."""
    for groups in (256, 64, 16, 4):
        if count % groups == 0:
            return groups
    return 1
