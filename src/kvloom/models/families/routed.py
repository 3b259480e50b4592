"""Mixtures of experts: Mixtral and Qwen3-MoE."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from kvloom.models.families.config_reader import ConfigReader
from kvloom.models.families.family import GGUF_EXPERT_KEYS, Family
from kvloom.models.families.llama import reordered
from kvloom.models.families.skeleton import all_windowed, nothing_implied, skeleton
from kvloom.models.families.weight import (
    ATTENTION,
    EMBEDDINGS,
    GATED_MLP,
    HEAD_NORMS,
    PRE_NORMS,
    Weight,
    is_dense,
    is_routed,
    per_layer,
)
from kvloom.spec.decoder import DecoderConfig, ExpertsConfig


def _experts(c: DecoderConfig) -> ExpertsConfig:
    assert c.experts is not None
    return c.experts


def router_shape(c: DecoderConfig) -> tuple[int, ...]:
    """Return [experts, hidden]."""
    return (_experts(c).count, c.hidden_size)


def experts_up(c: DecoderConfig) -> tuple[int, ...]:
    """Return [experts, intermediate, hidden]."""
    return (_experts(c).count, _experts(c).intermediate_size, c.hidden_size)


def experts_down(c: DecoderConfig) -> tuple[int, ...]:
    """Return [experts, hidden, intermediate]."""
    return (_experts(c).count, c.hidden_size, _experts(c).intermediate_size)


def _routed(router: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """Return the weights of a mixture whose safetensors have one tensor of each expert."""
    found = (
        per_layer("router", router, "ffn_gate_inp.weight", router_shape),
        per_layer("experts_gate", gate, "ffn_gate_exps.weight", experts_up),
        per_layer("experts_up", up, "ffn_up_exps.weight", experts_up),
        per_layer("experts_down", down, "ffn_down_exps.weight", experts_down),
    )
    return tuple(replace(weight, on=is_routed) for weight in found)


def _checked(reader: ConfigReader, experts: ExpertsConfig) -> ExpertsConfig:
    if experts.per_token > experts.count:
        reader.wrong("num_experts_per_tok", f"at most {experts.count}, the number of experts", experts.per_token)
    return experts


def _mixtral(reader: ConfigReader) -> DecoderConfig:
    count = reader.integer("num_local_experts", reader.get("num_experts") or 8)
    experts = ExpertsConfig(count, reader.integer("num_experts_per_tok"), reader.integer("intermediate_size"))
    config = skeleton(reader, "mixtral", all_windowed(reader), experts=_checked(reader, experts))
    return replace(config, layers=tuple(replace(layer, routed=True) for layer in config.layers))


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
    config = skeleton(reader, "qwen3_moe", windows, qk_norm=True, experts=_checked(reader, experts))
    step, dense = reader.integer("decoder_sparse_step"), reader.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        reader.wrong("mlp_only_layers", "a list of layers", dense)
        dense = []
    layers = (replace(layer, routed=i not in dense and (i + 1) % step == 0) for i, layer in enumerate(config.layers))
    return replace(config, layers=tuple(layers))


def _normalised(config: dict[str, Any], names: Collection[str]) -> None:
    """Add that the shares of the chosen experts sum to one, in every layer: GGUF files of this family have no other."""
    config["norm_topk_prob"] = True


_DEFAULTS = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
}

MIXTRAL = Family(
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
    weights=(
        *EMBEDDINGS,
        *map(reordered, ATTENTION),
        *_routed(
            "block_sparse_moe.gate.weight",
            "block_sparse_moe.experts.{e}.w1.weight",
            "block_sparse_moe.experts.{e}.w3.weight",
            "block_sparse_moe.experts.{e}.w2.weight",
        ),
        *PRE_NORMS,
    ),
    gguf_config_keys=GGUF_EXPERT_KEYS,
    gguf_experts=True,
)

QWEN3_MOE = Family(
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
    weights=(
        *EMBEDDINGS,
        *ATTENTION,
        *HEAD_NORMS,
        *(replace(weight, on=is_dense) for weight in GATED_MLP),
        *_routed(
            "mlp.gate.weight",
            "mlp.experts.{e}.gate_proj.weight",
            "mlp.experts.{e}.up_proj.weight",
            "mlp.experts.{e}.down_proj.weight",
        ),
        *PRE_NORMS,
    ),
    gguf_config_keys={**GGUF_EXPERT_KEYS, "expert_feed_forward_length": "moe_intermediate_size"},
    gguf_experts=True,
)
