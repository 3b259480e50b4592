"""Contexts: the inputs of a method for one sequence, built from its lanes and its record."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from kvloom.cache.kvcache import KVCache
from kvloom.policies.context import Gathered, ScoreContext
from kvloom.policies.modelfacts import ModelFacts
from kvloom.policies.record import Record
from kvloom.spec.needs import Needs


class Contexts:
    """Builds a `ScoreContext` with the inputs that `needs` declares; keys and values are read on first access."""

    def __init__(self, method: str, needs: Needs, cache: KVCache, model: ModelFacts, record: Record) -> None:
        """`method` is the name that errors give the method."""
        self.method = method
        self.needs = needs
        self.cache = cache
        self.model = model
        self.record = record
        self._flags: tuple[list[bool], list[bool]] = ([], [])  # special tokens and punctuation among the tokens

    def of_layer(self, layer: int, row: int, state: dict[str, torch.Tensor] | None = None) -> ScoreContext:
        """Return one layer, [G, S]; a method may change `state`, a copy of its state."""
        needs, record = self.needs, self.record
        common = self._common([layer], row, (self.cache.layers[layer].num_lanes, -1))
        queries, seen = record.observation.queries(layer), common.seen
        special, punctuation = self._kinds(common.positions) if needs.token_kinds else (None, None)
        return replace(
            common,
            read=lambda: self.cache.read_layer(layer, row)[:2],
            gathered=replace(
                common.gathered,
                queries=None if queries is None else queries.float(),
                query_positions=None if queries is None else torch.arange(seen - len(queries), seen),
                query_moments=record.observation.moments(layer) if needs.query_moments else None,
                output_weight=self.model.output_weight(layer) if needs.output_weights else None,
                replay=record.replay_scores.get(layer),
                special=special,
                punctuation=punctuation,
            ),
            log_count=self.cache.read_log_counts(layer, row),
            inverse_frequencies=self.model.inverse_frequencies[layer],
            weigh=lambda window: record.observation.window_mass([layer], row, window),
            state=dict(record.remembered.get(layer, {})) if state is None else state,
        )

    def of_stack(self, layers: Sequence[int], row: int) -> ScoreContext:
        """Return layers of equal shape, [L, G, S], for a rule that `stacks`."""
        shape = (len(layers), self.cache.layers[layers[0]].num_lanes, -1)

        def weigh(window: int) -> torch.Tensor:
            found = self.record.observation.window_mass(layers, row, window)
            if found is None:
                return torch.stack([self.of_layer(layer, row).window_mass(window) for layer in layers])
            return found.view(shape)

        return replace(self._common(layers, row, shape), weigh=weigh)

    def _common(self, layers: Sequence[int], row: int, shape: tuple[int, ...]) -> ScoreContext:
        """Return the inputs that contexts of one layer and of several share, in `shape`."""
        mass, needs = self.record.observation.mass, self.needs

        def read() -> tuple[torch.Tensor, torch.Tensor]:
            keys, values, _ = zip(*(self.cache.read_layer(layer, row) for layer in layers), strict=True)
            return torch.stack(keys), torch.stack(values)

        positions, valid = (x.view(shape) for x in self.places(layers, row))
        return ScoreContext(
            layer=layers[0],
            num_layers=len(self.cache.layers),
            num_query_heads=self.model.num_query_heads,
            scale=self.model.query_scale,
            read=read,
            positions=positions,
            valid=valid,
            seen=int(self.cache.lanes.seen[row]),
            prompt_tokens=self.record.prompt_tokens,
            budget=self.record.budget,
            request_seed=self.record.seed,
            method=self.method,
            needs=needs,
            gathered=Gathered(
                key_mass=mass.of_layers(layers, row).view(shape) if needs.key_mass else None,
                near_mass=mass.of_layers(layers, row, near=True).view(shape) if needs.near is not None else None,
            ),
        )

    def places(self, layers: Sequence[int], row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return positions (-1: padding) and what is there [L * G, S] of lanes that are padded in front."""
        lanes, table = self.cache.lanes_of(layers), self.cache.lanes
        held = table.held[row, lanes]
        slots = int(held.max())
        if int(held.min()) == slots:
            own = table.positions[row][lanes, :slots] if row in table.positions else np.arange(slots)
            positions = np.broadcast_to(own, (len(held), slots)).astype(np.int64)
            return torch.from_numpy(positions), torch.ones(positions.shape, dtype=torch.bool)
        source = np.arange(slots)[None, :] - (slots - held[:, None])  # slots of each lane, negative where it is padded
        places = source
        if row in table.positions:
            places = np.take_along_axis(table.positions[row][lanes], np.maximum(source, 0), 1)
        positions = np.where(source >= 0, places, -1).astype(np.int64)
        return torch.from_numpy(positions), torch.from_numpy(source >= 0)

    def _kinds(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return [G, S] bool twice: special tokens and punctuation among the tokens at `positions` (-1: none)."""
        assert self.model.token_kinds is not None, "refused at admission"
        kinds, seen = self.model.token_kinds(), int(positions.max()) + 1
        tokens = self.record.token_ids[len(self._flags[0]) : seen]
        for store, more in zip(self._flags, kinds.flags(tokens), strict=True):
            store.extend(more.tolist())
        special, punctuation = (torch.tensor(flags[:seen]) for flags in self._flags)
        at = positions.clamp(min=0)
        return special[at] & (positions >= 0), punctuation[at] & (positions >= 0)
