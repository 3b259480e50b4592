"""Weights of Gemma 3: norms are stored as their distance from one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvloom.models.families.family import Family
from kvloom.models.families.weight import FINAL_NORM, HEAD_NORMS, PROJECTIONS, Weight, norm
from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families import gemma3 as configs

if TYPE_CHECKING:
    from torch import Tensor


def _plus_one(weight: Tensor, config: DecoderConfig) -> Tensor:
    """Norm weights are stored as their distance from one; GGUF files hold the sum already."""
    return 1.0 + weight


def offset(weight: Weight) -> Weight:
    """Return the weight of a norm that a safetensors file stores as its distance from one."""
    return replace(weight, from_hf=_plus_one)


SANDWICH_NORMS = tuple(
    map(
        offset,
        (
            norm("attn_norm", "input_layernorm.weight", "attn_norm.weight"),
            norm("post_attn_norm", "post_attention_layernorm.weight", "post_attention_norm.weight"),
            norm("mlp_norm", "pre_feedforward_layernorm.weight", "ffn_norm.weight"),
            norm("post_mlp_norm", "post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
            FINAL_NORM,
        ),
    )
)
"""Norms before and after attention and MLP, and before the output."""


GEMMA3 = Family(
    config=configs.GEMMA3,
    weights=(*PROJECTIONS, *map(offset, HEAD_NORMS), *SANDWICH_NORMS),
    hf_prefixes=(("language_model.", ""), ("model.language_model.", "model.")),
    ignored=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)
