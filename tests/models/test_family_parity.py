"""Every family and position variant against transformers: the same logits however tokens arrive, however long."""

import pytest
import torch

from harness.families import VARIANTS, decoder_of, expected_logits, oracle_of
from harness.tiny_model import cache_of, feed, random_tokens
from harness.tolerances import LOGITS_FLOAT32

LENGTH = 70
"""Tokens of a test text: twice the original context of the variants that extend it."""


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """Return (decoder, model of transformers) of one variant."""
    oracle = oracle_of(request.param)
    return decoder_of(oracle, tmp_path_factory.mktemp("model")), oracle


@pytest.mark.parametrize("length", [28, LENGTH], ids=["short", "long"])
def test_a_text_in_one_piece_has_the_logits_of_transformers(pair, length):
    decoder, oracle = pair
    tokens = random_tokens(length, 131)
    cache = cache_of(decoder)
    logits = feed(decoder, cache, cache.lanes.open(), tokens)
    expected = expected_logits(oracle, tokens)
    assert expected.std() > 0.8, "the test would be too easy"
    assert (logits - expected).abs().max() < LOGITS_FLOAT32


@pytest.mark.parametrize("chunk", [7, 1], ids=["in chunks", "token by token"])
def test_chunks_and_single_tokens_after_a_prefill_have_the_logits_of_transformers(pair, chunk):
    decoder, oracle = pair
    tokens = random_tokens(LENGTH, 131)
    cache = cache_of(decoder)
    sequence = cache.lanes.open()
    first = feed(decoder, cache, sequence, tokens[:37], total=LENGTH)
    rest = feed(decoder, cache, sequence, tokens[37:], chunk=chunk, total=LENGTH)
    cache.check_invariants()
    assert (torch.cat((first, rest)) - expected_logits(oracle, tokens)).abs().max() < LOGITS_FLOAT32


def test_an_adopted_prefix_is_as_good_as_a_computed_one(pair):
    decoder, oracle = pair
    tokens = random_tokens(LENGTH, 131)
    cache = cache_of(decoder)
    first = cache.lanes.open()
    feed(decoder, cache, first, tokens[:64], chunk=9, total=LENGTH)
    cache.lanes.publish(first, cache.chain(), tokens, 0, 4)
    cache.lanes.close(first)
    second = cache.lanes.open()
    cache.lanes.adopt(second, cache.index.match(tokens, cache.chain(), LENGTH - 1))
    logits = feed(decoder, cache, second, tokens[64:], total=LENGTH)
    assert (logits - expected_logits(oracle, tokens)[64:]).abs().max() < LOGITS_FLOAT32
