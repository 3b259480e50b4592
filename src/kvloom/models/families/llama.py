"""Llama: Llama 1 to 3, SmolLM2 and other models of the same mathematics."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvloom.models.families.config_reader import ConfigReader
from kvloom.models.families.family import Family
from kvloom.models.families.skeleton import skeleton
from kvloom.models.families.weight import PRE_NORMS, PROJECTIONS, Weight
from kvloom.spec.decoder import DecoderConfig

if TYPE_CHECKING:
    from torch import Tensor


def _configure(reader: ConfigReader) -> DecoderConfig:
    reader.refuse_if_set("mlp_bias")
    window = None if reader.get(_WINDOW) is None else reader.integer(_WINDOW)
    return skeleton(reader, "llama", [window] * reader.integer("num_hidden_layers"))


_WINDOW = "window_of_all_layers"
"""Entry that no config.json has: GGUF files call Mistral a llama, and a window in their metadata is of all layers."""


def _from_gguf(config: dict[str, Any], names: Collection[str]) -> None:
    config[_WINDOW] = config.pop("sliding_window", None)


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
    name="llama",
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    gguf_architecture="llama",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    configure=_configure,
    from_gguf=_from_gguf,
    weights=(
        *map(reordered, PROJECTIONS),
        *PRE_NORMS,
    ),
)
