"""Where room comes from: evacuation first, then idle prefixes, and no more than is needed. No bytes, and no torch."""

import pytest

from harness.lane_desk import BIG, HUGE, Desk
from kvloom.cache.laneprefixes import LanePrefixes
from kvloom.cache.prefix import PrefixChain
from kvloom.spec.store import SLAB_BYTES


@pytest.fixture
def desk() -> Desk:
    """Return a desk of the default size."""
    return Desk()


def test_tables_and_index_follow_an_evacuation(desk: Desk) -> None:
    tokens, chain = list(range(8)), PrefixChain()
    first, second, third = desk.opened(8), desk.opened(8), desk.opened(8)
    LanePrefixes(desk.lanes).publish(third, chain, tokens, 0, 2)
    forked = desk.lanes.fork(third)
    desk.lanes.close(first)
    desk.lanes.close(second)
    before = desk.lanes.table[third].copy()
    desk.pool.evacuate()
    desk.check()
    assert (desk.lanes.table[forked] == desk.lanes.table[third]).all()
    assert desk.arena.slabs.stranded_bytes == SLAB_BYTES - 4 * BIG + SLAB_BYTES - 2 * HUGE
    moved = {(int(s), int(t)) for move in desk.moves for s, t in zip(move.source, move.target, strict=True)}
    after = desk.lanes.table[third]
    assert {(int(a), int(b)) for a, b in zip(before[before >= 0], after[after >= 0], strict=True) if a != b} == moved
    match = desk.index.match([*tokens, 9], PrefixChain(), 8)
    adopted = desk.lanes.open()
    LanePrefixes(desk.lanes).adopt(adopted, match)
    assert (desk.lanes.table[adopted, :2] == after[:2]).all()


def test_room_is_found_by_evacuating_first_and_by_reclaiming_cached_prefixes_next() -> None:
    desk = Desk(num_slabs=3)
    tokens, chain = list(range(8)), PrefixChain()
    cached = desk.opened(8)  # 4 of lanes 0 and 1, 2 of lane 2: two slabs
    LanePrefixes(desk.lanes).publish(cached, chain, tokens, 0, 2)
    desk.lanes.close(cached)
    assert desk.pool.ensure({BIG: 4}) and len(desk.index) == 2
    assert desk.pool.ensure({BIG: 12}) and len(desk.index) == 2
    assert desk.pool.ensure({BIG: 13}) and desk.index.num_reclaimed > 0
    assert not desk.pool.ensure({BIG: 25})
    assert desk.pool.ensure({BIG: 24}) and len(desk.index) == 0
    desk.check()


def test_no_more_is_reclaimed_than_an_allocation_needs() -> None:
    desk = Desk(num_slabs=3)
    tokens, chain = list(range(16)), PrefixChain()
    cached = desk.opened(16)  # 8 blocks of lanes 0 and 1 in one slab, 4 of lane 2 in another
    LanePrefixes(desk.lanes).publish(cached, chain, tokens, 0, 4)
    desk.lanes.close(cached)
    desk.index.touch(chain.digests)
    assert desk.pool.ensure({BIG: 10})
    assert desk.index.num_reclaimed == 2
    assert desk.index.match(list(range(16)), PrefixChain(), 16).num_blocks == 3
    desk.check()


def test_an_allocation_that_cannot_fit_whatever_is_reclaimed_reclaims_nothing() -> None:
    desk = Desk(num_slabs=2)
    cached = desk.opened(8)
    LanePrefixes(desk.lanes).publish(cached, PrefixChain(), list(range(8)), 0, 2)
    desk.lanes.close(cached)
    assert not desk.pool.ensure({BIG: 17})
    assert not desk.pool.ensure({BIG: 9, HUGE: 4})
    assert len(desk.index) == 2
