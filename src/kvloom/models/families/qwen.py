"""Weights of Qwen2 and Qwen3."""

from kvloom.models.families.family import Family
from kvloom.models.families.weight import HEAD_NORMS, PRE_NORMS, PROJECTIONS
from kvloom.spec.families import qwen as configs

QWEN2 = Family(
    config=configs.QWEN2,
    weights=(*PROJECTIONS, *PRE_NORMS),
)


QWEN3 = Family(
    config=configs.QWEN3,
    weights=(*PROJECTIONS, *HEAD_NORMS, *PRE_NORMS),
)
