"""A layer may own no lanes, or lanes of two roles: both come and go with the sequence, and bytes are those walked."""

import numpy as np
import pytest
import torch

from kvloom.cache.kvcache import KVCache
from kvloom.errors import InvalidInputError
from kvloom.spec.footprint import request_footprint
from kvloom.spec.kv import KVSpec, LayerKV
from kvloom.spec.policy import PolicySpec
from kvloom.spec.steps import step_blocks
from kvloom.spec.store import SLAB_BYTES

P = 4
LATENT = LayerKV(1, 96, 0, beside=(LayerKV(1, 32, 0, role="index"),))
SPEC = KVSpec((LATENT, LayerKV(0, 0, 0), LayerKV(2, 32, 32, window=6), LATENT), P, "fp32")
BYTES = [P * 96 * 4, P * 32 * 4, P * 64 * 4, P * 64 * 4, P * 96 * 4, P * 32 * 4]
"""Bytes of a block of each lane, in the order of lanes."""


@pytest.fixture
def cache():
    return KVCache(SPEC, 8 * SLAB_BYTES, 4, torch.float32)


def written(cache, row, count, seed):
    """Give a sequence `count` tokens of random content in every set; returns what was written, by layer and role."""
    assert cache.lanes.extend(row, count)
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for layer, role in ((0, None), (0, "index"), (2, None), (3, None), (3, "index")):
        view = cache.view(layer, role)
        k = torch.randn(count, view.num_lanes, view.k_width, generator=rng)
        v = torch.randn(count, view.num_lanes, view.v_width, generator=rng)
        cache.append(layer, row, k, v, role)
        found[layer, role] = k, v
    return found


def test_sets_are_numbered_by_layer_and_a_layer_without_lanes_has_none():
    assert [(s.layer, s.role, s.first, s.num_lanes) for s in SPEC.sets] == [
        (0, "attention", 0, 1), (0, "index", 1, 1), (2, "attention", 2, 2), (3, "attention", 4, 1), (3, "index", 5, 1),
    ]  # fmt: skip
    assert SPEC.lane_offset == (0, 2, 2, 4) and SPEC.num_lanes == 6


def test_each_set_reads_what_was_written_to_it(cache):
    row = cache.lanes.open()
    first, second = written(cache, row, 5, 0), written(cache, row, 3, 1)
    for layer, role in ((0, None), (0, "index"), (3, None), (3, "index")):
        k, _, held = cache.read_layer(layer, row, role)
        assert held.tolist() == [8]
        assert torch.equal(k.transpose(0, 1), torch.cat((first[layer, role][0], second[layer, role][0])))
    cache.check_invariants()


@pytest.mark.parametrize("tokens", [1, 4, 9, 17])
def test_bytes_walked_are_the_planned_ones(cache, tokens):
    row = cache.lanes.open()
    written(cache, row, tokens, 0)
    there = (cache.lanes.table[row] >= 0).sum(axis=1)
    walked = int((there * np.array(BYTES)).sum())
    assert walked == cache.lanes.sequence_bytes(row) == cache.arena.used_bytes == SPEC.request_bytes(tokens, tokens)
    assert request_footprint(SPEC, PolicySpec.parse("full"), tokens, 0, tokens).peak.high == walked
    cache.lanes.close(row)
    assert cache.arena.used_bytes == 0


def test_a_forked_sequence_copies_the_tails_of_all_its_sets_before_it_writes(cache):
    row = cache.lanes.open()
    first = written(cache, row, 6, 0)
    child = cache.lanes.fork(row)
    written(cache, child, 1, 1)
    k, _, _ = cache.read_layer(3, row, "index")
    assert torch.equal(k.transpose(0, 1), first[3, "index"][0])
    cache.check_invariants()


def test_a_policy_plans_to_evict_from_what_attention_reads_alone():
    policy = PolicySpec.parse("knorm(budget=8,skip_layers=0)")
    settled = request_footprint(SPEC, policy, 32, 0, 32).settled
    window = 2 * step_blocks(SPEC, 0, 32, None) * P * 64 * 4
    assert settled.high == 2 * 2 * P * 96 * 4 + 2 * 8 * P * 32 * 4 + window


def test_two_sets_of_one_role_are_refused():
    with pytest.raises(InvalidInputError, match="each has a role of its own"):
        KVSpec((LayerKV(1, 8, 8, beside=(LayerKV(1, 8, 0),)),), P, "fp32")
