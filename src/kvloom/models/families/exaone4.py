"""Weights of EXAONE 4."""

from kvloom.models.families.family import Family
from kvloom.models.families.olmo import POST_NORMS
from kvloom.models.families.weight import HEAD_NORMS, PROJECTIONS
from kvloom.spec.families import exaone4 as configs

EXAONE4 = Family(config=configs.EXAONE4, weights=(*PROJECTIONS, *HEAD_NORMS, *POST_NORMS))
