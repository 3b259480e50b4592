"""gpt-oss: learned sinks, windows on every second layer, experts with biases and a clamped gate."""

from collections.abc import Collection
from typing import Any

from kvloom.spec.decoder import DecoderConfig, ExpertsConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import GGUF_EXPERT_KEYS, FamilyConfig
from kvloom.spec.families.routed import checked, routed
from kvloom.spec.families.skeleton import layer_windows, skeleton


def _configure(reader: ConfigReader) -> DecoderConfig:
    experts = ExpertsConfig(
        reader.integer("num_local_experts", reader.get("num_experts") or 128),
        reader.integer("num_experts_per_tok", reader.get("experts_per_token") or 4),
        reader.integer("intermediate_size"),
        bias=True,
        clamp=(reader.number("swiglu_alpha"), reader.number("swiglu_limit")),
    )
    windows = layer_windows(reader, lambda i: i % 2 == 0)
    config = skeleton(reader, "gpt_oss", windows, experts=checked(reader, experts), sinks=True, activation="silu")
    return routed(config)


def _from_gguf(config: dict[str, Any], names: Collection[str]) -> None:
    """Add what all models of the family have: a YaRN whose ramp begins and ends between two frequencies."""
    if config.get("rope_scaling"):
        config["rope_scaling"]["truncate"] = False


GPT_OSS = FamilyConfig(
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    model_types=("gpt_oss",),
    gguf_architecture="gpt-oss",
    defaults={
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": True,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    configure=_configure,
    from_gguf=_from_gguf,
    gguf_config_keys={**GGUF_EXPERT_KEYS, "expert_feed_forward_length": "intermediate_size"},
    gguf_experts=True,
    quantizations=("mxfp4",),
)
