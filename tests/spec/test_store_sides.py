"""K and V of a store may take unlike bytes; a lane without V pays for K alone."""

import pytest

from kvloom.spec.footprint import request_footprint
from kvloom.spec.format import store_format
from kvloom.spec.kv import KVSpec, LayerKV
from kvloom.spec.policy import PolicySpec


@pytest.mark.parametrize(
    "k_width, v_width, expected",
    [(64, 64, 16 * (64 + 4 + 32 + 2)), (128, 64, 16 * (128 + 4 + 32 + 2)), (576, 0, 16 * (576 + 4)), (0, 64, 16 * 34)],
)
def test_each_side_adds_its_own_codes_and_scales(k_width, v_width, expected):
    store = store_format("k8v4")
    assert store.payload_bytes(16, k_width, v_width) == expected
    assert store.block_bytes(16, k_width, v_width) == -(-expected // 128) * 128


def test_a_policy_spells_unlike_sides_and_its_plan_counts_them():
    kv = KVSpec((LayerKV(3, 64, 64),), 16, "bf16")
    settled = request_footprint(kv, PolicySpec.parse("k8v4(residual=0)"), 64, 0, 64).settled
    assert settled.low == settled.high == 3 * 4 * 1664


def test_groups_of_either_side_decide_the_block_size():
    assert (store_format("kivi4").group, store_format("k8v4").group) == (32, 1)
