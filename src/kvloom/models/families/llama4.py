"""Weights of Llama 4, text: neighbouring rows of q and k are rotated together, experts lie fused as [in, out]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from kvloom.models.families.family import Family
from kvloom.models.families.layout import paired
from kvloom.models.families.routed import experts_down, experts_up, router_shape, shared_expert
from kvloom.models.families.weight import (
    ATTENTION,
    EMBEDDINGS,
    GATED_MLP,
    PRE_NORMS,
    Weight,
    is_dense,
    is_routed,
    per_layer,
)
from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families import llama4 as configs

if TYPE_CHECKING:
    from torch import Tensor

_HF = "feed_forward."


def _half(index: int) -> Callable[[Tensor, DecoderConfig], Tensor]:
    """Return what takes gate (0) or up (1), [experts, out, in], of the fused [experts, in, gate and up]."""
    return lambda stored, config: stored.chunk(2, dim=2)[index].transpose(1, 2)


def _turned(stored: Tensor, config: DecoderConfig) -> Tensor:
    return stored.transpose(1, 2)


def _stored_up(c: DecoderConfig) -> tuple[int, ...]:
    count, wide, hidden = experts_up(c)
    return (count, hidden, 2 * wide)


def _stored_down(c: DecoderConfig) -> tuple[int, ...]:
    count, hidden, wide = experts_down(c)
    return (count, wide, hidden)


_UP = per_layer("experts_up", _HF + "experts.gate_up_proj", "ffn_up_exps.weight", experts_up)
_UP = replace(_UP, hf_shape=_stored_up)
_DOWN = per_layer("experts_down", _HF + "experts.down_proj", "ffn_down_exps.weight", experts_down)

_EXPERTS = (
    per_layer("router", _HF + "router.weight", "ffn_gate_inp.weight", router_shape),
    replace(_UP, name="layers.{i}.experts_gate", gguf="blk.{i}.ffn_gate_exps.weight", from_hf=_half(0)),
    replace(_UP, from_hf=_half(1)),
    replace(_DOWN, hf_shape=_stored_down, from_hf=_turned),
)


def _dense(weight: Weight) -> Weight:
    return replace(weight, hf=weight.hf.replace("mlp.", _HF), on=is_dense)


LLAMA4 = Family(
    config=configs.LLAMA4,
    weights=(
        *EMBEDDINGS,
        *(paired(weight, neighbours=True) for weight in ATTENTION),
        *map(_dense, GATED_MLP),
        *(replace(weight, on=is_routed) for weight in _EXPERTS),
        *shared_expert(_HF + "shared_expert"),
        *PRE_NORMS,
    ),
    hf_prefixes=(("language_model.", ""),),
    ignored=("vision_model.", "multi_modal_projector."),
)
