"""Llama: Llama 1 to 3, SmolLM2 and other models of the same architecture."""

from collections.abc import Collection
from typing import Any

from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import FamilyConfig
from kvloom.spec.families.skeleton import skeleton


def _configure(reader: ConfigReader) -> DecoderConfig:
    window = None if reader.get(_WINDOW) is None else reader.integer(_WINDOW)
    return skeleton(reader, "llama", [window] * reader.integer("num_hidden_layers"))


_WINDOW = "window_of_all_layers"
"""Entry that no config.json has: GGUF files of Mistral name llama, and their window holds for all layers."""


def _from_gguf(config: dict[str, Any], names: Collection[str]) -> None:
    config[_WINDOW] = config.pop("sliding_window", None)


LLAMA = FamilyConfig(
    name="llama",
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    gguf_architecture="llama",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    configure=_configure,
    from_gguf=_from_gguf,
)
