"""ERNIE 4.5, dense: Llama with rotation of neighbouring pairs; one flag adds biases to all projections."""

from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import FamilyConfig
from kvloom.spec.families.skeleton import nothing_implied, skeleton


def _configure(reader: ConfigReader) -> DecoderConfig:
    biased = reader.flag("use_bias")
    windows = [None] * reader.integer("num_hidden_layers")
    return skeleton(reader, "ernie4_5", windows, attention_bias=biased, output_bias=biased, mlp_bias=biased)


ERNIE = FamilyConfig(
    name="ernie4_5",
    architectures=("Ernie4_5ForCausalLM",),
    model_types=("ernie4_5",),
    gguf_architecture=None,
    defaults={
        "vocab_size": 103424,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    configure=_configure,
    from_gguf=nothing_implied,
)
