"""Phi-3, Phi-3.5 and Phi-4-mini: fused projections, LongRoPE, heads that may be rotated in part."""

from dataclasses import replace

from kvloom.models.families.config_reader import ConfigReader
from kvloom.models.families.family import Family
from kvloom.models.families.layout import contiguous_part, first_half, last_name, paired, second_half
from kvloom.models.families.skeleton import all_windowed, nothing_implied, skeleton
from kvloom.models.families.weight import ATTENTION, EMBEDDINGS, GATED_MLP, PRE_NORMS, Weight, gate_up, qkv
from kvloom.spec.decoder import DecoderConfig


def _configure(reader: ConfigReader) -> DecoderConfig:
    return skeleton(
        reader,
        "phi3",
        all_windowed(reader),
        partial=True,
        rope_aliases={"su": "longrope", "yarn": "longrope"},  # what early Phi-3 files call it
        attention_bias=False,
        output_bias=False,
    )


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
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    model_types=("phi3",),
    gguf_architecture="phi3",
    defaults={
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 32000,
    },
    configure=_configure,
    from_gguf=nothing_implied,
    weights=(*EMBEDDINGS, *map(_fused, (*ATTENTION, *GATED_MLP)), *PRE_NORMS),
    partial_rotary=True,
)
