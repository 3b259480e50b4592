"""KeyMass: attention of one sequence's queries to each slot, summed, without the n x n matrix."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvloom.cache.keptslots import KeptSlots
from kvloom.cache.kvcache import KVCache
from kvloom.kernels import reference

TILE = 256
"""Queries at a time: bounds the weights to H x 256 x S."""

Masses = NDArray[np.float64]
"""Sums by lane and slot [R, capacity]; zero beyond what a lane holds."""


def kernel_can(cache: KVCache, sequence: int) -> bool:
    """Return whether `MassKernel` can read the lanes of `sequence`: it does not support merged tokens."""
    return cache.layout == "cpu" and sequence not in cache.lanes.log_counts


class MassKernel:
    """One pass of the CPU kernels over the keys of one sequence, for the queries of its newest tokens."""

    def __init__(self, cache: KVCache, sequence: int, scale: float) -> None:
        from kvloom.kernels import cpu  # needs the compiled extension

        table = cache.lanes
        self._cpu = cpu
        self._lanes = cpu.Lanes(
            cache.memory.bytes,
            table.table,
            table.begin,
            table.begin + table.held,
            cache.spec.block_size,
            cache.spec.store,
        )
        if table.segments.any_encoded(sequence):
            self._lanes.set_segments(*table.segments.arrays(), table.segments.store_names)
        self._views = cache.layers
        self._scale = scale
        self._row = np.array([sequence], np.int32)
        self._low = cache.native.dtype == torch.bfloat16  # as the model attends, so that weights sum to 1

    def __call__(
        self, layers: Sequence[int], q: torch.Tensor, lse: torch.Tensor, window: int = 0
    ) -> NDArray[np.float32]:
        """Return the weights of q [L, n, H, D], with lse [L, n, H], summed over n, mean over each group.

        L counts all layers of the model; the result is that of `layers`, which are alike, [len(layers), G, slots].
        Slots count from the start of each lane; a `window` counts only that many slots up to a query's own.
        """
        count, heads = q.shape[1:3]
        shapes = {}
        for layer in layers:
            view = self._views[layer]
            shapes[layer] = self._cpu.LayerShape(heads, view.num_lanes, view.k_width, view.v_width, view.first, window)
        bounds = np.array([0, count], np.int32)
        found = self._cpu.key_mass_of_layers(
            self._lanes, shapes, bounds, self._row, q, lse, self._scale, low_precision=self._low
        )
        mass: NDArray[np.float32] = found[:, 0].numpy()
        mass *= np.float32(mass.shape[1] / heads)
        return mass


def aligned(own: NDArray[np.floating], held: NDArray[np.int32]) -> torch.Tensor:
    """Return values by slot [G, capacity] of lanes that hold `held` [G] as [G, S], shorter lanes padded in front."""
    slots = int(held.max())
    if int(held.min()) == slots:
        return torch.from_numpy(own[:, :slots].copy())
    source = np.arange(slots)[None, :] - (slots - held[:, None])
    return torch.from_numpy(np.where(source >= 0, np.take_along_axis(own, np.maximum(source, 0), 1), 0.0))


class KeyMass:
    """Softmax weights summed over queries, mean over each query group, for the lanes of `layers`.

    Lanes have no window, so they begin at slot 0. With a `reach` also the part that came from prompt queries closer
    than that many tokens.
    """

    def __init__(
        self, cache: KVCache, scale: float, layers: Sequence[int], prompt_tokens: int, reach: int | None
    ) -> None:
        self.cache = cache
        self.scale = scale
        self.layers = layers
        self.prompt_tokens = prompt_tokens
        self.reach = reach
        self._all: Masses = np.zeros((0, 0))
        self._near: Masses = np.zeros((0, 0))

    def add(self, sequence: int, q: torch.Tensor, lse: torch.Tensor | None, first: int) -> None:
        """Add the weights of the newest queries q [L, n, H, D], at positions `first` on, over what is held.

        With `lse` [L, n, H] and lanes that the CPU kernels read, one pass over the keys; else by the definition.
        """
        slots = int(self.cache.lanes.held[sequence].max())
        self._all = self._widened(self._all, slots)
        near = self.reach is not None and first < self.prompt_tokens
        if near:
            self._near = self._widened(self._near, slots)
        if lse is not None and kernel_can(self.cache, sequence):
            self._add_by_kernel(sequence, q, lse, self._all, 0)
            if near and self.reach:
                self._add_by_kernel(sequence, q, lse, self._near, self.reach)
            return
        for layer in self.layers:
            self._add_by_definition(sequence, layer, q[layer], first)

    def _widened(self, sums: Masses, slots: int) -> Masses:
        """Return `sums` with room for `slots` slots in every lane of the cache."""
        lanes = self.cache.spec.num_lanes
        if sums.shape[1] >= slots:
            return sums
        wider = np.zeros((lanes, max(slots + 256, 2 * sums.shape[1])))
        wider[: len(sums), : sums.shape[1]] = sums
        return wider

    def _add_by_kernel(self, sequence: int, q: torch.Tensor, lse: torch.Tensor, sums: Masses, window: int) -> None:
        kernel = MassKernel(self.cache, sequence, self.scale)
        alike: dict[tuple[int, int, int], list[int]] = {}
        for layer in self.layers:
            view = self.cache.layers[layer]
            alike.setdefault((view.num_lanes, view.k_width, view.v_width), []).append(layer)
        for layers in alike.values():
            found = kernel(layers, q, lse, window)
            sums[self.cache.lanes_of(layers), : found.shape[2]] += found.reshape(-1, found.shape[2])

    def _add_by_definition(self, sequence: int, layer: int, q: torch.Tensor, first: int) -> None:
        view = self.cache.layers[layer]
        k, _, held = self.cache.read_layer(layer, sequence)
        log_count = self.cache.read_log_counts(layer, sequence)
        slots = k.shape[1]
        slot = torch.arange(slots)
        there = slot[None, None, :] >= slots - torch.from_numpy(held)[:, None, None]
        for start in range(0, len(q), TILE):
            rows = q[start : start + TILE]
            own = slots - len(q) + start + torch.arange(len(rows))
            seen = (slot[None, None, :] <= own[None, :, None]) & there
            weights = reference.attention_weights(rows, k, seen, self.scale, log_count)
            weights = weights.view(view.num_lanes, -1, len(rows), slots).double().mean(1)
            found = [(self._all, weights.sum(1))]
            if self.reach is not None and first < self.prompt_tokens:
                # only prompt queries, and before anything was evicted: a slot is a position
                close = (own[:, None] - slot[None, :] < self.reach) & (own[:, None] < self.prompt_tokens)
                found.append((self._near, (weights * close).sum(1)))
            for sums, more in found:
                for head, count in enumerate(held.tolist()):
                    sums[view.first + head, :count] += more[head, slots - count :].numpy()

    def of_layers(self, layers: Sequence[int], sequence: int, near: bool = False) -> torch.Tensor:
        """Return the mass [L * G, S] of what lanes hold, shorter lanes padded in front; 0 where none counted."""
        lanes, sums = self.cache.lanes_of(layers), self._near if near else self._all
        held = self.cache.lanes.held[sequence, lanes]
        return aligned(self._widened(sums, int(held.max()))[lanes], held)

    def keep(self, kept: KeptSlots) -> None:
        """Follow lanes that keep only some slots."""
        self._all = self._widened(self._all, kept.width)
        if len(self._near):
            self._near = self._widened(self._near, kept.width)
        left = np.arange(kept.width, dtype=np.int32) >= kept.counts[:, None]
        for sums in (self._all, self._near):
            if len(sums):
                own = sums[kept.lanes, : kept.width]
                kept.pack(own)
                own[left] = 0.0
                sums[kept.lanes, : kept.width] = own

    def clear(self) -> None:
        """Discard everything."""
        self._all = self._near = np.zeros((0, 0))

    def fork(self) -> "KeyMass":
        """Return an independent copy."""
        other = KeyMass(self.cache, self.scale, self.layers, self.prompt_tokens, self.reach)
        other._all, other._near = self._all.copy(), self._near.copy()
        return other
