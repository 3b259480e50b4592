"""Weights of Nemotron: heads rotated in part, norms stored as their distance from one."""

from kvloom.models.families.classic import layer_norm, plain_mlp
from kvloom.models.families.family import Family
from kvloom.models.families.gemma3 import offset
from kvloom.models.families.layout import paired
from kvloom.models.families.weight import ATTENTION, EMBEDDINGS, Weight
from kvloom.spec.families import nemotron as configs

_AT = "model.layers.{i}."


def _norm(name: str, hf: str) -> tuple[Weight, Weight]:
    weight, bias = layer_norm(name, hf)
    return offset(weight), bias


NEMOTRON = Family(
    config=configs.NEMOTRON,
    weights=(
        *EMBEDDINGS,
        *map(paired, ATTENTION),
        *plain_mlp(_AT + "mlp.up_proj", _AT + "mlp.down_proj"),
        *_norm("layers.{i}.attn_norm", _AT + "input_layernorm"),
        *_norm("layers.{i}.mlp_norm", _AT + "post_attention_layernorm"),
        *_norm("final_norm", "model.norm"),
    ),
)
