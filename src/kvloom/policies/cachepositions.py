"""Positions in the cache: StreamingLLM's position rule, which allows unbounded text (arXiv 2309.17453, section 3.2)."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from kvloom.cache.kvcache import KVCache
from kvloom.cache.survivors import Survivors
from kvloom.kernels import reference


class MovedSinks:
    """Rotates the sinks of one sequence to their positions in the cache.

    Rope is relative, so the window's keys stay at their true positions and only the few sinks move: with `seen` tokens
    processed and `kept` held, index i in the cache is true position i + seen - kept. Sinks are always rotated from an
    unrotated copy, taken before the first eviction, never from a rotated one.
    """

    def __init__(self, cache: KVCache, sinks: int) -> None:
        self.cache = cache
        self.sinks = sinks
        self._unrotated: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> keys, values [G, sinks, D]

    def survivors(
        self, layer: int, row: int, theta: torch.Tensor | None, keep: Mapping[int, NDArray[np.int64]]
    ) -> dict[int, Survivors]:
        """Return the content of the sinks of a layer's lanes when the slots in `keep` are kept.

        Lanes hold equal numbers of tokens, and the sinks are the first of them.
        """
        if theta is None or self.sinks == 0:
            return {}
        view = self.cache.layers[layer]
        known = self._unrotated.get(layer)
        if known is None:
            k, values, _ = self.cache.read_layer(layer, row)
            keys = rotated(k[:, : self.sinks].float(), theta, -torch.arange(self.sinks))
            known = self._unrotated[layer] = (keys, values[:, : self.sinks].clone())
        places = torch.arange(self.sinks) + int(self.cache.lanes.seen[row]) - len(keep[view.first])
        moved = rotated(known[0], theta, places)
        return {view.first + head: Survivors(moved[head], known[1][head]) for head in range(view.num_lanes)}

    def fork(self) -> "MovedSinks":
        """Return an independent copy for a forked sequence."""
        other = MovedSinks(self.cache, self.sinks)
        other._unrotated = dict(self._unrotated)
        return other


def rotated(keys: torch.Tensor, theta: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return keys [G, n, D] rotated by positions [n] (negative: back); angles in float64."""
    angles = positions.double()[:, None] * theta.double()[None, :]
    return reference.apply_rope(keys.transpose(0, 1), angles.cos().float(), angles.sin().float()).transpose(0, 1)
