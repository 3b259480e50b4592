"""Weights of Gemma: norms are stored as their distance from one."""

from kvloom.models.families.family import Family
from kvloom.models.families.gemma3 import offset
from kvloom.models.families.weight import PRE_NORMS, PROJECTIONS
from kvloom.spec.families import gemma as configs

GEMMA = Family(config=configs.GEMMA, weights=(*PROJECTIONS, *map(offset, PRE_NORMS)))
