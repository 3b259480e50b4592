"""Weights of mixtures of experts: Mixtral, Qwen2-MoE and Qwen3-MoE."""

from dataclasses import replace

from kvloom.models.families.family import Family
from kvloom.models.families.llama import reordered
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
from kvloom.spec.families import routed as configs


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


def routed(router: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """Return the weights of a mixture whose safetensors have one tensor of each expert."""
    found = (
        per_layer("router", router, "ffn_gate_inp.weight", router_shape),
        per_layer("experts_gate", gate, "ffn_gate_exps.weight", experts_up),
        per_layer("experts_up", up, "ffn_up_exps.weight", experts_up),
        per_layer("experts_down", down, "ffn_down_exps.weight", experts_down),
    )
    return tuple(replace(weight, on=is_routed) for weight in found)


def _shared_up(c: DecoderConfig) -> tuple[int, ...]:
    return (_experts(c).shared_size, c.hidden_size)


def _shared_down(c: DecoderConfig) -> tuple[int, ...]:
    return (c.hidden_size, _experts(c).shared_size)


def _one_row(c: DecoderConfig) -> tuple[int, ...]:
    return (1, c.hidden_size)


def shared_expert(hf: str) -> tuple[Weight, ...]:
    """Return the weights of an expert that every token passes, whose names begin with `hf`."""
    found = (
        per_layer("shared_gate", f"{hf}.gate_proj.weight", "ffn_gate_shexp.weight", _shared_up),
        per_layer("shared_up", f"{hf}.up_proj.weight", "ffn_up_shexp.weight", _shared_up),
        per_layer("shared_down", f"{hf}.down_proj.weight", "ffn_down_shexp.weight", _shared_down),
    )
    return tuple(replace(weight, on=is_routed) for weight in found)


MIXTRAL_EXPERTS = routed(
    "block_sparse_moe.gate.weight",
    "block_sparse_moe.experts.{e}.w1.weight",
    "block_sparse_moe.experts.{e}.w3.weight",
    "block_sparse_moe.experts.{e}.w2.weight",
)
"""Router and experts as Mixtral and Phi-3.5-MoE name them."""


MIXTRAL = Family(
    config=configs.MIXTRAL,
    weights=(*EMBEDDINGS, *map(reordered, ATTENTION), *MIXTRAL_EXPERTS, *PRE_NORMS),
)


QWEN_EXPERTS = routed(
    "mlp.gate.weight",
    "mlp.experts.{e}.gate_proj.weight",
    "mlp.experts.{e}.up_proj.weight",
    "mlp.experts.{e}.down_proj.weight",
)
"""Router and experts as Qwen's mixtures and OLMoE name them."""

DENSE_MLP = tuple(replace(weight, on=is_dense) for weight in GATED_MLP)
"""The gated MLP of layers without experts."""


QWEN3_MOE = Family(
    config=configs.QWEN3_MOE,
    weights=(*EMBEDDINGS, *ATTENTION, *HEAD_NORMS, *DENSE_MLP, *QWEN_EXPERTS, *PRE_NORMS),
)


QWEN2_MOE = Family(
    config=configs.QWEN2_MOE,
    weights=(
        *EMBEDDINGS,
        *ATTENTION,
        *DENSE_MLP,
        *QWEN_EXPERTS,
        *shared_expert("mlp.shared_expert"),
        replace(
            per_layer("shared_router", "mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight", _one_row),
            on=is_routed,
        ),
        *PRE_NORMS,
    ),
)
