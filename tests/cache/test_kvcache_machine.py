"""Every operation of the cache in any order, beside lists that remember what each lane must hold.

Lanes 0 and 1 are narrow and unbounded, lane 2 is wide with a window of 6, lane 3 has K only, in blocks that do not
divide a slab; with int8 there are five block sizes. K and V of a token are a function of the lane and of all tokens
up to it, as in a model, so a wrongly shared, moved, copied or reused block shows in some lane's content.
"""

import functools
import hashlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvloom.cache.kvcache import KVCache
from kvloom.cache.laneprefixes import LanePrefixes
from kvloom.cache.prefix import PrefixChain
from kvloom.errors import InvalidInputError, UnsupportedError
from kvloom.spec.kv import KVSpec, LayerKV
from kvloom.spec.store import GRANULE_BYTES, SLAB_BYTES

P, WINDOW, LONGEST_CHUNK, ROWS = 4, 6, 9, 5
SPEC = KVSpec((LayerKV(2, 1024, 1024), LayerKV(1, 2048, 2048, WINDOW), LayerKV(1, 3072, 0)), P, "fp32")
WIDTHS = [(1024, 1024), (1024, 1024), (2048, 2048), (3072, 0)]
NATIVE_BYTES = [32768, 32768, 65536, 49152]
INT8_BYTES = [8320, 8320, 0, 12416]
UNBOUNDED = [0, 1, 3]

Entry = tuple[np.ndarray, np.ndarray, int]
"""K, V and position of one token in one lane."""


@functools.lru_cache(maxsize=20000)
def content(tokens: tuple[int, ...], lane: int) -> tuple[np.ndarray, np.ndarray]:
    """K and V of the last of `tokens` in a lane."""
    seed = int.from_bytes(hashlib.sha256(repr((tokens, lane)).encode()).digest()[:8], "little")
    k_width, v_width = WIDTHS[lane]
    row = np.random.default_rng(seed).standard_normal(k_width + v_width, np.float32)
    return row[:k_width], row[k_width:]


def through_int8(x: np.ndarray) -> np.ndarray:
    """What a vector is after one trip through 127 symmetric steps."""
    if not len(x):
        return x
    scale = np.abs(x).max() / np.float32(127)
    rounded: np.ndarray = np.rint(x / scale) * scale
    return rounded.astype(np.float32)


