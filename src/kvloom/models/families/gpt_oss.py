"""gpt-oss: learned sinks, windows on every other layer, experts with biases and a clamped gate."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvloom.models.families.config_reader import ConfigReader
from kvloom.models.families.family import GGUF_EXPERT_KEYS, Family
from kvloom.models.families.routed import experts_down, experts_up, router_shape
from kvloom.models.families.skeleton import layer_windows, skeleton
from kvloom.models.families.weight import (
    ATTENTION,
    EMBEDDINGS,
    PRE_NORMS,
    Shape,
    Transform,
    Weight,
    norm,
    per_layer,
    renamed,
    rows_of,
)
from kvloom.spec.decoder import DecoderConfig, ExpertsConfig

if TYPE_CHECKING:
    from torch import Tensor


def _configure(reader: ConfigReader) -> DecoderConfig:
    experts = ExpertsConfig(
        reader.integer("num_local_experts", reader.get("num_experts") or 128),
        reader.integer("num_experts_per_tok", reader.get("experts_per_token") or 4),
        reader.integer("intermediate_size"),
        bias=True,
        clamp=(reader.number("swiglu_alpha"), reader.number("swiglu_limit")),
    )
    if experts.per_token > experts.count:
        reader.wrong("num_experts_per_tok", f"at most {experts.count}, the number of experts", experts.per_token)
    config = skeleton(
        reader, "gpt_oss", layer_windows(reader, lambda i: i % 2 == 0), experts=experts, sinks=True, activation="silu"
    )
    return replace(config, layers=tuple(replace(layer, routed=True) for layer in config.layers))


def _gate(stored: Tensor, config: DecoderConfig) -> Tensor:
    """Gate and up lie in turn along the last dimension; matrices are [experts, in, out]."""
    part = stored[..., ::2]
    return part.transpose(1, 2) if part.dim() == 3 else part


def _up(stored: Tensor, config: DecoderConfig) -> Tensor:
    part = stored[..., 1::2]
    return part.transpose(1, 2) if part.dim() == 3 else part


def _down(stored: Tensor, config: DecoderConfig) -> Tensor:
    return stored.transpose(1, 2)


def _heads(c: DecoderConfig) -> tuple[int, ...]:
    return (c.num_heads,)


def _two_biases(shape: Shape) -> Shape:
    return lambda c: (shape(c)[0], 2 * shape(c)[1])


def _biases(shape: Shape) -> Shape:
    return lambda c: shape(c)[:2]


def _stored_up(c: DecoderConfig) -> tuple[int, ...]:
    count, wide, hidden = experts_up(c)
    return (count, hidden, 2 * wide)


def _stored_down(c: DecoderConfig) -> tuple[int, ...]:
    count, hidden, wide = experts_down(c)
    return (count, wide, hidden)


def _expert(name: str, hf: str, shape: Shape, stored: Shape | None, transform: Transform | None) -> Weight:
    part, bias = name.removesuffix("_bias"), name.endswith("_bias")
    gguf = f"ffn_{part}_exps.{'bias' if bias else 'weight'}"
    weight = replace(per_layer(f"experts_{name}", f"mlp.experts.{hf}", gguf, shape), hf_shape=stored)
    return weight if transform is None else replace(weight, from_hf=transform)


def _from_gguf(config: dict[str, Any], names: Collection[str]) -> None:
    """Add what all models of the family have: a YaRN whose ramp begins and ends between two frequencies."""
    if config.get("rope_scaling"):
        config["rope_scaling"]["truncate"] = False


_MLP_NORM = norm("mlp_norm", "post_attention_layernorm.weight", "post_attention_norm.weight")

GPT_OSS = Family(
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
    weights=(
        *EMBEDDINGS,
        *ATTENTION,
        replace(per_layer("sinks", "self_attn.sinks", "attn_sinks.weight", _heads), is_norm=True),
        per_layer("router", "mlp.router.weight", "ffn_gate_inp.weight", router_shape),
        per_layer("router_bias", "mlp.router.bias", "ffn_gate_inp.bias", rows_of(router_shape)),
        _expert("gate", "gate_up_proj", experts_up, _stored_up, _gate),
        _expert("up", "gate_up_proj", experts_up, _stored_up, _up),
        _expert("down", "down_proj", experts_down, _stored_down, _down),
        _expert("gate_bias", "gate_up_proj_bias", _biases(experts_up), _two_biases(experts_up), _gate),
        _expert("up_bias", "gate_up_proj_bias", _biases(experts_up), _two_biases(experts_up), _up),
        _expert("down_bias", "down_proj_bias", _biases(experts_down), None, None),
        *renamed(PRE_NORMS, mlp_norm=_MLP_NORM),
    ),
    gguf_config_keys={**GGUF_EXPERT_KEYS, "expert_feed_forward_length": "intermediate_size"},
    gguf_experts=True,
    quantizations=("mxfp4",),
)
