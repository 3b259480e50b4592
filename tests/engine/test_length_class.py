"""Rotary embeddings that depend on the length: a request's frequencies are fixed when it is admitted."""

import pytest
import torch

from harness.families import decoder_of, oracle_of
from harness.tiny_engine import engine_of, finish, greedy, nothing_left
from harness.tiny_model import random_tokens
from kvloom.attention.reference import ReferenceBackend
from kvloom.models.eager import EagerModel
from kvloom.policies.reading import read_policy

PROMPT = random_tokens(24, 131)


@pytest.fixture(scope="module", params=["phi3, longrope", "llama, dynamic"])
def models(request, tmp_path_factory):
    """Return (model of transformers, decoder); both were trained on texts of 32 tokens."""
    oracle = oracle_of(request.param)
    return oracle, decoder_of(oracle, tmp_path_factory.mktemp("model"))


def short_engine(decoder, prefix=True):
    """Return an engine in float32 for texts of up to 120 tokens."""
    model = EagerModel(decoder, ReferenceBackend())
    return engine_of(model, block_size=8, max_num_batched_tokens=16, prefix=prefix, max_model_len=120)


def test_a_request_that_may_grow_long_is_rotated_for_long_texts_from_its_first_token(models):
    oracle, decoder = models
    engine = short_engine(decoder)
    long, short = engine.add(PROMPT, greedy(40)), engine.add(PROMPT, greedy(8))
    finish(engine)
    for request, total in ((short, 32), (long, 64)):  # the oracle does not return from 64 to 32
        tokens = request.sequences[0].token_ids
        assert len(tokens) == total
        with torch.no_grad():  # one forward pass over the whole text has the frequencies of its length
            expected = oracle(torch.tensor([tokens])).logits[0]
        assert tokens[24:] == expected[23 : total - 1].argmax(-1).tolist()
    nothing_left(engine)


def test_a_prefix_is_shared_only_by_requests_with_the_same_frequencies(models):
    engine = short_engine(models[1])
    hits = []
    for max_tokens in (8, 8, 40, 40, 8):
        request = engine.add(PROMPT, greedy(max_tokens))
        finish(engine)
        hits.append(request.sequences[0].num_cached_tokens)
    assert hits == [0, 16, 0, 16, 16]


def test_requests_of_both_kinds_run_in_one_batch_as_they_do_alone(models):
    mixed = short_engine(models[1])
    together = [mixed.add(PROMPT, greedy(count)) for count in (40, 8, 40)]
    finish(mixed)
    for request, count in zip(together, (40, 8, 40), strict=True):
        alone = short_engine(models[1], prefix=False)
        expected = alone.add(PROMPT, greedy(count))
        finish(alone)
        assert request.sequences[0].output_token_ids == expected.sequences[0].output_token_ids


def test_a_policy_moves_keys_by_the_frequencies_of_their_request(models):
    engine = short_engine(models[1])
    request = engine.add(PROMPT, greedy(40), kv_policy=read_policy("streaming(sinks=2,window=14)"))
    leader = request.sequences[0].eviction.model
    own = models[1].inverse_frequencies(0, request.length_class)
    assert torch.equal(leader.inverse_frequencies[0], own)
    assert not torch.equal(own, models[1].inverse_frequencies(0))
    finish(engine)
    nothing_left(engine)
