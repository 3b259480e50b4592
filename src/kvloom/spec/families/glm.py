"""GLM-4: heads rotated in part, in pairs of neighbours; gate and up projections fused."""

from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import FamilyConfig
from kvloom.spec.families.skeleton import nothing_implied, skeleton


def _glm(reader: ConfigReader) -> DecoderConfig:
    windows = [None] * reader.integer("num_hidden_layers")
    return skeleton(reader, "glm", windows, partial=True, output_bias=False)


def _glm4(reader: ConfigReader) -> DecoderConfig:
    """GLM-4-0414: norms behind attention and MLP as well."""
    windows = [None] * reader.integer("num_hidden_layers")
    return skeleton(reader, "glm4", windows, partial=True, output_bias=False, sandwich_norm=True)


_DEFAULTS = {
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
}

GLM = FamilyConfig(
    name="glm",
    architectures=("GlmForCausalLM",),
    model_types=("glm",),
    gguf_architecture=None,
    defaults=_DEFAULTS,
    configure=_glm,
    from_gguf=nothing_implied,
)

GLM4 = FamilyConfig(
    name="glm4",
    architectures=("Glm4ForCausalLM",),
    model_types=("glm4",),
    gguf_architecture=None,
    defaults=_DEFAULTS,
    configure=_glm4,
    from_gguf=nothing_implied,
)
