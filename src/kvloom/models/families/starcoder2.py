"""Weights of StarCoder 2."""

from kvloom.models.families.classic import layer_norm, plain_mlp
from kvloom.models.families.family import Family
from kvloom.models.families.weight import ATTENTION, EMBEDDINGS
from kvloom.spec.families import starcoder2 as configs

_AT = "model.layers.{i}."

STARCODER2 = Family(
    config=configs.STARCODER2,
    weights=(
        *EMBEDDINGS,
        *ATTENTION,
        *plain_mlp(_AT + "mlp.c_fc", _AT + "mlp.c_proj"),
        *layer_norm("layers.{i}.attn_norm", _AT + "input_layernorm"),
        *layer_norm("layers.{i}.mlp_norm", _AT + "post_attention_layernorm"),
        *layer_norm("final_norm", "model.norm"),
    ),
)
