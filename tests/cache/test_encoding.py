"""Encoding frees what it replaces, copies of the prefix index included, and counters charge blocks as they are."""

import numpy as np
import pytest
import torch

from kvloom.cache.kvcache import KVCache
from kvloom.cache.laneprefixes import LanePrefixes
from kvloom.cache.prefix import PrefixChain
from kvloom.engine.params import SamplingParams
from kvloom.engine.request import Request
from kvloom.engine.stepfigures import Traffic
from kvloom.engine.work import Work
from kvloom.errors import InvalidInputError
from kvloom.spec.kv import KVSpec, LayerKV
from kvloom.spec.store import SLAB_BYTES

P, WIDTH, TOKENS = 4, 64, 16
SPEC = KVSpec((LayerKV(2, WIDTH, WIDTH),), P, "fp32")
NATIVE = P * 2 * WIDTH * 4
INT8 = 640
"""Bytes of 4 tokens of K and V: 512 codes and 8 scales of 4 bytes, in granules of 128."""


@pytest.fixture
def cache():
    return KVCache(SPEC, 8 * SLAB_BYTES, 4, torch.float32)


def filled(cache):
    """Return a sequence of 16 tokens whose 4 blocks are in the prefix index."""
    row = cache.lanes.open()
    assert cache.lanes.extend(row, TOKENS)
    values = torch.randn(2, TOKENS, 2, WIDTH, generator=torch.Generator().manual_seed(0))
    cache.append(0, row, values[0], values[1])
    LanePrefixes(cache.lanes).publish(row, PrefixChain(), list(range(TOKENS)), 0, TOKENS // P)
    return row


def test_encoding_after_publishing_lowers_use_to_what_the_formula_says(cache):
    row = filled(cache)
    assert cache.arena.used_bytes == 8 * NATIVE
    assert cache.encoder.encode(row, [0, 1], "int8", 0, 3)
    assert cache.arena.used_bytes == 6 * INT8 + 2 * NATIVE
    assert len(cache.index) == 1, "the block that was not encoded stays"
    cache.check_invariants()


def test_encoding_some_lanes_takes_the_copies_of_their_blocks_out_of_the_index(cache):
    row = filled(cache)
    assert cache.encoder.encode(row, [1], "int8", 1, 2)
    assert cache.arena.used_bytes == 7 * NATIVE + INT8
    assert cache.index.match(list(range(TOKENS)), PrefixChain(), TOKENS).num_blocks == 1
    cache.check_invariants()


def test_blocks_that_another_sequence_reads_stay_in_the_index(cache):
    row = filled(cache)
    other = cache.lanes.fork(row)
    assert cache.encoder.encode(row, [0, 1], "int8", 0, 4)
    assert cache.index.match(list(range(TOKENS)), PrefixChain(), TOKENS).num_blocks == 4
    cache.lanes.close(other)
    cache.check_invariants()


def test_a_sequence_that_was_encoded_publishes_nothing_more(cache):
    row = filled(cache)
    assert cache.encoder.encode(row, [0, 1], "int8", 0, 4)
    assert cache.lanes.extend(row, P)
    LanePrefixes(cache.lanes).publish(row, PrefixChain(), list(range(TOKENS + P)), 4, 5)
    assert len(cache.index) == 0, "it was computed from lossy keys and values"


def test_bytes_that_a_sequence_does_not_share_are_those_of_its_blocks_as_they_are_stored(cache):
    row, empty = filled(cache), cache.lanes.open()
    assert cache.encoder.encode(row, [0, 1], "int8", 0, 3)
    assert cache.lanes.sequence_bytes(row, beside=empty) == cache.lanes.sequence_bytes(row) == 6 * INT8 + 2 * NATIVE


def test_traffic_counts_encoded_blocks_as_they_are_stored(cache):
    row = filled(cache)
    request = Request("r", list(range(TOKENS)), SamplingParams(), arrival=0, seed=0, max_tokens=1)
    request.sequences[0].row = row
    work = [Work(request.sequences[0], 0, TOKENS, True)]
    assert Traffic(cache, work).read_bytes == 8 * NATIVE
    assert cache.encoder.encode(row, [0, 1], "int8", 0, 3)
    assert Traffic(cache, work).read_bytes == 6 * INT8 + 2 * NATIVE
    assert np.array_equal(cache.lanes.held[row], [TOKENS, TOKENS])


def test_only_tokens_that_came_after_the_last_encoding_can_be_taken_back(cache):
    row = filled(cache)
    assert cache.encoder.encode(row, [0, 1], "int8", 0, 3)
    assert cache.lanes.extend(row, 3)
    cache.lanes.truncate(row, 3)
    before = cache.lanes.sequence_bytes(row)
    with pytest.raises(InvalidInputError, match="the first 16 must stay"):
        cache.lanes.truncate(row, 1)
    assert cache.lanes.sequence_bytes(row) == before and int(cache.lanes.seen[row]) == TOKENS
    cache.check_invariants()


def test_bytes_in_use_are_told_apart_by_store_and_shared_blocks_count_once(cache):
    row = filled(cache)
    assert cache.encoder.encode(row, [0, 1], "int8", 0, 3)
    cache.lanes.fork(row)
    assert cache.bytes_by_store() == {"fp32": 2 * NATIVE, "int8": 6 * INT8}
    assert cache.bytes_in_use == 6 * INT8 + 2 * NATIVE
