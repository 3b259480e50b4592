"""Gemma: Llama with a scaled embedding, tanh GELU and norms stored as their distance from one."""

from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import FamilyConfig
from kvloom.spec.families.skeleton import nothing_implied, skeleton


def _configure(reader: ConfigReader) -> DecoderConfig:
    reader.refuse_if_set("use_bidirectional_attention")
    return skeleton(
        reader,
        "gemma",
        [None] * reader.integer("num_hidden_layers"),
        activation="gelu_tanh",  # also where the first configs say "gelu"
        embedding_scale=reader.integer("hidden_size") ** 0.5,
    )


GEMMA = FamilyConfig(
    name="gemma",
    architectures=("GemmaForCausalLM",),
    model_types=("gemma",),
    gguf_architecture="gemma",
    defaults={
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    configure=_configure,
    from_gguf=nothing_implied,
)
