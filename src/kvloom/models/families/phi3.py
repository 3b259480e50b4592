"""Weights of Phi-3: q, k and v in one matrix, gate and up in another."""

from dataclasses import replace

from kvloom.models.families.family import Family
from kvloom.models.families.layout import contiguous_part, first_half, last_name, paired, second_half
from kvloom.models.families.weight import ATTENTION, EMBEDDINGS, GATED_MLP, PRE_NORMS, Weight, gate_up, qkv
from kvloom.spec.families import phi3 as configs


def _fused(weight: Weight) -> Weight:
    name = last_name(weight)
    if name in ("q", "k", "v"):
        part = contiguous_part(name)
        weight = replace(
            weight,
            hf="model.layers.{i}.self_attn.qkv_proj.weight",
            gguf="blk.{i}.attn_qkv.weight",
            hf_shape=qkv,
            gguf_shape=qkv,
        )
        weight = paired(weight, after=part)
        return replace(weight, from_gguf=weight.from_hf)
    if name in ("gate", "up"):
        part = first_half if name == "gate" else second_half
        return replace(
            weight,
            hf="model.layers.{i}.mlp.gate_up_proj.weight",
            gguf="blk.{i}.ffn_up.weight",
            hf_shape=gate_up,
            gguf_shape=gate_up,
            from_hf=part,
            from_gguf=part,
        )
    return weight


PHI3 = Family(
    config=configs.PHI3,
    weights=(*EMBEDDINGS, *map(_fused, (*ATTENTION, *GATED_MLP)), *PRE_NORMS),
)
