"""Phi-3, Phi-3.5 and Phi-4-mini: fused projections, LongRoPE, heads that may be rotated in part."""

from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import FamilyConfig
from kvloom.spec.families.skeleton import all_windowed, nothing_implied, skeleton


def _configure(reader: ConfigReader) -> DecoderConfig:
    return skeleton(
        reader,
        "phi3",
        all_windowed(reader),
        partial=True,
        rope_aliases={"su": "longrope", "yarn": "longrope"},  # names in early Phi-3 files
        attention_bias=False,
        output_bias=False,
    )


PHI3 = FamilyConfig(
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
    partial_rotary=True,
)
