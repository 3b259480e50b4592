"""Weights of Seed-OSS."""

from kvloom.models.families.family import Family
from kvloom.models.families.weight import PRE_NORMS, PROJECTIONS
from kvloom.spec.families import seed_oss as configs

SEED_OSS = Family(config=configs.SEED_OSS, weights=(*PROJECTIONS, *PRE_NORMS))
