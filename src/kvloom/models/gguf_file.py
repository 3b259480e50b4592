"""GGUFFile: metadata and tensors of a GGUF file, checked before anything is believed."""

from __future__ import annotations

import math
import mmap
import struct
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
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
_CHUNK_ELEMENTS = 1 << 18
"""Elements that are read and decoded at once: few enough for what is in between to stay in the processor's caches."""


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
    for one part of a split file. The header is mapped; bytes of tensors are read when they are asked for, piece by
    piece, which leaves nothing of the file in memory beside the weights. Only one thread at a time may read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file, self._data = self._open(path)
        weakref.finalize(self, self._file.close)
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
    def _open(path: Path) -> tuple[FileIO, mmap.mmap]:
        """Return the file without a buffer, for its tensors, and as a map, for its header."""
        try:
            with ExitStack() as opened:
                file = opened.enter_context(path.open("rb", buffering=0))
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                opened.pop_all()
                return file, data
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
        out = np.empty(math.prod(tensor.shape), np.float32)
        for start, values in self._decoded(tensor):
            out[start : start + values.size] = values
        return out.reshape(tensor.shape)

    def read(self, name: str, dtype: torch.dtype, *, borrowed: bool = False) -> torch.Tensor:
        """Return the decoded values as a fresh tensor of `dtype`; a few MiB more than it are in use meanwhile."""
        import torch

        tensor = self._tensors[name]
        out = torch.empty(math.prod(tensor.shape), dtype=dtype)
        for start, values in self._decoded(tensor):
            out[start : start + values.size] = torch.from_numpy(values)
        return out.view(tensor.shape)

    def _decoded(self, tensor: GGUFTensor) -> Iterator[tuple[int, np.ndarray[Any, np.dtype[np.float32]]]]:
        """Yield (first element, float32 values) in pieces, each good until the next. Blocks are independent of rows."""
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
