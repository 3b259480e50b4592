"""Seed-OSS: Llama with separate flags for biases before and after attention."""

from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import FamilyConfig
from kvloom.spec.families.skeleton import nothing_implied, skeleton


def _configure(reader: ConfigReader) -> DecoderConfig:
    windows = [None] * reader.integer("num_hidden_layers")
    return skeleton(reader, "seed_oss", windows, output_bias=reader.flag("attention_out_bias"))


SEED_OSS = FamilyConfig(
    name="seed_oss",
    architectures=("SeedOssForCausalLM",),
    model_types=("seed_oss",),
    gguf_architecture=None,
    defaults={
        "vocab_size": 155136,
        "hidden_size": 4096,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 80,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 524288,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    configure=_configure,
    from_gguf=nothing_implied,
)
