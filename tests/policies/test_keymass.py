"""On the CPU kernels attention mass comes from one pass over the keys; it is what the definition adds up."""

import numpy as np
import pytest
import torch

from harness.small_engine import prompt_of, run, small_engine
from harness.tiny_engine import greedy
from harness.tiny_model import FULL, random_weights, tiny_config
from kvloom.attention.reference import ReferenceBackend
from kvloom.models.compiled import CompiledModel
from kvloom.models.decoder import Decoder
from kvloom.models.eager import EagerModel
from kvloom.policies.keymass import KeyMass
from kvloom.policies.reading import read_policy
from policies.test_conformance import policy_of, survivors

CONFIG = tiny_config("llama", num_heads=9, num_kv_heads=3, head_dim=64, layers=(FULL,) * 2, max_position=4096)
METHODS = ["h2o", "scissorhands", "fastgen", "snapkv", "tova", "expected", "keydiff", "knorm", "kvzip"]


@pytest.fixture(scope="module")
def model():
    """Return a random model on the kernels, three query heads to each of three lanes."""
    return CompiledModel(CONFIG, random_weights(CONFIG).items(), torch.float32)


class Twice:
    """Adds everything up a second time by the definition, and compares after every step."""

    def __init__(self, mass):
        self.twin = KeyMass(mass.cache, mass.scale, mass.layers, mass.prompt_tokens, mass.reach)
        self.mass, self.add, self.keep = mass, mass.add, mass.keep
        mass.add, mass.keep = self.watched_add, self.watched_keep
        self.compared = 0

    def watched_add(self, sequence, q, lse, first):
        assert lse is not None and lse.shape == q.shape[:3]
        self.add(sequence, q, lse, first)
        self.twin.add(sequence, q, None, first)
        for near in (False, True) if self.mass.reach is not None else (False,):
            for layer in self.mass.layers:
                found = [x.of_layers([layer], sequence, near).numpy() for x in (self.mass, self.twin)]
                np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-5)
                self.compared += 1

    def watched_keep(self, kept):
        self.keep(kept)
        self.twin.keep(kept)


@pytest.mark.parametrize("policy", ["h2o(budget=60)", "h2o(budget=60)+adaptive+prefill+slack(tokens=5)",
                                    "h2o(budget=60)+chunk(tokens=70)+step", "scissorhands(budget=60,window=50)",
                                    "fastgen(recovery=0.5,recent=0.2)"])  # fmt: skip
@pytest.mark.parametrize("chunk", [50, 2048])
def test_mass_from_the_kernels_is_that_of_the_definition_at_every_step(model, policy, chunk):
    engine = small_engine(model=model, prefix=False, max_num_batched_tokens=chunk)
    request = engine.add(prompt_of(200), greedy(20), kv_policy=read_policy(policy))
    twice = Twice(request.sequences[0].eviction.record.observation.mass)
    run(engine, [request], engine.cache.check_invariants)
    assert twice.compared > 20 and engine.kv_usage(request).evicted_tokens > 0


@pytest.mark.parametrize("name", METHODS)
def test_on_the_kernels_what_is_kept_depends_neither_on_the_chunk_size_nor_on_a_cached_prefix(model, name):
    prompt, policy, found = prompt_of(600), policy_of(name, "", budget=100), []
    for chunk, prefix in ((2048, False), (64, False), (512, False), (2048, True)):
        engine = small_engine(model=model, prefix=prefix, max_num_batched_tokens=chunk)
        if prefix:
            run(engine, [engine.add(prompt[:592], greedy(2))])
        request = engine.add(prompt, greedy(3), kv_policy=read_policy(policy))
        while not request.sequences[0].num_output_tokens:
            engine.step()
        found.append(survivors(engine, request))
    assert found[1] == found[0] and found[2] == found[0] and found[3] == found[0]


def test_a_method_that_weighs_by_layer_inputs_keeps_on_the_kernels_what_it_keeps_in_torch(model):
    prompt, policy, found = prompt_of(300), "kvzip(budget=60,chunk=128,normalised=true)", []
    decoder = Decoder(CONFIG, random_weights(CONFIG))
    for one in (model, EagerModel(decoder, ReferenceBackend())):
        engine = small_engine(model=one, prefix=False)
        request = engine.add(prompt, greedy(3), kv_policy=read_policy(policy))
        while not request.sequences[0].num_output_tokens:
            engine.step()
        found.append(survivors(engine, request))
    assert found[0] == found[1]
    assert sum(map(len, found[0])) < len(found[0]) * 100
