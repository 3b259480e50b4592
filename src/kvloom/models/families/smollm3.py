"""Weights of SmolLM3."""

from kvloom.models.families.family import Family
from kvloom.models.families.llama import reordered
from kvloom.models.families.weight import PRE_NORMS, PROJECTIONS
from kvloom.spec.families import smollm3 as configs

SMOLLM3 = Family(
    config=configs.SMOLLM3,
    weights=(*map(reordered, PROJECTIONS), *PRE_NORMS),
)
