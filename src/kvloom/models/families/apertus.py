"""Weights of Apertus: four numbers of each layer make its activation."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvloom.models.families.classic import plain_mlp
from kvloom.models.families.family import Family
from kvloom.models.families.weight import ATTENTION, EMBEDDINGS, FINAL_NORM, HEAD_NORMS, norm
from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families import apertus as configs

if TYPE_CHECKING:
    from torch import Tensor

_AT = "model.layers.{i}."


def _one(c: DecoderConfig) -> tuple[int, ...]:
    return (1,)


def _scalar(c: DecoderConfig) -> tuple[int, ...]:
    return ()


def _positive(stored: Tensor, config: DecoderConfig) -> Tensor:
    """What is learned goes through softplus (arXiv:2411.13010, section 3)."""
    from torch.nn.functional import softplus

    return softplus(stored)


_CURVE = (
    replace(norm("act_p", "mlp.act_fn.alpha_p", "ffn_act.alpha_p", _one), from_hf=_positive),
    replace(norm("act_n", "mlp.act_fn.alpha_n", "ffn_act.alpha_n", _one), from_hf=_positive),
    norm("act_beta", "mlp.act_fn.beta", "ffn_act.beta", _scalar),
    norm("act_eps", "mlp.act_fn.eps", "ffn_act.eps", _scalar),
)

APERTUS = Family(
    config=configs.APERTUS,
    weights=(
        *EMBEDDINGS,
        *ATTENTION,
        *HEAD_NORMS,
        *plain_mlp(_AT + "mlp.up_proj", _AT + "mlp.down_proj"),
        *_CURVE,
        norm("attn_norm", "attention_layernorm.weight", "attn_norm.weight"),
        norm("mlp_norm", "feedforward_layernorm.weight", "ffn_norm.weight"),
        FINAL_NORM,
    ),
)