@dataclass
class Twin:
    """What one sequence must hold."""

    tokens: list[int]
    chain: PrefixChain
    lanes: list[list[Entry]] = field(default_factory=lambda: [[], [], [], []])
    encoded: list[set[int]] = field(default_factory=lambda: [set(), set(), set(), set()])
    published: int = 0
    needed_from: int = 0  # the windowed lane must reach back to here
    lossy_until: int = -1  # tokens there were at the last loss

    def grow(self, tokens: list[int]) -> None:
        self.needed_from = max(0, len(self.tokens) - (WINDOW - 1))
        for token in tokens:
            self.tokens.append(token)
            for lane in range(4):
                self.lanes[lane].append((*content(tuple(self.tokens), lane), len(self.tokens) - 1))

    def shrink(self, number: int) -> None:
        """Be as if the last `number` tokens had never been appended."""
        length = len(self.tokens) - number
        del self.tokens[length:]
        for lane, entries in enumerate(self.lanes):
            self.lanes[lane] = [entry for entry in entries if entry[2] < length]
        del self.chain.digests[length // P :]
        self.published = min(self.published, length // P)
        self.needed_from = max(0, length - (WINDOW - 1))

    def fork(self) -> "Twin":
        chain = PrefixChain(self.chain.salt, list(self.chain.digests))
        return Twin(
            list(self.tokens),
            chain,
            [list(entries) for entries in self.lanes],
            [set(columns) for columns in self.encoded],
            self.published,
            self.needed_from,
            self.lossy_until,
        )


class CacheMachine(RuleBasedStateMachine):
    """Rules are the operations of a `KVCache`; invariants compare it with the twins."""

    @initialize(num_slabs=st.sampled_from([3, 5, 8]))
    def build(self, num_slabs: int) -> None:
        self.num_slabs = num_slabs
        self.cache = KVCache(SPEC, num_slabs * SLAB_BYTES, ROWS, torch.float32)
        self.twins: dict[int, Twin] = {}

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def chosen(self, pick: int) -> int:
        return sorted(self.twins)[pick % len(self.twins)]

    def live_blocks(self) -> Counter[int]:
        """Blocks that sequences hold, by size, each once; sizes from lane and store, not from the arena."""
        found: dict[int, int] = {}
        for row, twin in self.twins.items():
            for lane in range(4):
                for column, address in enumerate(self.cache.lanes.table[row, lane].tolist()):
                    if address >= 0:
                        size = INT8_BYTES[lane] if column in twin.encoded[lane] else NATIVE_BYTES[lane]
                        assert found.setdefault(address, size) == size, "one block, two sizes"
        return Counter(found.values())

    def would_fit(self, needs: dict[int, int]) -> bool:
        """Whether `needs` fit beside what sequences hold, were all the rest free and everything packed."""
        total = self.live_blocks()
        total.update(needs)
        return sum(-(-count // (SLAB_BYTES // size)) for size, count in total.items()) <= self.num_slabs

    def grow(self, row: int, tokens: list[int]) -> bool:
        twin = self.twins[row]
        if not self.cache.lanes.extend(row, len(tokens)):
            assert not self.would_fit(self.cache.lanes.blocks_needed(row, len(tokens)))
            twin.needed_from = max(0, len(twin.tokens) - (WINDOW - 1))  # the window has moved all the same
            return False
        twin.grow(tokens)
        for layer, view in enumerate(self.cache.layers):
            lanes = range(view.first, view.first + view.num_lanes)
            new = [[twin.lanes[lane][i - len(tokens)] for lane in lanes] for i in range(len(tokens))]
            k = torch.from_numpy(np.array([[entry[0] for entry in token] for token in new]))
            v = torch.from_numpy(np.array([[entry[1] for entry in token] for token in new]))
            self.cache.append(layer, row, k, v)
        closed = len(twin.tokens) // P
        LanePrefixes(self.cache.lanes).publish(row, twin.chain, twin.tokens, twin.published, closed)
        twin.published = closed
        return True

    # ---- rules -------------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.twins) < ROWS)
    @rule(
        first=st.integers(0, 1),
        rest=st.lists(st.integers(0, 1), max_size=3),
        repeat=st.integers(0, 9),
        salt=st.sampled_from(["", "", "b"]),
        chunk=st.integers(1, LONGEST_CHUNK),
    )
    def start(self, first: int, rest: list[int], repeat: int, salt: str, chunk: int) -> None:
        """A request arrives; what it shares with the prefix index is adopted, the rest is computed in chunks."""
        tokens = [first, *rest] + [first, 1, 0, 1] * repeat
        row, chain = self.cache.lanes.open(), PrefixChain(salt)
        match = self.cache.index.match(tokens, chain, len(tokens) - 1)
        LanePrefixes(self.cache.lanes).adopt(row, match)
        twin = self.twins[row] = Twin([], chain)
        twin.grow(tokens[: match.num_blocks * P])
        twin.needed_from = max(0, match.num_blocks * P - (WINDOW - 1))
        twin.published = match.num_blocks
        for at in range(len(twin.tokens), len(tokens), chunk):
            if not self.grow(row, tokens[at : at + chunk]):
                break

    @precondition(lambda self: self.twins)
    @rule(pick=st.integers(0, 9), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=LONGEST_CHUNK))
    def extend(self, pick: int, tokens: list[int]) -> None:
        """Tokens are computed; where the last block is shared this writes to a copy."""
        self.grow(self.chosen(pick), tokens)

    @precondition(lambda self: self.twins)
    @rule(pick=st.integers(0, 9), number=st.integers(0, 2 * LONGEST_CHUNK))
    def truncate(self, pick: int, number: int) -> None:
        """The newest tokens are taken back, unless something was lost since or the window has moved too far."""
        row = self.chosen(pick)
        twin = self.twins[row]
        length = len(twin.tokens) - number
        begin = len(twin.tokens) - len(self.cache.lanes.positions_of(row, 2))
        if length < 0 or length < twin.lossy_until or (begin and length - (WINDOW - 1) < begin):
            before = self.cache.lanes.table[row].copy()
            with pytest.raises(InvalidInputError, match="cannot be taken back"):
                self.cache.lanes.truncate(row, number)
            assert np.array_equal(self.cache.lanes.table[row], before)
            return
        self.cache.lanes.truncate(row, number)
        twin.shrink(number)

    @precondition(lambda self: self.twins)
    @rule(pick=st.integers(0, 9), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=LONGEST_CHUNK))
    def extend_and_take_back(self, pick: int, tokens: list[int]) -> None:
        """The tokens of one step can always be taken back; what is seen, held and used is what it was."""
        row = self.chosen(pick)
        twin, lanes = self.twins[row], self.cache.lanes
        held = [len(lanes.positions_of(row, lane)) for lane in UNBOUNDED]
        if self.grow(row, tokens):
            lanes.truncate(row, len(tokens))
            twin.shrink(len(tokens))
            assert [len(lanes.positions_of(row, lane)) for lane in UNBOUNDED] == held
            own = (lanes.table[row] >= 0).sum(axis=1)
            assert [int(own[lane]) for lane in UNBOUNDED] == [-(-count // P) for count in held]

    @precondition(lambda self: 0 < len(self.twins) < ROWS)
    @rule(pick=st.integers(0, 9))
    def fork(self, pick: int) -> None:
        parent = self.chosen(pick)
        child = self.cache.lanes.fork(parent)
        self.twins[child] = self.twins[parent].fork()

    @precondition(lambda self: self.twins)
    @rule(pick=st.integers(0, 9), seed=st.integers(0, 2**32), density=st.sampled_from([0.0, 0.1, 0.5, 0.9]))
    def drop_tokens(self, pick: int, seed: int, density: float) -> None:
        """Some lanes lose tokens, each its own; lanes with encoded blocks refuse, and then nothing changes."""
        row = self.chosen(pick)
        twin, rng = self.twins[row], np.random.default_rng(seed)
        lanes = [lane for lane in UNBOUNDED if rng.random() < 0.7]
        keep = {}
        for lane in lanes:
            count = len(twin.lanes[lane])
            sinks = int(rng.integers(0, 6))
            keep[lane] = np.flatnonzero((rng.random(count) < density) | (np.arange(count) < sinks))
        if any(twin.encoded[lane] for lane in lanes):
            with pytest.raises(UnsupportedError, match="select before encoding"):
                self.cache.compact(row, keep)
            return
        needs: Counter[int] = Counter()
        for lane, slots in keep.items():
            lead = next((i for i, slot in enumerate(slots) if slot != i), len(slots)) // P
            written = self.cache.lanes.table[row, lane, lead : -(-len(slots) // P)]
            needs[NATIVE_BYTES[lane]] += int((self.cache.arena.references(written) > 1).sum())
        if not self.cache.compact(row, keep):
            assert not self.would_fit(needs)
            return
        for lane, slots in keep.items():
            twin.lanes[lane] = [twin.lanes[lane][slot] for slot in slots]
        if lanes:
            twin.lossy_until = len(twin.tokens)

    @precondition(lambda self: self.twins)
    @rule(pick=st.integers(0, 9), which=st.integers(0, 6), first=st.integers(0, 8), number=st.integers(1, 8))
    def encode(self, pick: int, which: int, first: int, number: int) -> None:
        """Full blocks of one lane, or of all that have them, go to int8; once only."""
        row = self.chosen(pick)
        twin = self.twins[row]
        lanes = [UNBOUNDED[which]] if which < 3 else UNBOUNDED
        full = min(len(twin.lanes[lane]) for lane in lanes) // P
        first = min(first, max(0, full - 1))
        last = min(first + number, full)
        if first >= last:
            return
        columns = set(range(first, last))
        if any(twin.encoded[lane] & columns for lane in lanes):
            with pytest.raises(UnsupportedError, match="a block is encoded once"):
                self.cache.encoder.encode(row, lanes, "int8", first, last)
            return
        needs = Counter(INT8_BYTES[lane] for lane in lanes for _ in columns)
        if not self.cache.encoder.encode(row, lanes, "int8", first, last):
            assert not self.would_fit(needs)
            return
        twin.lossy_until = len(twin.tokens)
        for lane in lanes:
            twin.encoded[lane] |= columns
            for slot in range(first * P, last * P):
                k, v, position = twin.lanes[lane][slot]
                twin.lanes[lane][slot] = (through_int8(k), through_int8(v), position)

    @precondition(lambda self: self.twins)
    @rule(pick=st.integers(0, 9))
    def free(self, pick: int) -> None:
        row = self.chosen(pick)
        self.cache.lanes.close(row)
        twin = self.twins.pop(row)
        self.cache.index.touch(twin.chain.digests[: twin.published])

    @rule(steps=st.integers(0, 20))
    def reclaim(self, steps: int) -> None:
        """Cached prefixes give way, one group of one block at a time."""
        before = self.cache.arena.used_bytes
        freed = sum(freed for freed, _ in zip(self.cache.index.reclaim(), range(steps), strict=False))
        assert self.cache.arena.used_bytes <= before - freed  # zip draws one step more than it hands out

    @rule()
    def evacuate(self) -> None:
        self.cache.pool.evacuate()
        counts: Counter[int] = Counter()
        for holder in self.cache.pool.holders:
            for addresses in holder.held_blocks():
                counts.update(np.unique(addresses).tolist())
        sizes = Counter(self.cache.arena.block_bytes_at(np.array(list(counts), np.int32)).tolist())
        slabs = sum(-(-count // (SLAB_BYTES // size)) for size, count in sizes.items())
        live = sum(size * count for size, count in sizes.items())
        assert self.cache.arena.slabs.stranded_bytes == slabs * SLAB_BYTES - live

    @precondition(lambda self: self.twins)
    @rule(pick=st.integers(0, 9))
    def run_out(self, pick: int) -> None:
        """One sequence grows until there is no room; cached prefixes go, other sequences keep what they have."""
        row = self.chosen(pick)
        while self.grow(row, [1, 1, 0, 1, 0]):
            pass
        self.cache.lanes.close(row)
        self.twins.pop(row)

    @rule()
    def clear_prefixes(self) -> None:
        self.cache.index.clear()
        assert len(self.cache.index) == 0

    # ---- what always holds -------------------------------------------------------------------------------------------

    @invariant()
    def counts_agree(self) -> None:
        self.cache.check_invariants()

    @invariant()
    def every_lane_holds_what_it_must(self) -> None:
        lanes = self.cache.lanes
        assert lanes.open_sequences == sorted(self.twins)
        for row, twin in self.twins.items():
            assert lanes.seen[row] == len(twin.tokens)
            for lane, entries in enumerate(twin.lanes):
                k, v = self.cache.read_lane(row, lane)
                positions = lanes.positions_of(row, lane).tolist()
                if lane == 2:
                    assert len(positions) >= len(twin.tokens) - twin.needed_from
                    entries = entries[len(entries) - len(positions) :]
                    blocks = int((lanes.table[row, lane] >= 0).sum())
                    assert blocks <= SPEC.lane_blocks(len(twin.tokens), WINDOW, LONGEST_CHUNK)
                else:
                    assert int((lanes.table[row, lane] >= 0).sum()) == -(-len(entries) // P)
                assert positions == [position for _, _, position in entries]
                if entries:
                    assert np.array_equal(k.numpy(), np.stack([entry[0] for entry in entries]))
                    assert np.array_equal(v.numpy(), np.stack([entry[1] for entry in entries]))

    @invariant()
    def bytes_in_use_are_the_unique_extents_of_live_tables(self) -> None:
        live = sum(size * count for size, count in self.live_blocks().items())
        assert self.cache.bytes_in_use == live
        extents = {}
        for row, twin in self.twins.items():
            for lane in range(4):
                for column, address in enumerate(self.cache.lanes.table[row, lane].tolist()):
                    if address >= 0:
                        extents[address] = INT8_BYTES[lane] if column in twin.encoded[lane] else NATIVE_BYTES[lane]
        for entry in self.cache.index._entries.values():
            for group, addresses in zip(SPEC.groups, entry.blocks, strict=True):
                for address in [] if addresses is None else addresses.tolist():
                    assert extents.setdefault(address, group.block_bytes) == group.block_bytes
        end = 0
        for address, size in sorted(extents.items()):
            assert address * GRANULE_BYTES >= end, "two blocks overlap"
            end = address * GRANULE_BYTES + size
            assert (address * GRANULE_BYTES) // SLAB_BYTES == (end - 1) // SLAB_BYTES, "a block straddles two slabs"
        assert self.cache.arena.used_bytes == sum(extents.values())

    def teardown(self) -> None:
        """Everything comes back."""
        if not hasattr(self, "cache"):
            return
        for row in self.twins:
            self.cache.lanes.close(row)
        self.cache.index.clear()
        self.cache.check_invariants()
        assert self.cache.arena.used_bytes == self.cache.arena.slabs.stranded_bytes == self.cache.bytes_in_use == 0
        assert self.cache.lanes.num_free == ROWS


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
