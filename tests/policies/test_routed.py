"""Mixtures of experts under a policy: the kernels evict the same tokens and answer as the definition does."""

import pytest
import torch

from harness.families import decoder_of, oracle_of
from harness.small_engine import run, small_engine
from harness.tiny_engine import greedy
from harness.tiny_model import random_tokens
from kvloom.attention.reference import ReferenceBackend
from kvloom.models.compiled import CompiledModel
from kvloom.models.eager import EagerModel
from kvloom.policies.reading import read_policy

pytest.importorskip("kvloom.kernels.cpu._ext", reason="the CPU kernels are not built")


def test_a_mixture_of_experts_evicts_and_answers_as_its_definition(tmp_path):
    decoder = decoder_of(oracle_of("qwen2-moe"), tmp_path)
    compiled = CompiledModel(decoder.config, decoder.weights.items(), torch.float32)
    policy, found = read_policy("snapkv(budget=24,window=4)"), []
    for model in (EagerModel(decoder, ReferenceBackend()), compiled):
        engine = small_engine(model=model)
        request = engine.add(random_tokens(80, 131), greedy(16), kv_policy=policy)
        engine.step()
        kept = [engine.cache.lanes.positions_of(request.sequences[0].row, lane).tolist() for lane in range(6)]
        found.append((kept, run(engine, [request])))
    assert found[0] == found[1]
    assert all(len(positions) < 40 for positions in found[0][0])
