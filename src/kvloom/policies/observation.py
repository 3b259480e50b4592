"""Observation: what one sequence's queries have shown so far, gathered while the model runs."""

import numpy as np
import torch
from numpy.typing import NDArray

from kvloom.cache.kvcache import KVCache
from kvloom.kernels import reference
from kvloom.policies.context import QueryMoments
from kvloom.policies.needs import Needs

MOMENT_SINKS = 4
"""First positions that are left out of query moments: queries there are outliers (Expected Attention)."""


class Observation:
    """Newest queries, attention mass per slot and query moments of one sequence, layer by layer.

    Mass is kept by slot [S] for each lane and follows its lane when that is compacted.
    """

    def __init__(self, needs: Needs, cache: KVCache, scale: float) -> None:
        self.needs = needs
        self.cache = cache
        self.scale = scale
        self.queries: dict[int, torch.Tensor] = {}  # layer -> [w, H, D]
        self.mass: dict[int, torch.Tensor] = {}  # lane -> [held] float64
        self._moments: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = {}  # layer -> count, sum, sum of products

    def observe(self, layer: int, sequence: int, q: torch.Tensor, prompt_rows: int, theta: torch.Tensor | None) -> None:
        """Take in the rotated queries q [n, H, D] of the newest n tokens, whose keys are in the lanes already.

        The first `prompt_rows` of them belong to the prompt; `theta` are the layer's rope frequencies.
        """
        if self.needs.queries:
            known = self.queries.get(layer)
            newest = q[-self.needs.queries :].clone()
            if known is not None and len(newest) < self.needs.queries:
                newest = torch.cat((known, newest))[-self.needs.queries :]
            self.queries[layer] = newest
        if self.needs.key_mass:
            self._add_mass(layer, sequence, q)
        if self.needs.query_moments and prompt_rows:
            first = int(self.cache.lanes.seen[sequence]) - len(q)
            self._add_moments(layer, q[:prompt_rows], first, theta)

    def _add_mass(self, layer: int, sequence: int, q: torch.Tensor) -> None:
        view = self.cache.layers[layer]
        k, _, held = self.cache.read_layer(layer, sequence)
        mass = reference.key_mass(q, k, torch.from_numpy(held), self.scale).double()
        for head in range(view.num_lanes):
            count = int(held[head])
            total = mass[head, mass.shape[1] - count :]
            before = self.mass.get(view.first + head)
            if before is not None:
                total = total + torch.nn.functional.pad(before, (0, count - len(before)))
            self.mass[view.first + head] = total

    def _add_moments(self, layer: int, q: torch.Tensor, first: int, theta: torch.Tensor | None) -> None:
        skip = max(0, MOMENT_SINKS - first)
        positions = torch.arange(first + skip, first + len(q))
        plain = q[skip:].double()
        if not len(plain):
            return
        if theta is not None:  # rotations are undone by the opposite rotation
            angles = positions.double()[:, None] * theta.double()
            cos, sin = angles.cos()[:, None], -angles.sin()[:, None]
            a, b = plain.chunk(2, dim=-1)
            plain = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        total = plain.sum(0)
        products = torch.einsum("nhd,nhe->hde", plain, plain)
        if layer in self._moments:
            count, old_total, old_products = self._moments[layer]
            self._moments[layer] = (count + len(plain), old_total + total, old_products + products)
        else:
            self._moments[layer] = (len(plain), total, products)

    def moments(self, layer: int) -> QueryMoments | None:
        """Return mean and covariance of the layer's unrotated prompt queries, None before any was seen."""
        if layer not in self._moments:
            return None
        count, total, products = self._moments[layer]
        mean = total / count
        return QueryMoments(mean, products / count - torch.einsum("hd,he->hde", mean, mean), count)

    def keep(self, lane: int, slots: NDArray[np.int64]) -> None:
        """Follow a lane that keeps only `slots` (ascending, relative to its first live slot)."""
        if lane in self.mass:
            self.mass[lane] = self.mass[lane][torch.from_numpy(slots)]

    def fork(self) -> "Observation":
        """Return an independent copy for a forked sequence."""
        other = Observation(self.needs, self.cache, self.scale)
        other.queries = dict(self.queries)
        other.mass = dict(self.mass)
        other._moments = dict(self._moments)
        return other
