"""Weights of gpt-oss: the experts' gate and up lie in turn in one tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvloom.models.families.family import Family
from kvloom.models.families.routed import experts_down, experts_up, router_shape
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
from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families import gpt_oss as configs

if TYPE_CHECKING:
    from torch import Tensor


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
    if transform is None:
        return weight
    rows = {"gate": (0, 2), "up": (1, 2)}.get(part, (0, 1))
    return replace(weight, from_hf=transform, mxfp4_rows=rows)


_MLP_NORM = norm("mlp_norm", "post_attention_layernorm.weight", "post_attention_norm.weight")


GPT_OSS = Family(
    config=configs.GPT_OSS,
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
)
