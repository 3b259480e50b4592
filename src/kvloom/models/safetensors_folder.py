"""SafetensorsFolder: the tensors of a folder with one or several safetensors files, mapped into memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from kvloom.errors import CheckpointError
from kvloom.spec.safetensors_header import INDEX, read_header, weight_map

if TYPE_CHECKING:
    import torch

_SINGLE = "model.safetensors"
_READABLE = frozenset({"F64", "F32", "F16", "BF16"})
_MAPPED_BYTES = 32 << 20
"""Bytes read from a map before the file is mapped anew: pages that were read stay in memory while the map exists."""


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
        indexed = weight_map(path)
        for shard in (
            [self._single_file()] if indexed is None else [path / name for name in sorted(set(indexed.values()))]
        ):
            self._read_header(shard)
        absent = sorted(set(indexed or ()) - set(self._shapes))
        if absent:
            named = f"{path / INDEX} names tensors that no shard has"
            raise CheckpointError(f"{named}: {', '.join(absent)}; fetch them again")

    def _single_file(self) -> Path:
        files = sorted(self.path.glob("*.safetensors"))
        if (self.path / _SINGLE) in files:
            return self.path / _SINGLE
        if len(files) == 1:
            return files[0]
        if files:
            raise CheckpointError(f"{self.path} has {len(files)} safetensors files but no {INDEX}; add the index")
        pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in self.path.glob(pattern)]
        hint = f" ({pickled[0]} is pickled and is never opened: convert it to safetensors)" if pickled else ""
        raise CheckpointError(f"{self.path} has no safetensors file{hint}")

    def _read_header(self, shard: Path) -> None:
        for name, (kind, shape, _) in read_header(shard).items():
            if name in self._shard_of:
                raise CheckpointError(f"tensor {name!r} is in {self._shard_of[name].name} and in {shard.name}")
            self._shard_of[name], self._shapes[name], self._types[name] = shard, shape, kind

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
