"""KVCache: arena, lanes, prefix index and stores; it owns the K and V of all requests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kvloom.cache.arena import Addresses, Arena
from kvloom.cache.encoder import BlockEncoder
from kvloom.cache.keptslots import KeptSlots
from kvloom.cache.lanes import LaneTable, ragged_arange
from kvloom.cache.memory import ArenaMemory
from kvloom.cache.packing import LanePacking
from kvloom.cache.pool import BlockPool
from kvloom.cache.prefix import PrefixIndex
from kvloom.cache.segments import NATIVE
from kvloom.cache.stores.rows import RowStore
from kvloom.cache.stores.store import Store
from kvloom.cache.survivors import Survivors
from kvloom.errors import UnsupportedError
from kvloom.spec.format import SERVED_STORES
from kvloom.spec.kv import KVSpec

Layout = Literal["rows", "cpu"]
"""Layout of tokens inside a block: row by row for torch, or interleaved for the CPU kernels."""


@dataclass(frozen=True)
class LayerView:
    """The lanes of one layer's K and V: `first .. first + num_lanes - 1`, widths in elements."""

    first: int
    num_lanes: int
    k_width: int
    v_width: int
    window: int | None


class KVCache:
    """The paged cache of one model. Bookkeeping is in `lanes`; only this class and the stores read and write bytes."""

    def __init__(
        self,
        spec: KVSpec,
        num_bytes: int,
        max_sequences: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        extra_stores: Sequence[str] = SERVED_STORES,
        layout: Layout = "rows",
        extra_block_sizes: Sequence[int] = (),
    ) -> None:
        """Set up an empty cache; `layout` is that of tokens inside a block, the same for backend and stores.

        The arena also serves blocks of `extra_block_sizes` bytes, for other holders of its blocks (`StateTable`).
        """
        self.spec = spec
        firsts = [lanes.first for lanes in spec.sets]
        sizes = {spec.lane_block_bytes(lane, name) for lane in firsts for name in (None, *extra_stores)}
        self.arena = Arena(num_bytes, sizes.union(extra_block_sizes))
        self.memory = ArenaMemory(self.arena.num_bytes, torch.device(device))
        self.index = PrefixIndex(spec, self.arena)
        self.pool = BlockPool(self.arena, self.index, self.memory.copy)
        self.lanes = LaneTable(spec, self.pool, max_sequences)
        self.layout = layout
        self.native = self._store(spec.store, dtype)
        self.stores: dict[str, Store] = {NATIVE: self.native, spec.store: self.native}
        for name in extra_stores:
            self.stores[name] = self._store(name, dtype)
        self.encoder = BlockEncoder(self.lanes, self.stores)
        self.packing = LanePacking(self.lanes)
        self.layers = [
            LayerView(spec.lane_offset[i], kv.num_lanes, kv.k_width, kv.v_width, kv.window)
            for i, kv in enumerate(spec.layers)
        ]
        self._beside = {
            (lanes.layer, lanes.role): LayerView(
                lanes.first, lanes.num_lanes, lanes.k_width, lanes.v_width, lanes.window
            )
            for lanes in spec.sets
        }
        self._kinds = sorted({(lanes.k_width, lanes.v_width) for lanes in spec.sets})
        self._kind_of = np.array([self._kinds.index((x.k_width, x.v_width)) for x in spec.lane_set])
        self._windowed = np.array([x.window is not None for x in spec.lane_set])

    def _store(self, name: str, dtype: torch.dtype) -> Store:
        if self.layout == "cpu":
            from kvloom.cache.stores.cpu import CPUStore  # needs the compiled extension

            return CPUStore(name, dtype, self.memory, self.spec.block_size)
        return RowStore(name, dtype, self.memory, self.spec.block_size)

    def lanes_of(self, layers: Sequence[int]) -> slice | NDArray[np.int64]:
        """Return the lanes of some layers, in order, as an index: a slice where they follow each other."""
        views = [self.layers[layer] for layer in layers]
        if all(one.first + one.num_lanes == other.first for one, other in pairwise(views)):
            return slice(views[0].first, views[-1].first + views[-1].num_lanes)
        return np.concatenate([np.arange(view.first, view.first + view.num_lanes) for view in views])

    # ---- reading and writing --------------------------------------------------------------------------------------

    def view(self, layer: int, role: str | None = None) -> LayerView:
        """Return the lanes that a layer reads, or those of `role` that it owns beside them."""
        return self.layers[layer] if role is None else self._beside[layer, role]

    def append(self, layer: int, sequence: int, k: torch.Tensor, v: torch.Tensor, role: str | None = None) -> None:
        """Write the newest tokens k [n, G, Dk], v [n, G, Dv] of a layer; their slots were made by `lanes.extend`.

        `role` names a set that the layer owns beside its own.
        """
        view, size = self.view(layer, role), self.spec.block_size
        lanes = slice(view.first, view.first + view.num_lanes)
        end = self.lanes.begin[sequence, lanes] + self.lanes.held[sequence, lanes]
        slots = (end[None, :] - len(k) + np.arange(len(k))[:, None]).astype(np.int64)  # [n, G]
        rows = np.arange(view.first, view.first + view.num_lanes)[None, :]
        addresses = self.lanes.table[sequence, rows, slots // size]
        self.native.write(addresses.ravel(), (slots % size).ravel(), k.flatten(0, 1), v.flatten(0, 1))

    def read_lane(self, sequence: int, lane: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K [held, Dk] and V [held, Dv] of a lane in slot order, decoded; raises nothing on an empty lane."""
        kv = self.spec.lane_set[lane]
        begin, held = int(self.lanes.begin[sequence, lane]), int(self.lanes.held[sequence, lane])
        first, last = begin // self.spec.block_size, -(-(begin + held) // self.spec.block_size)
        ks, vs = [], []
        for segment in self.lanes.segments.of(sequence, lane):
            low, high = max(first, segment.first), last if segment.last is None else min(last, segment.last)
            if low < high:
                store = self.stores[segment.store]
                k, v = store.read(self.lanes.table[sequence, lane, low:high], kv.k_width, kv.v_width)
                ks.append(k.flatten(0, 1))
                vs.append(v.flatten(0, 1))
        if not ks:
            dtype, device = self.native.dtype, self.memory.device
            return torch.empty(0, kv.k_width, dtype=dtype, device=device), torch.empty(
                0, kv.v_width, dtype=dtype, device=device
            )
        skip = begin - first * self.spec.block_size
        return torch.cat(ks)[skip : skip + held], torch.cat(vs)[skip : skip + held]

    def read_layer(
        self, layer: int, sequence: int, role: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.int32]]:
        """Return K [G, S, Dk], V [G, S, Dv] and held [G]; shorter lanes are padded with zeros at the *front*.

        So slot order ends aligned: the newest token of every lane is at S - 1. `role` as in `append`.
        """
        view = self.view(layer, role)
        lanes = range(view.first, view.first + view.num_lanes)
        held = self.lanes.held[sequence, view.first : view.first + view.num_lanes].copy()
        uniform = bool((held == held[0]).all()) and len(set(self.lanes.begin[sequence, lanes].tolist())) == 1
        if uniform and not self.lanes.segments.any_encoded(sequence):
            begin, size = int(self.lanes.begin[sequence, view.first]), self.spec.block_size
            first, last = begin // size, -(-(begin + int(held[0])) // size)
            addresses = self.lanes.table[sequence, view.first : view.first + view.num_lanes, first:last]
            k, v = self.native.read(addresses.ravel(), view.k_width, view.v_width)
            span = slice(begin - first * size, begin - first * size + int(held[0]))
            slots = (last - first) * size
            k = k.reshape(view.num_lanes, slots, view.k_width)[:, span]
            v = v.reshape(view.num_lanes, slots, view.v_width)[:, span]
            return k, v, held
        longest = int(held.max())
        parts = [self.read_lane(sequence, lane) for lane in lanes]
        ks = [torch.nn.functional.pad(k, (0, 0, longest - len(k), 0)) for k, _ in parts]
        vs = [torch.nn.functional.pad(v, (0, 0, longest - len(v), 0)) for _, v in parts]
        return torch.stack(ks), torch.stack(vs), held

    def read_log_counts(self, layer: int, sequence: int) -> torch.Tensor | None:
        """Return the terms added to a layer's scores, [G, S] by slot aligned as in `read_layer`; None for none."""
        if sequence not in self.lanes.log_counts:
            return None
        view = self.layers[layer]
        held = self.lanes.held[sequence, view.first : view.first + view.num_lanes]
        out = torch.zeros(view.num_lanes, int(held.max()))
        for head in range(view.num_lanes):
            begin, count = int(self.lanes.begin[sequence, view.first + head]), int(held[head])
            values = self.lanes.log_counts[sequence][view.first + head, begin : begin + count]
            out[head, out.shape[1] - count :] = torch.from_numpy(values)
        return out.to(self.memory.device)

    # ---- eviction -------------------------------------------------------------------------------------------------

    def compact(
        self,
        sequence: int,
        keep: Mapping[int, NDArray[np.int64]],
        survivors: Mapping[int, Survivors] | None = None,
    ) -> bool:
        """Keep only the given live slots (ascending) of each lane in `keep`; the blocks left over are free at once.

        Lanes in `survivors` get that content at their start instead of what the kept slots held (merging, moved sinks).
        Shared blocks are left unchanged for their other owners. False, and no change, when the few fresh blocks that
        replace shared ones cannot be allocated now.
        """
        if not keep:
            return True
        table, changed = self.lanes, survivors or {}
        kept = keep
        if not isinstance(kept, KeptSlots):
            kept = KeptSlots.of(keep, table.begin[sequence], table.held[sequence], self.spec.block_size)
        self._check_compactable(sequence, kept.lanes)
        unchanged = kept.unchanged
        if changed:
            unchanged = np.where(np.isin(kept.lanes, list(changed)), 0, unchanged).astype(np.int32)
        repacked = self.packing.repack(sequence, kept.lanes, kept.counts, unchanged)
        if repacked is None:
            return False
        before, spare = repacked
        self._move(sequence, before, kept, unchanged, changed)
        self.packing.pack_slots(sequence, kept)
        for lane, new in changed.items():
            if new.log_count is not None:
                self.packing.set_log_counts(sequence, lane, new.log_count.float().numpy())
        self.arena.release(spare)
        return True

    def _move(
        self,
        sequence: int,
        before: Addresses,
        kept: KeptSlots,
        unchanged: NDArray[np.int32],
        changed: Mapping[int, Survivors],
    ) -> None:
        """Move kept tokens to their slots; `before` [n, C] are the blocks of the lanes before.

        The first `unchanged` [n] blocks of a lane are left out; what `changed` names is written instead of moved.
        """
        size, lanes = self.spec.block_size, kept.lanes
        after = self.lanes.table[sequence, lanes]
        written = np.array([len(changed[lane].keys) if lane in changed else 0 for lane in lanes.tolist()], np.int32)
        first = unchanged * size
        source, target = kept.moves_from(first, written) if changed else kept.moves
        number = np.maximum(kept.counts - np.maximum(first, written), 0)
        for kind in np.unique(self._kind_of[lanes]).tolist():
            widths, chosen = self._kinds[kind], self._kind_of[lanes] == kind
            runs = np.concatenate(([0], np.cumsum(number[chosen])))
            if runs[-1]:
                origin, goal = (
                    _addressed(table[chosen], slots[chosen], size)
                    for table, slots in ((before, source), (after, target))
                )
                self.native.move(origin, goal, runs, *widths)
            parts = [changed[lane] for lane in lanes[chosen].tolist() if lane in changed]
            if parts:
                place = ragged_arange(written[chosen]).astype(np.int64)
                addresses = after[np.repeat(np.flatnonzero(chosen), written[chosen]), place // size]
                k, v = torch.cat([x.keys for x in parts]), torch.cat([x.values for x in parts])
                self.native.write(addresses, place % size, k.to(self.native.dtype), v.to(self.native.dtype))

    def _check_compactable(self, sequence: int, lanes: NDArray[np.int64]) -> None:
        """Raise unless all of `lanes` may lose tokens."""
        segments, reasons = self.lanes.segments, []
        for lane in lanes[self._windowed[lanes]].tolist():
            reasons.append(f"lane {lane} has a sliding window, which alone frees its blocks")
        if segments.any_encoded(sequence):
            for lane in lanes.tolist():
                if not segments.is_native(sequence, lane):
                    reasons.append(f"lane {lane} has encoded blocks; select before encoding")
        if reasons:
            raise UnsupportedError("compaction", reasons)

    # ---- accounting -----------------------------------------------------------------------------------------------

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the blocks that running sequences hold, each shared block once."""
        return self._bytes_of(list(self.lanes.held_blocks()))

    def bytes_by_store(self) -> dict[str, int]:
        """Return `bytes_in_use` by the store that the blocks are in, the native one first."""
        encoded: dict[str, list[Addresses]] = {}
        for sequence in self.lanes.open_sequences:
            for lane, segment in self.lanes.segments.encoded(sequence):
                addresses = self.lanes.table[sequence, lane, segment.first : segment.last]
                encoded.setdefault(segment.store, []).append(addresses)
        found = {store: self._bytes_of(parts) for store, parts in encoded.items()}
        return {self.spec.store: self.bytes_in_use - sum(found.values()), **found}

    def _bytes_of(self, parts: list[Addresses]) -> int:
        """Return the bytes of all blocks at the addresses, each once."""
        return int(self.arena.block_bytes_at(np.unique(np.concatenate(parts))).sum()) if parts else 0

    def check_invariants(self) -> None:
        """Raise AssertionError unless arena, lanes and prefix index agree in every count."""
        self.pool.check_invariants()
        self.lanes.check_invariants()


def _addressed(
    table: Addresses, slots: NDArray[np.bool_], block_size: int
) -> tuple[Addresses, NDArray[np.int32]]:
    """Return block and slot in it of each of the `slots` [n, W] of lanes whose blocks are `table` [n, C]."""
    columns = slots.shape[1] // block_size
    blocks = np.repeat(table[:, :columns], block_size, axis=1)
    within = np.tile(np.arange(block_size, dtype=np.int32), (len(table), columns))
    return blocks[slots], within[slots]
