"""Weights of GLM-4: gate and up in one matrix, neighbouring rows rotated together."""

from dataclasses import replace

from kvloom.models.families.family import Family
from kvloom.models.families.layout import first_half, last_name, paired, second_half
from kvloom.models.families.weight import ATTENTION, EMBEDDINGS, GATED_MLP, PRE_NORMS, Weight, gate_up
from kvloom.spec.families import glm as configs


def _stored(weight: Weight) -> Weight:
    if last_name(weight) in ("gate", "up"):
        part = first_half if last_name(weight) == "gate" else second_half
        return replace(weight, hf="model.layers.{i}.mlp.gate_up_proj.weight", hf_shape=gate_up, from_hf=part)
    return paired(weight, neighbours=True)


GLM = Family(
    config=configs.GLM,
    weights=(*EMBEDDINGS, *map(_stored, (*ATTENTION, *GATED_MLP)), *PRE_NORMS),
)
