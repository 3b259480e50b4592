"""Bytes that a sequence of every family takes in the arena, in several dtypes and block sizes, walked and golden.

`scripts/write_golden.py` writes the figures. A change of one is a change of what every plan promises.
"""

import json
from pathlib import Path

import pytest

from harness.families import VARIANTS, config_of
from harness.walked_bytes import GEOMETRIES, walked_bytes

GOLDEN = json.loads((Path(__file__).parent / "golden_walked_bytes.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sequence_of_every_family_takes_the_golden_bytes(variant):
    config = config_of(variant)
    found = {f"{store}, {size}": walked_bytes(config.kv_spec(size, store)) for store, size in GEOMETRIES}
    assert found == GOLDEN[variant]


def test_there_are_golden_bytes_of_nothing_else():
    assert set(GOLDEN) == set(VARIANTS)
