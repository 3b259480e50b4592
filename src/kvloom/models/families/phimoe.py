"""Weights of Phi-3.5-MoE: Mixtral's experts between LayerNorms, and a bias of the output matrix."""

from kvloom.models.families.classic import HEAD_BIAS, layer_norm
from kvloom.models.families.family import Family
from kvloom.models.families.routed import MIXTRAL_EXPERTS
from kvloom.models.families.weight import ATTENTION, EMBEDDINGS
from kvloom.spec.families import phimoe as configs

_AT = "model.layers.{i}."

PHIMOE = Family(
    config=configs.PHIMOE,
    weights=(
        *EMBEDDINGS,
        HEAD_BIAS,
        *ATTENTION,
        *MIXTRAL_EXPERTS,
        *layer_norm("layers.{i}.attn_norm", _AT + "input_layernorm"),
        *layer_norm("layers.{i}.mlp_norm", _AT + "post_attention_layernorm"),
        *layer_norm("final_norm", "model.norm"),
    ),
)
