"""Observation: statistics of one sequence's queries, gathered while the model runs."""

from collections.abc import Sequence

import torch

from kvloom.cache.keptslots import KeptSlots
from kvloom.cache.kvcache import KVCache
from kvloom.policies.context import QueryMoments
from kvloom.policies.keymass import KeyMass, MassKernel, aligned, kernel_can
from kvloom.spec.needs import Needs

TILE = 256
"""Queries at a time for statistics."""


class Observation:
    """Newest queries, attention mass per slot and query moments of one sequence, over its `layers`."""

    def __init__(
        self,
        needs: Needs,
        cache: KVCache,
        scale: float,
        prompt_tokens: int,
        layers: Sequence[int],
        thetas: Sequence[torch.Tensor | None],
    ) -> None:
        """Start without observations; `thetas` are the rope frequencies of all layers of the model."""
        self.needs = needs
        self.cache = cache
        self.scale = scale
        self.prompt_tokens = prompt_tokens
        self.layers = list(layers)
        self.thetas = thetas
        reach = None if needs.near is None else int(needs.near * prompt_tokens)
        self.mass = KeyMass(cache, scale, self.layers, prompt_tokens, reach)
        self._queries: torch.Tensor | None = None  # [L, w, H, D], of all layers
        self._lse: torch.Tensor | None = None  # [L, m, H] of the newest m of them, those of the last step
        self._moments: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = {}  # layer -> count, sum, sum of products

    def first_needed(self, start: int, count: int, goes_on: bool) -> int | None:
        """Return the first of `count` tokens from position `start` on whose query is needed, None for none.

        `goes_on` means that the policy acts after the prompt as well.
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

    def observe(self, sequence: int, q: torch.Tensor, lse: torch.Tensor | None = None) -> None:
        """Take in the rotated queries q [L, n, H, D] of the newest n tokens, whose keys are in the lanes already.

        L counts all layers of the model; `lse` [L, n, H] are the queries' log-sum-exps, if the model has them.
        """
        count = q.shape[1]
        first = int(self.cache.lanes.seen[sequence]) - count
        if self.needs.queries:
            newest = q[:, -self.needs.queries :].clone()
            if self._queries is not None and newest.shape[1] < self.needs.queries:
                newest = torch.cat((self._queries, newest), dim=1)[:, -self.needs.queries :]
            self._queries = newest
            self._lse = None if lse is None else lse[:, -self.needs.queries :].clone()
        skip = max(0, self._first_weighed - first)
        if self.needs.key_mass and skip < count:
            self.mass.add(sequence, q[:, skip:], None if lse is None else lse[:, skip:], first + skip)
        prompt_rows = min(count, self.prompt_tokens - first)
        if self.needs.query_moments and prompt_rows > 0:
            self._add_moments(q[:, :prompt_rows], first)

    def queries(self, layer: int) -> torch.Tensor | None:
        """Return the newest queries [w, H, D] of a layer, None before any was seen."""
        return None if self._queries is None else self._queries[layer]

    def window_mass(self, layers: Sequence[int], sequence: int, window: int) -> torch.Tensor | None:
        """Return the weights of the newest `window` queries, summed, mean over the query group, by the kernels.

        [L * G, S] for the lanes of `layers`, which are alike; shorter lanes are padded in front. None where the kernels
        cannot: then the weights have to be computed.
        """
        if self._queries is None or self._lse is None or not kernel_can(self.cache, sequence):
            return None
        count = min(window, self._queries.shape[1])
        if self._lse.shape[1] < count:
            return None  # since the earlier ones attended, the policy may have acted
        found = MassKernel(self.cache, sequence, self.scale)(layers, self._queries[:, -count:], self._lse[:, -count:])
        held = self.cache.lanes.held[sequence, self.cache.lanes_of(layers)]
        return aligned(found.reshape(len(held), -1), held)

    def _add_moments(self, q: torch.Tensor, first: int) -> None:
        """Add queries q [L, n, H, D] at positions `first` on; each tile ends at a multiple of `TILE` positions."""
        first += (skip := max(0, self.needs.moment_skip - first))
        q = q[:, skip:]
        turns: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # cosines and sines, once for each rope
        positions = torch.arange(first, first + q.shape[1])
        for layer in self.layers:
            theta, plain = self.thetas[layer], q[layer].double()
            if theta is not None:  # rotations are undone by the opposite rotation
                if id(theta) not in turns:
                    angles = positions.double()[:, None] * theta.double()
                    turns[id(theta)] = (angles.cos()[:, None], angles.sin()[:, None])
                cos, sin = turns[id(theta)]
                a, b = plain.chunk(2, dim=-1)
                plain = torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
            if not len(plain):
                continue
            heads = plain.transpose(0, 1)  # [H, n, D]
            total, products = heads.sum(1), heads.transpose(1, 2) @ heads
            if layer in self._moments:
                count, old_total, old_products = self._moments[layer]
                total, products = old_total + total, old_products + products
                self._moments[layer] = (count + len(plain), total, products)
            else:
                self._moments[layer] = (len(plain), total, products)

    def moments(self, layer: int) -> QueryMoments | None:
        """Return mean and covariance of the layer's unrotated prompt queries, None before any was seen."""
        if layer not in self._moments:
            return None
        count, total, products = self._moments[layer]
        mean = total / count
        return QueryMoments(mean, products / count - torch.einsum("hd,he->hde", mean, mean), count)

    def keep(self, kept: KeptSlots) -> None:
        """Follow lanes that keep only some slots."""
        if self.needs.key_mass:
            self.mass.keep(kept)

    def clear(self) -> None:
        """Discard everything: the policy has acted for the last time, or starts again."""
        self._queries = self._lse = None
        self.mass.clear()
        self._moments.clear()

    def fork(self) -> "Observation":
        """Return an independent copy for a forked sequence."""
        other = Observation(self.needs, self.cache, self.scale, self.prompt_tokens, self.layers, self.thetas)
        other._queries, other._lse = self._queries, self._lse
        other.mass = self.mass.fork()
        other._moments = dict(self._moments)
        return other
