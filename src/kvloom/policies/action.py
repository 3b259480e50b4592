"""Action: what happens to evicted tokens. `Drop` discards them; merging folds them into kept tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch

from kvloom.cache.survivors import Survivors
from kvloom.policies.context import ScoreContext
from kvloom.registry import Registry
from kvloom.spec.method import Value


class Action(ABC):
    """Computes the content of kept tokens after an eviction."""

    @abstractmethod
    def merge(self, context: ScoreContext, keep: torch.Tensor, scores: torch.Tensor) -> list[Survivors] | None:
        """Return the survivors of each lane when keep [G, S] stay, or None when they stay as they are.

        scores [G, S] are those by which they were chosen. Mutates `context.state` at most.
        """


class Drop(Action):
    """Evicted tokens are discarded."""

    def merge(self, context: ScoreContext, keep: torch.Tensor, scores: torch.Tensor) -> list[Survivors] | None:
        """Return None: survivors are untouched."""
        return None


ACTIONS: Registry[Callable[[Mapping[str, Value]], Action]] = Registry("action")
ACTIONS.register("drop", lambda args: Drop())


def folded(
    context: ScoreContext, keep: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, mass: bool
) -> list[Survivors]:
    """Return survivors that are weighted means of themselves and of what is folded into them.

    target [G, S] int64 is the kept slot that an evicted slot goes to, -1 for none; weight [G, S] is relative to the
    target's own weight of 1, so that each mean is normalised::

        new = (own + sum_e w_e x_e) / (1 + sum_e w_e)        for keys and for values

    With `mass`, the entry's logits get ln c for the c tokens that it then stands for.
    """
    survivors = []
    for head in range(context.num_lanes):
        chosen = torch.nonzero(keep[head]).flatten()
        moved = torch.nonzero(target[head] >= 0).flatten()
        into, share = target[head, moved], weight[head, moved].double()
        total = torch.ones(keep.shape[1], dtype=torch.float64).index_add(0, into, share)
        parts = []
        for side in (context.keys[head], context.values[head]):
            side = side.double()
            parts.append((side.index_add(0, into, side[moved] * share[:, None]) / total[:, None])[chosen].float())
        log_count = None
        if mass:
            count = torch.ones(keep.shape[1]) if context.log_count is None else context.log_count[head].exp()
            log_count = count.double().index_add(0, into, count.double()[moved]).log()[chosen].float()
        survivors.append(Survivors(parts[0], parts[1], log_count))
    return survivors
