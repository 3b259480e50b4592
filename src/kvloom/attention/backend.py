"""AttentionBackend: the interface of attention over lanes that the reference decoder uses."""

from dataclasses import dataclass
from typing import Protocol

import torch

from kvloom.attention.batch import AttentionBatch
from kvloom.cache.kvcache import KVCache


@dataclass(frozen=True)
class ScoreTerms:
    """Terms that some families add to scaled scores: see `kernels.reference.attention`.

    `cap` bounds them; `slopes` [H] times the distance are subtracted; `sinks` [H] join the denominator. Positions in
    different chunks of `chunk` do not see each other.
    """

    cap: float | None = None
    slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    chunk: int | None = None


NO_TERMS = ScoreTerms()
"""Scores without further terms."""


class AttentionBackend(Protocol):
    """Appends new K and V to lanes and attends over them."""

    name: str

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, batch: AttentionBatch, cache: KVCache) -> None:
        """Write k [T, G, Dk] and v [T, G, Dv] of the batch into the lanes of `layer`; mutates the arena."""

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        scale: float,
        batch: AttentionBatch,
        cache: KVCache,
        terms: ScoreTerms = NO_TERMS,
    ) -> torch.Tensor:
        """Return attention [T, H, Dv] of q [T, H, Dk] over the lanes of `layer`, the batch's own tokens included."""
