"""Apertus: a plain MLP of xIELU, whose curve each layer learned, and norms of q and k."""

from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import FamilyConfig
from kvloom.spec.families.skeleton import nothing_implied, skeleton


def _configure(reader: ConfigReader) -> DecoderConfig:
    return skeleton(
        reader,
        "apertus",
        [None] * reader.integer("num_hidden_layers"),
        activation=reader.choice("hidden_act", {"xielu": "xielu"}),
        gated=False,
        mlp_bias=False,
        qk_norm=True,
    )


APERTUS = FamilyConfig(
    name="apertus",
    architectures=("ApertusForCausalLM",),
    model_types=("apertus",),
    gguf_architecture=None,
    defaults={
        "vocab_size": 131072,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "xielu",
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-5,
        "rope_theta": 12000000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    configure=_configure,
    from_gguf=nothing_implied,
)
