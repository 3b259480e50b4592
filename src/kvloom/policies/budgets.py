"""Budgets: how many tokens each lane keeps, as whole numbers that sum exactly."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from kvloom.policies.selection import ranking
from kvloom.registry import Registry
from kvloom.spec.budget import pyramid_budgets
from kvloom.spec.method import Value


@dataclass(frozen=True)
class LayerScores:
    """Scores [G, S] of one layer with what is protected and what is there; of layers that look alike, [L, G, S]."""

    scores: torch.Tensor
    protected: torch.Tensor
    valid: torch.Tensor

    @property
    def held(self) -> torch.Tensor:
        """Tokens in each lane, [G]."""
        return self.valid.sum(-1)

    @property
    def layers(self) -> list["LayerScores"]:
        """The layers of a stack, one by one."""
        return [LayerScores(*each) for each in zip(self.scores, self.protected, self.valid, strict=True)]


class Budget(ABC):
    """Divides `budget` tokens a lane, on average over all lanes that take part, among those lanes.

    How lanes share them is in the method's row (`kvloom.spec.method`): a budget that `spans_layers` is given all layers
    at once, others one layer at a time, or stacks of layers if the row says `stacks`.
    """

    @abstractmethod
    def counts(self, layers: list[LayerScores], budget: int, protected: int, prompt: int) -> list[torch.Tensor]:
        """Return tokens kept [G] int64 of each layer, never more than it holds.

        `protected` tokens at most are protected in each lane; `prompt` is the prompt's length.
        """


class Uniform(Budget):
    """Every lane keeps `budget` tokens."""

    def counts(self, layers: list[LayerScores], budget: int, protected: int, prompt: int) -> list[torch.Tensor]:
        """Return min(budget, held) (see `Budget`)."""
        return [layer.held.clamp(max=budget) for layer in layers]


@dataclass(frozen=True)
class Pyramid(Budget):
    """Layers keep linearly less from the first to the last (PyramidKV, arXiv 2406.02069).

    A layer's share follows from the length of the prompt, also while the prompt is processed and after it; a prompt
    that is no longer than the budget gives even shares.
    """

    beta: float = 20.0

    def counts(self, layers: list[LayerScores], budget: int, protected: int, prompt: int) -> list[torch.Tensor]:
        """Return the same number for all lanes of a layer (see `Budget`)."""
        shares = [budget] * len(layers)
        if prompt > budget:
            shares = pyramid_budgets(budget, min(protected, budget), len(layers), prompt, self.beta)
        return [layer.held.clamp(max=share) for layer, share in zip(layers, shares, strict=True)]


@dataclass(frozen=True)
class Adaptive(Budget):
    """The lanes of a layer share its budget by their scores; each keeps at least `floor` of the even share.

    Ada-KV (arXiv 2407.11550) in the form of kvpress: the floor is filled with each head's best tokens, the rest of the
    layer's budget with the best of all heads. (The authors' code blends the counts instead.)
    """

    floor: float = 0.2

    def counts(self, layers: list[LayerScores], budget: int, protected: int, prompt: int) -> list[torch.Tensor]:
        """Return lengths that sum to lanes x budget in every layer, or to all that is held (see `Budget`)."""
        return [shared_counts([layer], budget, self.floor)[0] for layer in layers]


@dataclass(frozen=True)
class Global(Budget):
    """All lanes of all layers share one budget by their scores, as KVzip does (arXiv 2505.23416)."""

    floor: float = 0.0

    def counts(self, layers: list[LayerScores], budget: int, protected: int, prompt: int) -> list[torch.Tensor]:
        """Return lengths that sum to lanes x budget over all layers, or to all that is held (see `Budget`)."""
        return shared_counts(layers, budget, self.floor)


@dataclass(frozen=True)
class Threshold(Budget):
    """Each lane keeps the tokens that score above a value, at most `budget`, and at least the protected ones.

    Only this budget may evict tokens from a request that is not longer than the budget.
    """

    above: float = 0.0

    def counts(self, layers: list[LayerScores], budget: int, protected: int, prompt: int) -> list[torch.Tensor]:
        """Return the number above the threshold, capped (see `Budget`)."""
        found = []
        for layer in layers:
            wanted = (layer.valid & (layer.protected | (layer.scores > self.above))).sum(1)
            found.append(torch.minimum(wanted.clamp(max=budget), layer.held))
        return found


def shared_counts(layers: list[LayerScores], budget: int, floor: float) -> list[torch.Tensor]:
    """Return lengths [G] for each layer that sum to min(lanes x budget, held): own floor first, then the best of all.

    Protected tokens always count. Ties between lanes go to the earlier layer, lane and position.
    """
    lanes = sum(layer.valid.shape[0] for layer in layers)
    total = min(lanes * budget, sum(int(layer.held.sum()) for layer in layers))
    own = int(floor * budget)
    keys: list[torch.Tensor] = []
    first: list[torch.Tensor] = []
    for layer in layers:
        order = ranking(layer.scores, layer.protected, layer.valid)
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
        guaranteed = layer.valid & (layer.protected | (rank < own))
        first.append(guaranteed.sum(1))
        keys.append(torch.where(layer.valid & ~guaranteed, layer.scores.double(), float("-inf")))
    spare = total - sum(int(f.sum()) for f in first)
    if spare <= 0:
        return first
    flat = torch.cat([key.flatten() for key in keys])
    best = torch.argsort(flat, descending=True, stable=True)[:spare]
    best = best[flat[best] > float("-inf")]
    taken = torch.zeros(len(flat), dtype=torch.int64)
    taken[best] = 1
    parts = torch.split(taken, [key.numel() for key in keys])
    return [part.view_as(key).sum(1) + count for part, key, count in zip(parts, keys, first, strict=True)]


BUDGETS: Registry[Callable[[Mapping[str, Value]], Budget]] = Registry("budget")
BUDGETS.register("uniform", lambda args: Uniform())
BUDGETS.register("pyramid", lambda args: Pyramid(float(args["beta"])))
BUDGETS.register("adaptive", lambda args: Adaptive(float(args["floor"])))
BUDGETS.register("global", lambda args: Global(float(args["floor"])))
BUDGETS.register("threshold", lambda args: Threshold(float(args["above"])))
