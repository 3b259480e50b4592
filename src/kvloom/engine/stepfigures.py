"""Figures of one step of the engine: tokens, seconds and bytes."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kvloom.cache.kvcache import KVCache
from kvloom.engine.work import Work


class Traffic:
    """Bytes of one step, counted after the model has run and before policies evict.

    `read_bytes` are those of K and V that the step's sequences hold, encoded blocks as they are stored: attention read
    each of them at least once. `returned_bytes` are those that policies returned to the arena.
    """

    def __init__(self, cache: KVCache, work: Iterable[Work]) -> None:
        rows = [item.sequence.row for item in work if item.sequence.row is not None]
        held = cache.lanes.held[rows].sum(axis=0)
        encoded = sum(cache.lanes.segments.extra_bytes(row, cache.spec) for row in rows)
        self.read_bytes = int(np.dot(held, np.asarray(cache.spec.lane_token_bytes))) + encoded
        self.returned_bytes = 0
        self._used = cache.arena.used_bytes

    def returned(self, cache: KVCache) -> None:
        """Record the bytes that were in use before and are free now; mutates self."""
        self.returned_bytes = max(0, self._used - cache.arena.used_bytes)


@dataclass(frozen=True)
class StepFigures:
    """Tokens put through the model, sequences that got a token, seconds, and the bytes; None before the first step."""

    tokens: int
    sampled: int
    seconds: float
    traffic: Traffic | None
