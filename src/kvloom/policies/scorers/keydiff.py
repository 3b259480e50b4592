"""KeyDiff: keys that point away from the mean key are the distinctive ones (Park et al., arXiv 2504.15364)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from kvloom.policies.context import ScoreContext
from kvloom.policies.scorer import RULES, Scorer
from kvloom.spec.method import Value


class KeyDiff(Scorer):
    """Minus the cosine between a cached key and the mean of all normalised keys of its lane. Protects nothing.

    The paper prunes block by block: `+chunk(tokens=128)` does that; the mean then runs over what is held.
    """

    def score(self, context: ScoreContext) -> torch.Tensor:
        """Return minus the cosine to the mean direction."""
        directions = F.normalize(context.keys.double(), dim=-1) * context.valid[..., None]
        anchor = directions.sum(1) / context.valid.sum(1, keepdim=True)
        return -torch.einsum("gsd,gd->gs", directions, F.normalize(anchor, dim=-1))


def _keydiff(args: Mapping[str, Value]) -> KeyDiff:
    return KeyDiff()


RULES.register("keydiff", _keydiff)
