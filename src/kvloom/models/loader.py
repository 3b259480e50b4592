"""Loading: a checkpoint's weights in the form that runs best here, or in the form that was asked for."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch

from kvloom.attention.reference import ReferenceBackend
from kvloom.errors import UnsupportedError
from kvloom.models.checkpoint import Checkpoint
from kvloom.models.decoder import Decoder
from kvloom.models.eager import EagerModel
from kvloom.models.heap import release_free_heap
from kvloom.models.model import Model
from kvloom.spec.kernels import unsupported

_TENSORS_BETWEEN_TRIMS = 8
"""A trim takes about a millisecond; the tensors of a dense layer are about as many."""


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    *,
    block_size: int,
    backend: str = "auto",
    quantization: str | None = None,
) -> Model:
    """Return the model of `checkpoint` in `dtype`; raises `UnsupportedError` with every reason against `backend`.

    "auto" falls back to eager where the kernels cannot run the model, but never ignores a requested quantization.
    """
    reasons = cpu_reasons(checkpoint, block_size)
    if backend == "cpu" or quantization is not None or (backend == "auto" and not reasons):
        if backend == "eager":
            reasons = [*reasons, "the eager backend has no quantised weights; leave out --quantization or --backend"]
        if reasons:
            raise UnsupportedError(f"{checkpoint.name} on the CPU kernels", reasons)
        from kvloom.models.compiled import CompiledModel

        release_free_heap()  # freed after reading the vocabulary
        # Each weight is packed at once.
        weights = checkpoint.packed_tensors(dtype) if quantization is None else checkpoint.tensors(dtype, borrowed=True)
        model: Model = CompiledModel(checkpoint.config, _trimmed(weights), dtype, quantization)
    else:
        release_free_heap()
        model = EagerModel(Decoder(checkpoint.config, dict(_trimmed(checkpoint.tensors(dtype)))), ReferenceBackend())
    release_free_heap()  # freed after decoding the weights
    return model


def _trimmed(weights: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield what `weights` yields; return freed memory to the system after every `_TENSORS_BETWEEN_TRIMS` tensors.

    Decoded pieces and packed matrices would else stay in the heap until all weights are loaded.
    """
    for count, (name, weight) in enumerate(weights, 1):
        yield name, weight
        if count % _TENSORS_BETWEEN_TRIMS == 0:
            release_free_heap()


def cpu_reasons(checkpoint: Checkpoint, block_size: int) -> list[str]:
    """Return every reason why the CPU kernels cannot run this checkpoint; [] means that they can."""
    if importlib.util.find_spec("kvloom.kernels.cpu._ext") is None:
        return ["the CPU kernels were not built; install kvloom with a C++17 compiler at hand"]
    return unsupported(checkpoint.config, block_size)
