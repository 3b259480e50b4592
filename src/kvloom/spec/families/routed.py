"""Mixtures of experts: Mixtral, Qwen2-MoE and Qwen3-MoE."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from kvloom.spec.decoder import DecoderConfig, ExpertsConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import GGUF_EXPERT_KEYS, FamilyConfig
from kvloom.spec.families.skeleton import all_windowed, layer_windows, nothing_implied, skeleton


def checked(reader: ConfigReader, experts: ExpertsConfig) -> ExpertsConfig:
    """Return `experts`; that a token takes more of them than there are is a fault, which goes to `reader`."""
    if experts.per_token > experts.count:
        reader.wrong("num_experts_per_tok", f"at most {experts.count}, the number of experts", experts.per_token)
    return experts


def routed(config: DecoderConfig) -> DecoderConfig:
    """Return `config` with experts in every layer."""
    return replace(config, layers=tuple(replace(layer, routed=True) for layer in config.layers))


def _mixtral(reader: ConfigReader) -> DecoderConfig:
    count = reader.integer("num_local_experts", reader.get("num_experts") or 8)
    experts = ExpertsConfig(count, reader.integer("num_experts_per_tok"), reader.integer("intermediate_size"))
    config = skeleton(reader, "mixtral", all_windowed(reader), experts=checked(reader, experts))
    return routed(config)


def _qwen3_moe(reader: ConfigReader) -> DecoderConfig:
    windows = all_windowed(reader)
    if not reader.flag("use_sliding_window"):
        windows = [None] * len(windows)
    count = reader.integer("num_local_experts", reader.get("num_experts") or 128)
    experts = ExpertsConfig(
        count,
        reader.integer("num_experts_per_tok"),
        reader.integer("moe_intermediate_size"),
        normalise=reader.flag("norm_topk_prob"),
    )
    config = skeleton(reader, "qwen3_moe", windows, qk_norm=True, experts=checked(reader, experts))
    return _in_some_layers(reader, config)


def _qwen2_moe(reader: ConfigReader) -> DecoderConfig:
    """Every other layer below `max_window_layers` has a window, and only if `use_sliding_window`."""
    first, windowed = reader.get("max_window_layers"), reader.flag("use_sliding_window")
    windows = layer_windows(reader, lambda i: windowed and i % 2 == 0 and i < first)
    experts = ExpertsConfig(
        reader.integer("num_local_experts", reader.get("num_experts") or 60),
        reader.integer("num_experts_per_tok"),
        reader.integer("moe_intermediate_size"),
        normalise=reader.flag("norm_topk_prob"),
        shared_size=reader.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    config = skeleton(
        reader,
        "qwen2_moe",
        windows,
        attention_bias=reader.flag("qkv_bias"),
        output_bias=False,
        experts=checked(reader, experts),
    )
    return _in_some_layers(reader, config)


def _in_some_layers(reader: ConfigReader, config: DecoderConfig) -> DecoderConfig:
    """Return `config` with experts in every layer that `decoder_sparse_step` names and `mlp_only_layers` does not."""
    step, dense = reader.integer("decoder_sparse_step"), reader.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        reader.wrong("mlp_only_layers", "a list of layers", dense)
        dense = []
    layers = (replace(layer, routed=i not in dense and (i + 1) % step == 0) for i, layer in enumerate(config.layers))
    return replace(config, layers=tuple(layers))


def _normalised(config: dict[str, Any], names: Collection[str]) -> None:
    """Add that the weights of the chosen experts sum to one in every layer, as in all GGUF files of this family."""
    config["norm_topk_prob"] = True


_DEFAULTS = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
}


MIXTRAL = FamilyConfig(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    model_types=("mixtral",),
    gguf_architecture="llama",
    defaults={
        **_DEFAULTS,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts_per_tok": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    configure=_mixtral,
    from_gguf=nothing_implied,
    gguf_config_keys=GGUF_EXPERT_KEYS,
    gguf_experts=True,
)


QWEN3_MOE = FamilyConfig(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    gguf_architecture="qwen3moe",
    defaults={
        **_DEFAULTS,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "sliding_window": 4096,
    },
    configure=_qwen3_moe,
    from_gguf=_normalised,
    gguf_config_keys={**GGUF_EXPERT_KEYS, "expert_feed_forward_length": "moe_intermediate_size"},
    gguf_experts=True,
)


QWEN2_MOE = FamilyConfig(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    model_types=("qwen2_moe",),
    gguf_architecture=None,
    defaults={
        **_DEFAULTS,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "decoder_sparse_step": 1,
        "qkv_bias": True,
    },
    configure=_qwen2_moe,
    from_gguf=nothing_implied,
)
