"""Weights of Llama; GGUF files hold q and k in another order of rows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvloom.models.families.family import Family
from kvloom.models.families.weight import PRE_NORMS, PROJECTIONS, Weight
from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families import llama as configs

if TYPE_CHECKING:
    from torch import Tensor


def _halves_from_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of each head from interleaved pairs (0, h, 1, h + 1, ..) back to halves (0, 1, .. h, h + 1, ..).

    GGUF stores q and k of this architecture for a rotation of neighbouring elements; the decoder rotates halves.
    """
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _q_from_gguf(weight: Tensor, config: DecoderConfig) -> Tensor:
    return _halves_from_pairs(weight, config.num_heads)


def _k_from_gguf(weight: Tensor, config: DecoderConfig) -> Tensor:
    return _halves_from_pairs(weight, config.num_kv_heads)


_REORDERED = {"q": _q_from_gguf, "q_bias": _q_from_gguf, "k": _k_from_gguf, "k_bias": _k_from_gguf}


def reordered(weight: Weight) -> Weight:
    """Return the weight with the rows of q and k put back into halves where it comes from a GGUF file."""
    transform = _REORDERED.get(weight.name.removeprefix("layers.{i}."))
    return replace(weight, from_gguf=transform) if transform else weight


LLAMA = Family(
    config=configs.LLAMA,
    weights=(
        *map(reordered, PROJECTIONS),
        *PRE_NORMS,
    ),
)
