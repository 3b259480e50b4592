"""TensorFile: named tensors on disk, read one at a time; safetensors folders and GGUF files both are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class TensorFile(Protocol):
    """Tensors by name; `read` loads them."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, the slowest dimension first ([out, in] for matrices)."""

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Tensors whose storage type is not supported, with the name of the type."""

    def read(self, name: str, dtype: torch.dtype, *, borrowed: bool = False) -> torch.Tensor:
        """Return a tensor of `dtype` on the CPU.

        It is fresh and shares no memory with the file, unless `borrowed`: then it may lie in the mapped file, and the
        caller must read it at once and neither keep nor change it.
        """
