"""Bytes of every model in the catalogue, as they were computed when they were last checked by hand."""

import json
from pathlib import Path

import pytest

from kvloom.spec.catalogue import catalogue_names, catalogue_spec

GOLDEN = json.loads((Path(__file__).parent / "golden_bytes.json").read_text(encoding="utf-8"))


def bytes_of(name):
    """Return what a plan says a model weighs and caches."""
    spec = catalogue_spec(name)
    found = {
        "parameters": spec.num_params,
        "active parameters": spec.active_params,
        "weights": spec.stored_weight_bytes(spec.dtype),
        "state": spec.state_bytes,
    }
    if spec.kv_layers:
        kv = spec.kv_spec(16, "bf16")
        found |= {
            "KV of a token": kv.bytes_per_token,
            "KV of 4096 tokens": kv.request_bytes(4096),
            "KV of 131072 tokens": kv.request_bytes(131_072),
        }
    return found


def test_every_model_of_the_catalogue_has_golden_bytes():
    assert list(GOLDEN) == list(catalogue_names())


@pytest.mark.parametrize("name", catalogue_names())
def test_planned_bytes_are_the_golden_ones(name):
    assert bytes_of(name) == GOLDEN[name]
