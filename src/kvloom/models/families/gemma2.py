"""Weights of Gemma 2."""

from kvloom.models.families.family import Family
from kvloom.models.families.gemma3 import SANDWICH_NORMS
from kvloom.models.families.weight import PROJECTIONS
from kvloom.spec.families import gemma2 as configs

GEMMA2 = Family(
    config=configs.GEMMA2,
    weights=(*PROJECTIONS, *SANDWICH_NORMS),
)
