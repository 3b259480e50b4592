"""Scorer: says of every held token how much it deserves to stay. The one class to write for a new eviction method."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch

from kvloom.errors import MethodError
from kvloom.policies.context import ScoreContext
from kvloom.registry import Registry
from kvloom.spec.kv import KVSpec
from kvloom.spec.method import Value


class Scorer(ABC):
    """A published scoring rule. Instances are immutable and shared by requests; state lives in the context.

    Everything else about a method is in its row (`kvloom.spec.method`): what must be gathered for it, when it may act,
    how much it protects, which layers it skips, whether its scores compare between heads. Scores of a method whose row
    says `attention` are weights from 0 to 1: of one query, a maximum over queries or a mean over them (never a sum,
    whose size depends on the number of queries), which refinements may add to and multiply. One whose row says `stacks`
    reads positions and attention alone and counts dimensions from the last.
    """

    @abstractmethod
    def score(self, context: ScoreContext) -> torch.Tensor:
        """Return scores [G, S], higher = keep; values at padding do not matter. Mutates nothing."""

    def protected(self, context: ScoreContext) -> torch.Tensor:
        """Return [G, S] bool: tokens that stay whatever their score, at most as many as the method's row says.

        By default none: many methods protect none.
        """
        return torch.zeros_like(context.valid)

    def refusals(self, kv: KVSpec) -> list[str]:
        """Return every reason why the method cannot run on a model with these lanes; [] when it can."""
        return []


class Selector(ABC):
    """A rule that decides score and budget together (FastGen, DuoAttention): it names the tokens to keep itself.

    It may drop tokens of lanes of any length, and has no scores that others could refine.
    """

    @abstractmethod
    def keep(self, context: ScoreContext) -> torch.Tensor:
        """Return [G, S] bool: the tokens of each lane that stay. Mutates `context.state` at most."""

    def refusals(self, kv: KVSpec) -> list[str]:
        """Return every reason why the method cannot run on a model with these lanes; [] when it can."""
        return []


def checked_scores(context: ScoreContext, scores: torch.Tensor) -> torch.Tensor:
    """Return `scores` if they are one number for each slot; raises `MethodError` that names the method if not."""
    _check_shape(context, scores, "score", "numbers")
    if not bool(torch.isfinite(scores.sum())) and bool((torch.isnan(scores) & context.valid).any()):
        count = int((torch.isnan(scores) & context.valid).sum())
        raise MethodError(
            f"score of {context.method} returned NaN for {count} of {int(context.valid.sum())} tokens of layer "
            f"{context.layer}; it must return a number for every token that is held"
        )
    return scores


def checked_mask(context: ScoreContext, mask: torch.Tensor, what: str) -> torch.Tensor:
    """Return `mask` if it says yes or no for each slot; raises `MethodError` that names the method if not."""
    _check_shape(context, mask, what, "bool")
    if mask.dtype is not torch.bool:
        raise MethodError(f"{what} of {context.method} returned {mask.dtype}; it must return torch.bool")
    return mask


def _check_shape(context: ScoreContext, found: object, what: str, kind: str) -> None:
    wanted = list(context.valid.shape)
    if not isinstance(found, torch.Tensor) or list(found.shape) != wanted:
        got = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise MethodError(
            f"{what} of {context.method} returned {got}; it must return {kind} {wanted}, one for each lane and slot"
        )


Rule = Scorer | Selector

RULES: Registry[Callable[[Mapping[str, Value]], Rule]] = Registry("eviction method")
"""Constructors by the method's name in policy strings; each takes the method's arguments."""
