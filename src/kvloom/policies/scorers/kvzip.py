"""KVzip: keeps the tokens with most attention while the context is repeated (Kim et al., arXiv 2505.23416)."""

from collections.abc import Mapping

import torch

from kvloom.policies.context import ScoreContext
from kvloom.policies.scorer import RULES, Scorer
from kvloom.spec.method import Value


class KVzip(Scorer):
    """Maximum attention of any query to a token while the context was replayed, chunk by chunk (`Replay`).

    Query-agnostic: the whole prompt is taken as the context. Max over replay queries and the query group; the first
    `sinks` positions stay. `normalised` weighs each weight by ||W_O v|| / ||h||, h the layer's input (KVzip+,
    arXiv 2601.07891). The paper's budget is shared by all layers and heads, which is the default here.
    """

    def __init__(self, sinks: int) -> None:
        self.sinks = sinks

    def score(self, context: ScoreContext) -> torch.Tensor:
        """Return the most attention of the replay."""
        return context.replay

    def protected(self, context: ScoreContext) -> torch.Tensor:
        """Protect the sinks."""
        return context.first(self.sinks)


def _kvzip(args: Mapping[str, Value]) -> KVzip:
    return KVzip(int(args["sinks"]))


RULES.register("kvzip", _kvzip)
