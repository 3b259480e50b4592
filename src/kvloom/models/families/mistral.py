"""Weights of Mistral."""

from kvloom.models.families.family import Family
from kvloom.models.families.weight import PRE_NORMS, PROJECTIONS
from kvloom.spec.families import mistral as configs

MISTRAL = Family(
    config=configs.MISTRAL,
    weights=(*PROJECTIONS, *PRE_NORMS),
)
