"""Nemotron: LayerNorms stored as their distance from one, a plain MLP of squared ReLUs, heads rotated in part."""

from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import FamilyConfig
from kvloom.spec.families.skeleton import nothing_implied, skeleton


def _configure(reader: ConfigReader) -> DecoderConfig:
    return skeleton(
        reader,
        "nemotron",
        [None] * reader.integer("num_hidden_layers"),
        partial=True,
        norm="layer",
        norm_bias=True,
        norm_eps=reader.number("norm_eps"),
        gated=False,
    )


NEMOTRON = FamilyConfig(
    name="nemotron",
    architectures=("NemotronForCausalLM",),
    model_types=("nemotron",),
    gguf_architecture=None,
    defaults={
        "vocab_size": 256000,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 32,
        "num_attention_heads": 48,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    configure=_configure,
    from_gguf=nothing_implied,
)
