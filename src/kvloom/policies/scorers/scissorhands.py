"""Scissorhands: keeps tokens with attention from recent queries (Liu et al., arXiv 2305.17118)."""

from collections.abc import Mapping

import torch

from kvloom.policies.context import ScoreContext
from kvloom.policies.scorer import RULES, Scorer
from kvloom.spec.method import Value


class Scissorhands(Scorer):
    """Mean attention of the last `window` prompt queries, and from then on of every generated one.

    This is the form in which the method is usually run as a baseline (VATP's code). The paper counts, over a history
    window, the queries that paid a token less than the average, and drops half the buffer at once; `+slack` gives the
    latter. The newest `recent` tokens stay. Mean over the query group.
    """

    def __init__(self, window: int, recent: int) -> None:
        self.window = window
        self.recent = recent

    def score(self, context: ScoreContext) -> torch.Tensor:
        """Return the mass since the window began, over the number of its queries."""
        return context.key_mass / (context.seen - max(0, context.prompt_tokens - self.window))

    def protected(self, context: ScoreContext) -> torch.Tensor:
        """Protect the newest tokens."""
        return context.newest(self.recent)


def _scissorhands(args: Mapping[str, Value]) -> Scissorhands:
    return Scissorhands(int(args["window"]), int(args["recent"]))


RULES.register("scissorhands", _scissorhands)
