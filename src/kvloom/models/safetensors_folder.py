"""SafetensorsFolder: the tensors of a folder with one or several safetensors files, mapped into memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from kvloom.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_READABLE = frozenset({"F64", "F32", "F16", "BF16"})
_MAPPED_BYTES = 32 << 20
"""Bytes to be read of a map before the file is mapped anew: what was read of one stays in memory as long as it does."""


class SafetensorsFolder:
    """All tensors of `path`, from the index's shards if there is an index, else from the one file.

    Raises `CheckpointError` when there is no safetensors file, a shard is missing, a header or the length of a file
    is wrong, or the index and the shards disagree. Pickled weights are never opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shard_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._types: dict[str, str] = {}
        self._open: dict[Path, Any] = {}
        self._read_bytes = 0  # from the maps in `_open`
        index = path / _INDEX
        for shard in self._shards_of_index(index) if index.is_file() else [self._single_file()]:
            self._read_header(shard)
        if index.is_file():
            self._compare(index)

    def _single_file(self) -> Path:
        files = sorted(self.path.glob("*.safetensors"))
        if (self.path / _SINGLE) in files:
            return self.path / _SINGLE
        if len(files) == 1:
            return files[0]
        if files:
            raise CheckpointError(f"{self.path} has {len(files)} safetensors files but no {_INDEX}; add the index")
        pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in self.path.glob(pattern)]
        hint = f" ({pickled[0]} is pickled and is never opened: convert it to safetensors)" if pickled else ""
        raise CheckpointError(f"{self.path} has no safetensors file{hint}")

    def _weight_map(self, index: Path) -> dict[str, str]:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = {str(name): str(shard) for name, shard in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not an index of safetensors files: {error}") from error
        outside = sorted({shard for shard in names.values() if Path(shard).name != shard})
        if outside:
            raise CheckpointError(f"{index} names files outside its folder: {', '.join(outside)}")
        return names

    def _shards_of_index(self, index: Path) -> list[Path]:
        shards = [self.path / shard for shard in sorted(set(self._weight_map(index).values()))]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise CheckpointError(f"{self.path} lacks {', '.join(missing)}; fetch the model again")
        return shards

    def _read_header(self, shard: Path) -> None:
        try:
            with safe_open(shard, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 (the handle is not a mapping)
                    entry = file.get_slice(name)
                    if name in self._shard_of:
                        raise CheckpointError(f"tensor {name!r} is in {self._shard_of[name].name} and in {shard.name}")
                    self._shard_of[name] = shard
                    self._shapes[name] = tuple(entry.get_shape())
                    self._types[name] = entry.get_dtype()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard} is truncated or damaged ({error}); delete it and fetch it again") from error

    def _compare(self, index: Path) -> None:
        absent = sorted(set(self._weight_map(index)) - set(self._shapes))
        if absent:
            raise CheckpointError(f"{index} names tensors that no shard has: {', '.join(absent)}; fetch them again")

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return self._shapes

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Tensors that are not floating-point numbers of 16, 32 or 64 bits, with the name of their type."""
        return {name: kind for name, kind in self._types.items() if kind not in _READABLE}

    def read(self, name: str, dtype: torch.dtype, *, borrowed: bool = False) -> torch.Tensor:
        """Return a tensor of `dtype`, fresh or `borrowed` (see `TensorFile`): what is in `dtype` is not copied."""
        shard = self._shard_of[name]
        if self._read_bytes > _MAPPED_BYTES:
            self._open.clear()
            self._read_bytes = 0
        if shard not in self._open:
            self._open[shard] = safe_open(shard, framework="pt", device="cpu")
        tensor: torch.Tensor = self._open[shard].get_tensor(name)
        self._read_bytes += tensor.nbytes
        return tensor.to(dtype, copy=not borrowed)
