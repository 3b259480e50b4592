"""Action: what becomes of evicted tokens. `Drop` forgets them; merging folds them into survivors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch

from kvloom.cache.survivors import Survivors
from kvloom.policies.context import ScoreContext
from kvloom.policies.needs import Needs
from kvloom.registry import Registry
from kvloom.spec.method import Value


class Action(ABC):
    """Decides what survivors hold after an eviction."""

    needs: Needs = Needs()

    @abstractmethod
    def merge(self, context: ScoreContext, keep: torch.Tensor, scores: torch.Tensor) -> list[Survivors] | None:
        """Return the survivors of each lane when keep [G, S] stay, or None when they stay as they are."""


class Drop(Action):
    """Evicted tokens leave no trace."""

    def merge(self, context: ScoreContext, keep: torch.Tensor, scores: torch.Tensor) -> list[Survivors] | None:
        """Return None: survivors are untouched."""
        return None


ACTIONS: Registry[Callable[[Mapping[str, Value]], Action]] = Registry("action")
ACTIONS.register("drop", lambda args: Drop())
