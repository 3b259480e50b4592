"""Recurrent states live in the lanes' arena: constant bytes, shared by forks until written, moved with the blocks."""

import pytest
import torch

from kvloom.cache.kvcache import KVCache
from kvloom.cache.states import StateTable
from kvloom.errors import InvalidInputError
from kvloom.spec.kv import KVSpec, LayerKV
from kvloom.spec.layer import Recurrent
from kvloom.spec.state import LayerState
from kvloom.spec.store import SLAB_BYTES

STATES = (LayerState(0, 3, 100), LayerState(2, 4, 64 * 64))
BYTES = 3 * 512 + 4 * 16384
"""400 bytes take four granules of 128."""
LATENT = LayerKV(1, 128, 0, beside=(LayerKV(1, 32, 0, role="index"),))
SPEC = KVSpec((LayerKV(0, 0, 0), LATENT, LayerKV(0, 0, 0)), 4, "fp32")
LANES = 4 * 128 * 4 + 4 * 32 * 4
"""Bytes of one block of each lane."""


@pytest.fixture
def cache():
    return KVCache(SPEC, 8 * SLAB_BYTES, 4, torch.float32, extra_block_sizes=[s.block_bytes for s in STATES])


@pytest.fixture
def table(cache):
    return StateTable(STATES, cache.pool, cache.memory, 4)


def filled(cache, table):
    """Return a sequence with one token and known states."""
    row = cache.lanes.open()
    assert cache.lanes.extend(row, 1) and table.open(row)
    for layer, state in table.states.items():
        table.write(row, layer, torch.arange(state.num_heads * state.elements).view(state.num_heads, -1).float())
    return row


def test_states_start_at_zero_and_take_the_same_bytes_however_long_the_text(cache, table):
    row = cache.lanes.open()
    assert table.open(row) and not table.read(row, 0).any() and not table.read(row, 2).any()
    used = []
    for _ in range(3):
        assert cache.lanes.extend(row, 4)
        used.append(cache.arena.used_bytes)
    assert used == [BYTES + count * LANES for count in (1, 2, 3)] and table.sequence_bytes(row) == BYTES
    table.close(row)
    cache.lanes.close(row)
    assert cache.arena.used_bytes == 0
    cache.check_invariants()


def test_a_fork_shares_states_until_one_of_the_two_writes(cache, table):
    row = filled(cache, table)
    child = cache.lanes.fork(row)
    table.fork(row, child)
    assert cache.arena.used_bytes == BYTES + LANES and table.sequence_bytes(child) == BYTES
    with pytest.raises(AssertionError, match="read-only"):
        table.write(child, 0, torch.ones(3, 100))
    before = table.read(row, 2)
    assert table.own(child)
    assert cache.arena.used_bytes == 2 * BYTES + LANES and torch.equal(table.read(child, 2), before)
    table.write(child, 2, torch.zeros(4, 64 * 64))
    assert torch.equal(table.read(row, 2), before)
    assert table.own(row), "nobody shares them any more"
    cache.check_invariants()


def test_states_follow_blocks_that_move(cache, table):
    rows = [filled(cache, table) for _ in range(3)]
    expected = {layer: table.read(rows[2], layer) for layer in table.states}
    for row in rows[:2]:
        table.close(row)
        cache.lanes.close(row)
    cache.pool.evacuate()
    cache.check_invariants()
    assert all(torch.equal(table.read(rows[2], layer), own) for layer, own in expected.items())


def test_without_blocks_nothing_changes():
    states = (LayerState(0, 1, SLAB_BYTES // 4),)
    cache = KVCache(SPEC, 3 * SLAB_BYTES, 4, torch.float32, extra_block_sizes=[SLAB_BYTES])
    table = StateTable(states, cache.pool, cache.memory, 4)
    row = cache.lanes.open()
    assert cache.lanes.extend(row, 1) and table.open(row)  # both block sizes of lanes and the state: three slabs
    child = cache.lanes.fork(row)
    table.fork(row, child)
    assert not table.own(child) and not table.open(3)
    assert (table.table[child] == table.table[row]).all() and (table.table[3] < 0).all()
    cache.check_invariants()


def test_the_planner_and_the_arena_count_the_same_bytes_where_states_are_whole_granules():
    layer = Recurrent(state_elements=4 * 64 * 64, matrix_params=0, other_params=0)
    assert layer.state_elements * layer.state_bytes == LayerState(0, 4, 64 * 64).request_bytes


def test_a_state_that_does_not_fit_a_slab_is_refused():
    with pytest.raises(InvalidInputError, match="a state has at most"):
        LayerState(0, 1, SLAB_BYTES)
