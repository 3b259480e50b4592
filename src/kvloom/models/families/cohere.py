"""Weights of Command R and Command R7B: neighbouring rows of q and k are rotated together."""

from kvloom.models.families.family import Family
from kvloom.models.families.layout import paired
from kvloom.models.families.weight import FINAL_NORM, PROJECTIONS, Weight, norm
from kvloom.spec.families import cohere as configs


def _stored(weight: Weight) -> Weight:
    return paired(weight, neighbours=True)


_WEIGHTS = (
    *map(_stored, PROJECTIONS),
    norm("attn_norm", "input_layernorm.weight", "attn_norm.weight"),
    FINAL_NORM,
)

COHERE = Family(config=configs.COHERE, weights=_WEIGHTS)

COHERE2 = Family(config=configs.COHERE2, weights=_WEIGHTS)
