"""Weights of ERNIE 4.5: neighbouring rows of q and k are rotated together."""

from kvloom.models.families.family import Family
from kvloom.models.families.layout import paired
from kvloom.models.families.weight import PRE_NORMS, PROJECTIONS, Weight
from kvloom.spec.families import ernie as configs


def _stored(weight: Weight) -> Weight:
    return paired(weight, neighbours=True)


ERNIE = Family(config=configs.ERNIE, weights=(*map(_stored, PROJECTIONS), *PRE_NORMS))
