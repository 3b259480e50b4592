"""Prefix index: what it finds, what it must not find, and what it gives back first.

Blocks of 4 tokens; group 0 has two lanes without a window, group 1 one lane with a window of 6. A query at position
p of group 1 sees p - 5 .. p, so after m blocks it needs the blocks from floor((4 m - 5) / 4) on: the last two.
"""

import os
import subprocess
import sys

import numpy as np
import pytest

from kvloom.cache import prefix
from kvloom.cache.arena import Addresses, Arena
from kvloom.cache.prefix import PrefixChain, PrefixIndex, block_digest, root_digest
from kvloom.spec.kv import KVSpec, LayerKV
from kvloom.spec.store import SLAB_BYTES

P = 4
SPEC = KVSpec((LayerKV(2, 32, 32), LayerKV(1, 64, 64, window=6)), P, "fp32")
FULL, LOCAL = SPEC.groups


class Shelf:
    """An index and a writer of blocks, which lets go of its own references at once."""

    def __init__(self) -> None:
        self.arena = Arena(8 * SLAB_BYTES, [FULL.block_bytes, LOCAL.block_bytes])
        self.index = PrefixIndex(SPEC, self.arena)

    def fresh(self, group: int) -> Addresses:
        addresses = self.arena.allocate(len(SPEC.groups[group].lanes), SPEC.groups[group].block_bytes)
        assert addresses is not None
        return addresses

    def publish(self, tokens: list[int], salt: str = "", local_from: int = 0, local_to: int = 1000) -> PrefixChain:
        """Publish every full block of `tokens`; the windowed group only from block `local_from` up to `local_to`."""
        chain = PrefixChain(salt)
        chain.extend(tokens, P, len(tokens) // P)
        for block in range(len(tokens) // P):
            full = self.fresh(0)
            local = self.fresh(1) if local_from <= block < local_to else None
            self.index.publish(chain, block, tokens[block * P : (block + 1) * P], [full, local])
            self.arena.release(full)
            if local is not None:
                self.arena.release(local)
        self.arena.check_invariants()
        return chain

    def found(self, tokens: list[int], salt: str = "", max_tokens: int | None = None) -> int:
        limit = len(tokens) if max_tokens is None else max_tokens
        return self.index.match(tokens, PrefixChain(salt), limit).num_blocks


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


TEXT = list(range(100, 120))  # five blocks


# ---- digests ---------------------------------------------------------------------------------------------------------


def test_digests_are_the_same_as_ever() -> None:
    """Written out from the definition, by hashlib and struct alone; a change would orphan every stored prefix."""
    assert root_digest("").hex() == "1d582506be27ba51101f309b5c9b08ec"
    assert root_digest("naïve \ud800").hex() == "6080b1c9d7b329b7a603c934858e03f9"
    first = block_digest(root_digest(""), [1, 2, 3, 4])
    assert first.hex() == "5532cb0f33a49689544aed9602ed5f1c"
    assert block_digest(first, (5, 6, 7, 262143)).hex() == "017d83f36f40894c3f2504f0a1be8168"


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_digests_do_not_depend_on_the_hash_seed_of_the_process(hash_seed: str) -> None:
    code = (
        "from kvloom.cache.prefix import PrefixChain as C; c = C('s'); c.extend(list(range(8)), 4, 2);"
        "print(c.digests[1].hex())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    chain = PrefixChain("s")
    chain.extend(list(range(8)), 4, 2)
    assert ran.stdout.strip() == chain.digests[1].hex()


def test_a_chain_is_the_same_however_it_grew() -> None:
    whole, steps = PrefixChain(), PrefixChain()
    whole.extend(TEXT, P, 5)
    for end in (1, 1, 3, 5):
        steps.extend(TEXT, P, end)
    assert whole.digests == steps.digests
    assert whole.parent(0) == root_digest("") and whole.parent(3) == whole.digests[2]


# ---- matching --------------------------------------------------------------------------------------------------------


def test_the_longest_published_beginning_is_found(shelf: Shelf) -> None:
    shelf.publish(TEXT)
    assert shelf.found(TEXT) == 5
    assert shelf.found([*TEXT, 1, 2, 3, 4]) == 5
    assert shelf.found([*TEXT[:11], 999, *TEXT[12:]]) == 2
    assert shelf.found([999, *TEXT[1:]]) == 0


def test_only_whole_blocks_within_the_limit_are_matched(shelf: Shelf) -> None:
    shelf.publish(TEXT)
    assert [shelf.found(TEXT, max_tokens=limit) for limit in (3, 4, 19, 20)] == [0, 1, 4, 5]


def test_another_salt_finds_nothing(shelf: Shelf) -> None:
    shelf.publish(TEXT, salt="tenant a")
    assert shelf.found(TEXT, salt="tenant a") == 5
    assert shelf.found(TEXT, salt="tenant b") == 0
    assert shelf.found(TEXT) == 0


def test_a_collision_of_digests_is_a_miss(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "block_digest", lambda parent, tokens: b"the same for all")
    shelf.publish([1, 2, 3, 4])
    assert shelf.found([1, 2, 3, 4]) == 1
    assert shelf.found([5, 6, 7, 8]) == 0


def test_equal_tokens_after_another_beginning_are_a_miss_even_on_a_collision(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = block_digest
    monkeypatch.setattr(
        prefix, "block_digest", lambda parent, tokens: b"second" if tokens[0] == 9 else honest(parent, tokens)
    )
    shelf.publish([1, 2, 3, 4, 9, 9, 9, 9])
    shelf.publish([5, 6, 7, 8])
    assert shelf.found([1, 2, 3, 4, 9, 9, 9, 9]) == 2
    assert shelf.found([5, 6, 7, 8, 9, 9, 9, 9]) == 1


def test_a_colliding_block_does_not_replace_what_is_there(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "block_digest", lambda parent, tokens: b"the same for all")
    shelf.publish([1, 2, 3, 4])
    shelf.publish([5, 6, 7, 8])
    assert shelf.found([1, 2, 3, 4]) == 1
    assert shelf.arena.used_bytes == 2 * FULL.block_bytes + LOCAL.block_bytes


def test_a_windowed_group_is_needed_only_at_the_end_of_the_match(shelf: Shelf) -> None:
    shelf.publish(TEXT, local_from=3)
    assert shelf.found(TEXT) == 5
    assert shelf.found(TEXT[:16]) == 0  # would need local blocks 2 and 3


def test_a_match_falls_back_to_a_boundary_where_the_local_blocks_are_there(shelf: Shelf) -> None:
    shelf.publish(TEXT, local_to=2)
    assert shelf.found(TEXT) == 2


def test_a_single_local_block_at_the_end_is_not_enough(shelf: Shelf) -> None:
    shelf.publish(TEXT, local_from=4)
    assert shelf.found(TEXT) == 0


def test_a_group_that_is_missing_is_filled_in_by_a_later_request(shelf: Shelf) -> None:
    shelf.publish(TEXT, local_from=4)
    shelf.publish(TEXT, local_from=3)
    assert shelf.found(TEXT) == 5
    assert shelf.arena.slabs.used_blocks(FULL.block_bytes) == 10


def test_publishing_twice_keeps_the_first_blocks(shelf: Shelf) -> None:
    chain = shelf.publish(TEXT)
    before = shelf.index.blocks(chain.digests[0], 0)
    assert before is not None
    kept = before.copy()
    shelf.publish(TEXT)
    after = shelf.index.blocks(chain.digests[0], 0)
    assert after is not None and (after == kept).all()
    assert shelf.arena.used_bytes == 5 * (2 * FULL.block_bytes + LOCAL.block_bytes)


# ---- giving back -----------------------------------------------------------------------------------------------------


def reclaimed_order(shelf: Shelf, names: dict[bytes, str]) -> list[str]:
    order = []
    left = set(names)
    for _ in shelf.index.reclaim():
        gone = {d for d in left if d not in shelf.index._entries}
        order += [names[d] for d in gone]
        left -= gone
    return order


def test_the_least_recently_used_prefix_goes_first_and_each_from_its_end(shelf: Shelf) -> None:
    names: dict[bytes, str] = {}
    chains = []
    for name, tokens in (("a", TEXT[:12]), ("b", [*TEXT[:4], *range(200, 208)]), ("c", list(range(300, 308)))):
        chain = shelf.publish(tokens)
        names |= {digest: f"{name}{i}" for i, digest in enumerate(chain.digests) if digest not in names}
        chains.append(chain)
    for chain in chains:
        shelf.index.touch(chain.digests)
    shelf.index.touch(chains[0].digests)
    assert reclaimed_order(shelf, names) == ["b2", "b1", "c1", "c0", "a2", "a1", "a0"]
    assert shelf.arena.used_bytes == 0 and len(shelf.index) == 0


def test_blocks_that_a_request_reads_are_passed_over(shelf: Shelf) -> None:
    chain = shelf.publish(TEXT)
    read = shelf.index.blocks(chain.digests[1], 0)
    assert read is not None
    shelf.arena.share(read)
    assert shelf.index.idle_bytes == 4 * 2 * FULL.block_bytes + 5 * LOCAL.block_bytes
    freed = sum(shelf.index.reclaim())
    assert freed == 4 * 2 * FULL.block_bytes + 5 * LOCAL.block_bytes
    assert shelf.index.idle_bytes == 0
    assert len(shelf.index) == 1 and shelf.arena.used_bytes == 2 * FULL.block_bytes
    shelf.arena.release(read)
    assert sum(shelf.index.reclaim()) == 2 * FULL.block_bytes
    shelf.arena.check_invariants()


def test_lanes_that_a_request_left_are_freed_though_it_reads_their_neighbours(shelf: Shelf) -> None:
    chain = shelf.publish(TEXT[:4])
    both = shelf.index.blocks(chain.digests[0], 0)
    assert both is not None
    kept = both[1:].copy()
    shelf.arena.share(kept)
    assert shelf.index.idle_bytes == FULL.block_bytes + LOCAL.block_bytes
    assert list(shelf.index.reclaim()) == [FULL.block_bytes, LOCAL.block_bytes]
    assert shelf.arena.references(kept).tolist() == [1] and shelf.arena.used_bytes == FULL.block_bytes


def test_reclaiming_can_stop_at_any_block_and_leaves_no_hollow_entry(shelf: Shelf) -> None:
    shelf.publish(TEXT[:4])
    steps = shelf.index.reclaim()
    assert next(steps) == 2 * FULL.block_bytes
    assert next(steps) == LOCAL.block_bytes
    steps.close()  # type: ignore[attr-defined]
    assert len(shelf.index) == 0


def test_a_prefix_that_lost_its_middle_matches_up_to_there(shelf: Shelf) -> None:
    chain = shelf.publish(TEXT)
    for block in (0, 1, 3, 4):
        addresses = shelf.index.blocks(chain.digests[block], 0)
        assert addresses is not None
        shelf.arena.share(addresses)
    list(shelf.index.reclaim())
    assert shelf.found(TEXT) == 0  # the local blocks of the first two went, too
    shelf.publish(TEXT[:8])
    assert shelf.found(TEXT) == 2


def test_clearing_gives_back_everything(shelf: Shelf) -> None:
    shelf.publish(TEXT)
    shelf.index.clear()
    shelf.arena.check_invariants()
    assert shelf.arena.used_bytes == 0 and shelf.found(TEXT) == 0


def test_entries_follow_blocks_that_move(shelf: Shelf) -> None:
    per_slab = SLAB_BYTES // FULL.block_bytes
    filler = shelf.arena.allocate(per_slab - 1, FULL.block_bytes)
    assert filler is not None
    chain = shelf.publish(TEXT[:4])  # one block in each of two slabs
    shelf.arena.release(filler[1:])
    (move,) = [m for m in shelf.arena.evacuation() if m.block_bytes == FULL.block_bytes]
    renamed = np.full(shelf.arena.num_cells, -1, np.int32)
    renamed[shelf.arena.cell_of(move.source)] = move.target
    before = shelf.index.blocks(chain.digests[0], 0)
    assert before is not None
    expected = [int(move.target[list(move.source).index(a)]) if a in move.source else int(a) for a in before]
    shelf.index.rename(renamed)
    after = shelf.index.blocks(chain.digests[0], 0)
    assert after is not None and after.tolist() == expected
    assert (shelf.arena.references(after) == 1).all()
