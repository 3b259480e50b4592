"""Weights of GLM-4 and GLM-4-0414: gate and up in one matrix, neighbouring rows rotated together."""

from dataclasses import replace

from kvloom.models.families.family import Family
from kvloom.models.families.layout import first_half, last_name, paired, second_half
from kvloom.models.families.weight import (
    ATTENTION,
    EMBEDDINGS,
    FINAL_NORM,
    GATED_MLP,
    PRE_NORMS,
    Weight,
    gate_up,
    norm,
)
from kvloom.spec.families import glm as configs


def _stored(weight: Weight) -> Weight:
    if last_name(weight) in ("gate", "up"):
        part = first_half if last_name(weight) == "gate" else second_half
        return replace(weight, hf="model.layers.{i}.mlp.gate_up_proj.weight", hf_shape=gate_up, from_hf=part)
    return paired(weight, neighbours=True)


GLM = Family(
    config=configs.GLM,
    weights=(*EMBEDDINGS, *map(_stored, (*ATTENTION, *GATED_MLP)), *PRE_NORMS),
)

_FOUR_NORMS = (
    norm("attn_norm", "input_layernorm.weight", "attn_norm.weight"),
    norm("post_attn_norm", "post_self_attn_layernorm.weight", "post_attention_norm.weight"),
    norm("mlp_norm", "post_attention_layernorm.weight", "ffn_norm.weight"),
    norm("post_mlp_norm", "post_mlp_layernorm.weight", "post_ffw_norm.weight"),
    FINAL_NORM,
)

GLM4 = Family(
    config=configs.GLM4,
    weights=(*EMBEDDINGS, *map(_stored, (*ATTENTION, *GATED_MLP)), *_FOUR_NORMS),
)
