"""Observation: what one sequence's queries have shown so far, gathered while the model runs."""

import numpy as np
import torch
from numpy.typing import NDArray

from kvloom.cache.kvcache import KVCache
from kvloom.kernels import reference
from kvloom.policies.context import QueryMoments
from kvloom.policies.needs import Needs

TILE = 256
"""Queries at a time: bounds the weights to H x 256 x S."""


class Observation:
    """Newest queries, attention mass per slot and query moments of one sequence, layer by layer.

    Mass is kept by slot [S] for each lane and follows its lane when that is compacted.
    """

    def __init__(self, needs: Needs, cache: KVCache, scale: float, prompt_tokens: int) -> None:
        self.needs = needs
        self.cache = cache
        self.scale = scale
        self.prompt_tokens = prompt_tokens
        self.queries: dict[int, torch.Tensor] = {}  # layer -> [w, H, D]
        self.mass: dict[int, torch.Tensor] = {}  # lane -> [held] float64
        self.near_mass: dict[int, torch.Tensor] = {}  # the same, from prompt queries close by
        self._moments: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = {}  # layer -> count, sum, sum of products

    def first_needed(self, start: int, count: int, goes_on: bool) -> int | None:
        """Return from which of `count` tokens that begin at position `start` on queries are wanted, None for none.

        `goes_on` says that the policy acts after the prompt as well.
        """
        needs, end = self.needs, start + count
        wanted = []
        if start < self.prompt_tokens or goes_on:
            if needs.queries:
                wanted.append(max(0, count - needs.queries))
            if needs.key_mass:
                wanted.append(max(0, self._first_weighed - start))
        if needs.query_moments and start < self.prompt_tokens:
            wanted.append(0)
        first = min(wanted, default=count)
        return first if start + first < end else None

    @property
    def _first_weighed(self) -> int:
        """Position of the first query that counts for the mass."""
        window = self.needs.mass_window
        return 0 if window is None else max(0, self.prompt_tokens - window)

    def observe(self, layer: int, sequence: int, q: torch.Tensor, theta: torch.Tensor | None) -> None:
        """Take in the rotated queries q [n, H, D] of the newest n tokens, whose keys are in the lanes already.

        `theta` are the layer's rope frequencies.
        """
        first = int(self.cache.lanes.seen[sequence]) - len(q)
        if self.needs.queries:
            known = self.queries.get(layer)
            newest = q[-self.needs.queries :].clone()
            if known is not None and len(newest) < self.needs.queries:
                newest = torch.cat((known, newest))[-self.needs.queries :]
            self.queries[layer] = newest
        skip = max(0, self._first_weighed - first)
        if self.needs.key_mass and skip < len(q):
            self._add_mass(layer, sequence, q[skip:], first + skip)
        prompt_rows = min(len(q), self.prompt_tokens - first)
        if self.needs.query_moments and prompt_rows > 0:
            self._add_moments(layer, q[:prompt_rows], first, theta)

    def _add_mass(self, layer: int, sequence: int, q: torch.Tensor, first: int) -> None:
        """Add the weights of queries q [n, H, D] at positions `first` on, mean over each query group."""
        view = self.cache.layers[layer]
        k, _, held = self.cache.read_layer(layer, sequence)
        log_count = self.cache.read_log_counts(layer, sequence)
        reach = None if self.needs.near is None or first >= self.prompt_tokens else self.needs.near * self.prompt_tokens
        slots = k.shape[1]
        slot = torch.arange(slots)
        there = slot[None, None, :] >= slots - torch.from_numpy(held)[:, None, None]
        mass = torch.zeros(view.num_lanes, slots, dtype=torch.float64)
        near = torch.zeros_like(mass) if reach is not None else None
        for start in range(0, len(q), TILE):
            rows = q[start : start + TILE]
            own = slots - len(q) + start + torch.arange(len(rows))
            seen = (slot[None, None, :] <= own[None, :, None]) & there
            weights = reference.attention_weights(rows, k, seen, self.scale, log_count)
            weights = weights.view(view.num_lanes, -1, len(rows), slots).double().mean(1)
            mass += weights.sum(1)
            if near is not None and reach is not None:
                # only prompt queries, and before anything was evicted: a slot is a position
                close = (own[:, None] - slot[None, :] < int(reach)) & (own[:, None] < self.prompt_tokens)
                near += (weights * close).sum(1)
        self._accumulate(self.mass, view.first, mass, held)
        if near is not None:
            self._accumulate(self.near_mass, view.first, near, held)

    @staticmethod
    def _accumulate(total: dict[int, torch.Tensor], first: int, more: torch.Tensor, held: NDArray[np.int32]) -> None:
        """Add `more` [G, S], aligned at the end, to the totals of the lanes from `first` on."""
        for head, row in enumerate(more):
            count = int(held[head])
            own = row[len(row) - count :]
            before = total.get(first + head)
            if before is not None:
                own = own + torch.nn.functional.pad(before, (0, count - len(before)))
            total[first + head] = own

    def mass_of(self, lane: int, held: int, near: bool = False) -> torch.Tensor:
        """Return the mass [held] of what a lane holds; zeros where no query has counted yet."""
        known = (self.near_mass if near else self.mass).get(lane)
        if known is None:
            return torch.zeros(held, dtype=torch.float64)
        return torch.nn.functional.pad(known, (0, held - len(known)))

    def _add_moments(self, layer: int, q: torch.Tensor, first: int, theta: torch.Tensor | None) -> None:
        skip = max(0, self.needs.moment_skip - first)
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

    def keep(self, lane: int, slots: NDArray[np.int64], held: int) -> None:
        """Follow a lane of `held` tokens that keeps only `slots` (ascending, relative to its first live slot)."""
        chosen = torch.from_numpy(slots)
        for total in (self.mass, self.near_mass):
            if lane in total:
                total[lane] = self.mass_of(lane, held, near=total is self.near_mass)[chosen]

    def clear(self) -> None:
        """Forget everything: the policy has acted for the last time, or starts again."""
        for store in (self.queries, self.mass, self.near_mass, self._moments):
            store.clear()

    def fork(self) -> "Observation":
        """Return an independent copy for a forked sequence."""
        other = Observation(self.needs, self.cache, self.scale, self.prompt_tokens)
        other.queries = dict(self.queries)
        other.mass = dict(self.mass)
        other.near_mass = dict(self.near_mass)
        other._moments = dict(self._moments)
        return other
