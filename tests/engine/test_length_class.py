"""Rotary embeddings that depend on the length: which frequencies a request has, and what changes them."""

import pytest
import torch

from harness.families import decoder_of, oracle_of
from harness.tiny_engine import engine_of, finish, greedy, nothing_left
from harness.tiny_model import random_tokens
from kvloom.attention.reference import ReferenceBackend
from kvloom.engine.beam import BeamSearchParams
from kvloom.engine.params import SamplingParams
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


def expected_tokens(oracle, tokens, start):
    """Return the best token after each beginning of `tokens` from `start` tokens on, each computed at once."""
    with torch.no_grad():
        return [int(oracle(torch.tensor([tokens[:end]])).logits[0, -1].argmax()) for end in range(start, len(tokens))]


def test_a_request_that_may_grow_long_is_rotated_for_long_texts_from_its_first_token_by_dynamic_ntk(tmp_path):
    oracle = oracle_of("llama, dynamic")
    decoder = decoder_of(oracle, tmp_path)
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


@pytest.fixture(scope="module")
def longrope(tmp_path_factory):
    """Return (model of transformers, decoder) with two lists of divisors, and an original context of 32 tokens."""
    oracle = oracle_of("phi3, longrope")
    return oracle, decoder_of(oracle, tmp_path_factory.mktemp("longrope"))


@pytest.mark.parametrize("params", [greedy(40), SamplingParams(temperature=0, max_tokens=40, n=2, ignore_eos=True)])
def test_a_text_that_grows_long_is_computed_again_with_the_list_for_long_texts(longrope, params):
    oracle, decoder = longrope
    engine = short_engine(decoder)
    request = engine.add(PROMPT, params)
    steps = []
    while not request.finished:
        engine.step()
        steps.append(engine.last_step.tokens // len(request.sequences))
    assert engine.scheduler.num_preemptions == 0
    if params.n == 1:
        assert steps == [16, 8, *[1] * 8, 16, 16, 1, *[1] * 30], "prompt, 8 tokens, then all 33 in chunks of 16"
    for sequence in request.sequences:
        assert sequence.output_token_ids == expected_tokens(oracle, sequence.token_ids, 24)
        assert sequence.num_cached_tokens == 0
    nothing_left(engine)


def test_a_short_text_has_the_list_for_short_texts_whatever_max_tokens_allows(longrope):
    few, many = short_engine(longrope[1]), short_engine(longrope[1])
    short, long = few.add(PROMPT, greedy(8)), many.add(PROMPT, greedy(90))
    finish(few)
    while long.sequences[0].num_output_tokens < 8:
        many.step()
    assert long.sequences[0].output_token_ids == short.sequences[0].output_token_ids


def test_a_search_by_beams_crosses_to_the_list_for_long_texts_together(longrope):
    oracle, decoder = longrope
    engine = short_engine(decoder)
    request = engine.add_beam_search(PROMPT, BeamSearchParams(beam_width=3, max_tokens=24, ignore_eos=True))
    finish(engine)
    for sequence in request.sequences:
        total = 0.0
        for end in range(24, 48):
            with torch.no_grad():
                logits = oracle(torch.tensor([sequence.token_ids[:end]])).logits[0, -1]
            total += float(torch.log_softmax(logits, -1)[sequence.token_ids[end]])
        assert sequence.cumulative_logprob == pytest.approx(total, abs=1e-3)
    nothing_left(engine)


def test_a_prefix_is_shared_only_by_requests_with_the_same_frequencies(models):
    few = models[1].config.has_few_length_classes
    engine = short_engine(models[1])
    hits = []
    for max_tokens in (8, 8, 40, 40, 8):
        request = engine.add(PROMPT, greedy(max_tokens))
        finish(engine)
        hits.append(request.sequences[0].num_cached_tokens)
    assert hits == ([0, 16, 16, 16, 16] if few else [0, 16, 0, 16, 16])


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
    own = models[1].inverse_frequencies(0, request.sequences[0].length_class)
    assert torch.equal(leader.inverse_frequencies[0], own)
    assert not torch.equal(own, models[1].inverse_frequencies(0))
    finish(engine)
    nothing_left(engine)
