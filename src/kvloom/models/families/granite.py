"""Weights of Granite 3, dense and with experts; those of the experts lie in two tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvloom.models.families.family import Family
from kvloom.models.families.routed import experts_down, experts_up, router_shape
from kvloom.models.families.weight import ATTENTION, EMBEDDINGS, PRE_NORMS, PROJECTIONS, per_layer
from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families import granite as configs

if TYPE_CHECKING:
    from torch import Tensor


def _both(c: DecoderConfig) -> tuple[int, ...]:
    count, wide, hidden = experts_up(c)
    return (count, 2 * wide, hidden)


def _gate(stored: Tensor, config: DecoderConfig) -> Tensor:
    return stored[:, : stored.shape[1] // 2]


def _up(stored: Tensor, config: DecoderConfig) -> Tensor:
    return stored[:, stored.shape[1] // 2 :]


_INPUT = "block_sparse_moe.input_linear.weight"

GRANITE = Family(config=configs.GRANITE, weights=(*PROJECTIONS, *PRE_NORMS))

GRANITE_MOE = Family(
    config=configs.GRANITE_MOE,
    weights=(
        *EMBEDDINGS,
        *ATTENTION,
        per_layer("router", "block_sparse_moe.router.layer.weight", "ffn_gate_inp.weight", router_shape),
        replace(per_layer("experts_gate", _INPUT, "ffn_gate_exps.weight", experts_up), hf_shape=_both, from_hf=_gate),
        replace(per_layer("experts_up", _INPUT, "ffn_up_exps.weight", experts_up), hf_shape=_both, from_hf=_up),
        per_layer("experts_down", "block_sparse_moe.output_linear.weight", "ffn_down_exps.weight", experts_down),
        *PRE_NORMS,
    ),
)
