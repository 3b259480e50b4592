"""GGUFHeader: metadata of a GGUF file and the extents of its tensors, checked while they are read. Torch-free.

Layout: magic, version, tensor count, key count; keys with typed values; for each tensor name, shape, type, offset.
"""

import math
import mmap
import struct
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from kvloom.errors import CheckpointError, UnsupportedError

TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""Name, elements and bytes of one block of each tensor type, by the type's number."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_MAX_ARRAY_DEPTH = 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8",
            12: "<f8"}  # fmt: skip


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies in the file: `shape` with the slowest dimension first, extent in bytes (0: type unknown)."""

    shape: tuple[int, ...]
    type_name: str
    offset: int
    num_bytes: int


class _Cursor:
    """Reads the header; a read past the end of the file is a `CheckpointError`."""

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


class GGUFHeader:
    """The header of a GGUF file, version 2 or 3, little endian.

    `metadata` maps keys to numbers, strings, lists or arrays. `tensors` gives the extent of each tensor, and `file` is
    open without a buffer for readers of tensors, for the lifetime of the header. Raises `CheckpointError` when
    the file is not GGUF, is truncated or contradicts itself, and `UnsupportedError` for one part of a split file. The
    header is mapped; the tensors are not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file, self._data = self._open(path)
        weakref.finalize(self, self.file.close)
        cursor = _Cursor(self._data, path)
        version = self._version(cursor)
        num_tensors, num_entries = cursor.integer("<Q"), cursor.integer("<Q")
        self.metadata: dict[str, Any] = {"GGUF.version": version}
        for _ in range(num_entries):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.integer("<I"))
        if self.metadata.get("split.count", 1) > 1:
            raise UnsupportedError(str(path), ["it is one part of a split GGUF file; merge the parts into one file"])
        self.tensors = self._read_tensors(cursor, num_tensors)

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
        if kind not in TENSOR_TYPES:
            return GGUFTensor(shape, f"type {kind}", offset, 0)
        type_name, block, block_bytes = TENSOR_TYPES[kind]
        if shape[-1] % block:
            raise CheckpointError(
                f"{self.path} is damaged: rows of tensor {name!r} have {shape[-1]} elements, "
                f"which is not a multiple of the {block} of {type_name}"
            )
        num_bytes = math.prod(shape) // block * block_bytes
        if offset + num_bytes > len(self._data):
            raise CheckpointError(
                f"{self.path} is truncated: tensor {name!r} ends at byte {offset + num_bytes}, the file has "
                f"{len(self._data)}. Delete it and fetch it again"
            )
        return GGUFTensor(shape, type_name, offset, num_bytes)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, the slowest dimension first."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def num_elements(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as stored; raises `CheckpointError` naming those of a type that is not known."""
        unknown = [f"{name} ({tensor.type_name})" for name, tensor in self.tensors.items() if not tensor.num_bytes]
        if unknown:
            raise CheckpointError(f"{self.path} has tensors of unknown types: {', '.join(unknown)}")
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def floats(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the values of a small tensor that is stored as F32, as the divisors of rotary frequencies are.

        Raises `UnsupportedError` for another type.
        """
        tensor = self.tensors[name]
        if tensor.type_name != "F32":
            raise UnsupportedError(str(self.path), [f"{name} is stored as {tensor.type_name}, not as F32"])
        return np.frombuffer(self._data, "<f4", math.prod(tensor.shape), tensor.offset).reshape(tensor.shape)
