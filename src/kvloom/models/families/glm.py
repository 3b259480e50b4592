"""GLM-4: heads rotated in part, in pairs of neighbours; gate and up projections fused."""

from dataclasses import replace

from kvloom.models.families.config_reader import ConfigReader
from kvloom.models.families.family import Family
from kvloom.models.families.layout import first_half, last_name, paired, second_half
from kvloom.models.families.skeleton import nothing_implied, skeleton
from kvloom.models.families.weight import ATTENTION, EMBEDDINGS, GATED_MLP, PRE_NORMS, Weight, gate_up
from kvloom.spec.decoder import DecoderConfig


def _configure(reader: ConfigReader) -> DecoderConfig:
    windows = [None] * reader.integer("num_hidden_layers")
    return skeleton(reader, "glm", windows, partial=True, output_bias=False)


def _stored(weight: Weight) -> Weight:
    if last_name(weight) in ("gate", "up"):
        part = first_half if last_name(weight) == "gate" else second_half
        return replace(weight, hf="model.layers.{i}.mlp.gate_up_proj.weight", hf_shape=gate_up, from_hf=part)
    return paired(weight, neighbours=True)


GLM = Family(
    name="glm",
    architectures=("GlmForCausalLM",),
    model_types=("glm",),
    gguf_architecture=None,
    defaults={
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.5,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-07,
        "rope_theta": 10000.0,
        "attention_bias": True,
        "eos_token_id": [151329, 151336, 151338],
    },
    configure=_configure,
    from_gguf=nothing_implied,
    weights=(*EMBEDDINGS, *map(_stored, (*ATTENTION, *GATED_MLP)), *PRE_NORMS),
)
