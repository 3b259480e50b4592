"""KVCache: arena, lanes, prefix index and stores as one thing that owns the K and V of all requests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kvloom.cache.arena import Addresses, Arena
from kvloom.cache.lanes import LaneTable, ragged_arange
from kvloom.cache.memory import ArenaMemory
from kvloom.cache.pool import BlockPool
from kvloom.cache.prefix import PrefixChain, PrefixIndex
from kvloom.cache.segments import NATIVE
from kvloom.cache.stores.int8 import Int8Store
from kvloom.cache.stores.native import NativeStore
from kvloom.cache.stores.store import Store
from kvloom.cache.survivors import Survivors
from kvloom.errors import InvalidInputError, UnsupportedError
from kvloom.spec.kv import KVSpec
from kvloom.spec.store import STORES

Layout = Literal["rows", "cpu"]
"""How tokens lie inside a block: row by row for torch, or interleaved for the CPU kernels."""


@dataclass(frozen=True)
class LayerView:
    """Where one layer's K and V live: lanes `first .. first + num_lanes - 1`, widths in elements."""

    first: int
    num_lanes: int
    k_width: int
    v_width: int
    window: int | None


class KVCache:
    """The paged cache of one model. Bookkeeping is in `lanes`; bytes are touched only here and in the stores."""

    def __init__(
        self,
        spec: KVSpec,
        num_bytes: int,
        max_sequences: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        extra_stores: Sequence[str] = ("int8",),
        layout: Layout = "rows",
    ) -> None:
        """Set up an empty cache; `layout` is how tokens lie inside a block, which backend and stores must agree on."""
        self.spec = spec
        sizes = {spec.layer_block_bytes(layer) for layer in range(len(spec.layers))}
        sizes |= {spec.layer_block_bytes(layer, name) for layer in range(len(spec.layers)) for name in extra_stores}
        self.arena = Arena(num_bytes, sizes)
        self.memory = ArenaMemory(self.arena.num_bytes, torch.device(device))
        self.index = PrefixIndex(spec, self.arena)
        self.pool = BlockPool(self.arena, self.index, self.memory.copy)
        self.lanes = LaneTable(spec, self.pool, max_sequences)
        self.layout = layout
        self.native = self._store(spec.store, dtype)
        self.stores: dict[str, Store] = {NATIVE: self.native, spec.store: self.native}
        for name in extra_stores:
            self.stores[name] = self._store(name, dtype)
        self.layers = [
            LayerView(spec.lane_offset[i], kv.num_lanes, kv.k_width, kv.v_width, kv.window)
            for i, kv in enumerate(spec.layers)
        ]

    def _store(self, name: str, dtype: torch.dtype) -> Store:
        if self.layout == "cpu":
            from kvloom.cache.stores.cpu import CPUStore  # needs the compiled extension

            return CPUStore(name, dtype, self.memory, self.spec.block_size)
        if name == "int8":
            return Int8Store(dtype, self.memory, self.spec.block_size)
        return NativeStore(dtype, self.memory, self.spec.block_size)

    # ---- reading and writing --------------------------------------------------------------------------------------

    def append(self, layer: int, sequence: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the newest tokens k [n, G, Dk], v [n, G, Dv] of a layer; their slots were made by `lanes.extend`."""
        view, size = self.layers[layer], self.spec.block_size
        lanes = slice(view.first, view.first + view.num_lanes)
        end = self.lanes.begin[sequence, lanes] + self.lanes.held[sequence, lanes]
        slots = (end[None, :] - len(k) + np.arange(len(k))[:, None]).astype(np.int64)  # [n, G]
        rows = np.arange(view.first, view.first + view.num_lanes)[None, :]
        addresses = self.lanes.table[sequence, rows, slots // size]
        self.native.write(addresses.ravel(), (slots % size).ravel(), k.flatten(0, 1), v.flatten(0, 1))

    def read_lane(self, sequence: int, lane: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K [held, Dk] and V [held, Dv] of a lane in slot order, decoded; raises nothing on an empty lane."""
        kv = self.spec.layers[self.spec.lane_layer[lane]]
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

    def read_layer(self, layer: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.int32]]:
        """Return K [G, S, Dk], V [G, S, Dv] and held [G]; shorter lanes are padded with zeros at the *front*.

        So slot order ends aligned: the newest token of every lane is at S - 1.
        """
        view = self.layers[layer]
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
        """Return what is added to a layer's logits, [G, S] by slot aligned as in `read_layer`; None for nothing."""
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

    # ---- forgetting -----------------------------------------------------------------------------------------------

    def compact(
        self,
        sequence: int,
        keep: Mapping[int, NDArray[np.int64]],
        survivors: Mapping[int, Survivors] | None = None,
    ) -> bool:
        """Keep only the given live slots (ascending) of each lane in `keep`; the blocks left over are free at once.

        Lanes in `survivors` get that content instead of what the kept slots held (merging, moved sinks). Shared blocks
        are left as they are for their other owners. False, and no change, when the few fresh blocks that replace
        shared ones cannot be had now.
        """
        lanes = np.array(sorted(keep), np.int64)
        if not len(lanes):
            return True
        self._check_compactable(sequence, keep)
        size = self.spec.block_size
        kept = np.array([len(keep[lane]) for lane in lanes], np.int32)
        changed = survivors or {}
        unchanged = np.array([0 if lane in changed else leading_run(keep[lane]) // size for lane in lanes], np.int32)
        repacked = self.lanes.repack(sequence, lanes, kept, unchanged)
        if repacked is None:
            return False
        before, spare = repacked
        for layer in sorted({self.spec.lane_layer[lane] for lane in lanes}):
            kv = self.spec.layers[layer]
            chosen = [i for i, lane in enumerate(lanes) if self.spec.lane_layer[lane] == layer]
            sources = [keep[int(lanes[i])][unchanged[i] * size :] for i in chosen]
            counts = np.array([len(s) for s in sources], np.int32)
            rows = np.repeat(np.array(chosen), counts)
            slots = np.concatenate(sources)
            k, v = self._gather(before[rows, slots // size], slots % size, kv.k_width, kv.v_width)
            for i, start in zip(chosen, np.cumsum(counts) - counts, strict=True):
                new = changed.get(int(lanes[i]))
                if new is not None:
                    k[start : start + len(new.keys)], v[start : start + len(new.keys)] = new.keys, new.values
            target = np.repeat(unchanged[chosen].astype(np.int64) * size, counts) + ragged_arange(counts)
            addresses = self.lanes.table[sequence, lanes[rows], target // size]
            self.native.write(addresses, target % size, k, v)
        for lane in lanes.tolist():
            self.lanes.keep_slots(sequence, lane, keep[lane])
            new = changed.get(lane)
            if new is not None and new.log_count is not None:
                self.lanes.set_log_counts(sequence, lane, new.log_count.float().numpy())
        self.arena.release(spare)
        return True

    def _gather(
        self, addresses: Addresses, slots: NDArray[np.int64], k_width: int, v_width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K [N, Dk] and V [N, Dv] of single tokens of native blocks."""
        blocks, inverse = np.unique(addresses, return_inverse=True)
        k, v = self.native.read(blocks, k_width, v_width)
        at, slot = torch.from_numpy(inverse), torch.from_numpy(slots)
        return k[at, slot], v[at, slot]

    def _check_compactable(self, sequence: int, keep: Mapping[int, NDArray[np.int64]]) -> None:
        reasons = []
        for lane, slots in keep.items():
            begin, held = int(self.lanes.begin[sequence, lane]), int(self.lanes.held[sequence, lane])
            if self.spec.layers[self.spec.lane_layer[lane]].window is not None:
                reasons.append(f"lane {lane} is windowed and forgets by its window")
            if not self.lanes.segments.is_native(sequence, lane):
                reasons.append(f"lane {lane} has encoded blocks; select before encoding")
            if len(slots) and (slots[0] < begin or slots[-1] >= begin + held or (np.diff(slots) <= 0).any()):
                raise InvalidInputError(
                    f"lane {lane} holds slots {begin}..{begin + held - 1}; keep must be ascending slots among them"
                )
        if reasons:
            raise UnsupportedError("compaction", reasons)

    def encode(self, sequence: int, lanes: Sequence[int], store: str, first: int, last: int) -> bool:
        """Encode the full native blocks in columns `first .. last - 1` of `lanes` in `store`, once and for all.

        The 16-bit blocks are released (other owners keep theirs). False, and no change, when the new blocks cannot
        be had now.
        """
        spec = STORES.get(store)
        size = self.spec.block_size
        needs: dict[int, int] = {}
        if store not in self.stores or len(set(lanes)) != len(lanes):
            raise InvalidInputError(
                f"encode takes each lane once and a store among {sorted(filter(None, self.stores))}; "
                f"got {store!r} for lanes {list(lanes)}"
            )
        for lane in lanes:
            kv = self.spec.layers[self.spec.lane_layer[lane]]
            reasons = self.stores[store].unsupported(kv.k_width, kv.v_width)
            if reasons:
                raise UnsupportedError("encoding", reasons)
            end = int(self.lanes.begin[sequence, lane] + self.lanes.held[sequence, lane])
            if self.lanes.begin[sequence, lane] > first * size or last * size > end or first >= last:
                raise InvalidInputError(f"columns {first}..{last - 1} of lane {lane} are not all full blocks")
            if kv.window is not None:
                raise UnsupportedError("encoding", [f"lane {lane} is windowed; small windows stay in 16 bit"])
            for segment in self.lanes.segments.of(sequence, lane):
                if segment.store and segment.first < last and first < (segment.last or last):
                    raise UnsupportedError(
                        "encoding", [f"lane {lane} has encoded blocks there; a block is encoded once"]
                    )
            cost = self.spec.layer_block_bytes(self.spec.lane_layer[lane], spec.name)
            needs[cost] = needs.get(cost, 0) + last - first
        if not self.pool.ensure(needs):
            return False
        for lane in lanes:
            kv = self.spec.layers[self.spec.lane_layer[lane]]
            cost = self.spec.layer_block_bytes(self.spec.lane_layer[lane], spec.name)
            fresh = self.arena.allocate(last - first, cost)
            assert fresh is not None, "the pool promised these blocks"
            old = self.lanes.table[sequence, lane, first:last].copy()
            k, v = self.native.read(old, kv.k_width, kv.v_width)
            addresses = np.repeat(fresh, size)
            slots = np.tile(np.arange(size, dtype=np.int64), last - first)
            self.stores[store].write(addresses, slots, k.flatten(0, 1), v.flatten(0, 1))
            self.lanes.table[sequence, lane, first:last] = fresh
            self.lanes.segments.encode(sequence, lane, store, first, last)
            self.arena.release(old)
        return True

    # ---- accounting -----------------------------------------------------------------------------------------------

    def chain(self, salt: str = "") -> PrefixChain:
        """Return the digests of an empty sequence; requests with another `salt` share nothing with it."""
        return PrefixChain(salt)

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the blocks that running sequences hold, each shared block once."""
        rows = list(self.lanes.held_blocks())
        if not rows:
            return 0
        total = 0
        cells = np.unique(np.concatenate(rows))
        for count, size in zip(*self._sizes(cells), strict=True):
            total += count * size
        return total

    def _sizes(self, addresses: Addresses) -> tuple[list[int], list[int]]:
        sizes, counts = np.unique(self.arena.block_bytes_at(addresses), return_counts=True)
        return counts.tolist(), sizes.tolist()

    def check_invariants(self) -> None:
        """Raise AssertionError unless arena, lanes and prefix index agree in every count."""
        self.pool.check_invariants()
        self.lanes.check_invariants()


def leading_run(slots: NDArray[np.int64]) -> int:
    """Return how many of the ascending `slots` are 0, 1, 2, ... from the start."""
    return int(np.cumprod(slots == np.arange(len(slots))).sum())
