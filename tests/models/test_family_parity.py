"""Every family and position variant against transformers: the same logits however tokens arrive, however long.

Heads of most variants are 12 wide: the lanes hold them in 16, the last four zeros.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from harness.dequantized import dequantized
from harness.families import VARIANTS, decoder_of, expected_logits, oracle_of
from harness.tiny_model import batch_of, cache_of, feed, random_tokens, random_weights, tiny_config
from harness.tolerances import LOGITS_FLOAT32
from harness.transformers_cache import cached_logits
from kvloom.cache.kvcache import KVCache
from kvloom.cache.laneprefixes import LanePrefixes
from kvloom.cache.prefix import PrefixChain
from kvloom.models.compiled import CompiledModel
from kvloom.models.decoder import Decoder
from kvloom.models.model import StepOutput, StepWanted
from kvloom.spec.kernels import unsupported
from kvloom.spec.store import SLAB_BYTES

pytest.importorskip("kvloom.kernels.cpu._ext", reason="the CPU kernels are not built")

LENGTH = 70
"""Tokens of a test text: twice the original context of the variants that extend it."""

TOKENS = random_tokens(LENGTH, 131)
SHORT = TOKENS[:28]


@dataclass
class Case:
    """One variant: the definition, the compiled model, the model of transformers and its logits of both texts."""

    variant: str
    definition: Decoder
    model: CompiledModel
    oracle: PreTrainedModel
    expected: torch.Tensor
    expected_of_short: torch.Tensor


@pytest.fixture(scope="module", params=VARIANTS)
def case(request, tmp_path_factory):
    """Return the `Case` of a variant."""
    oracle = oracle_of(request.param)
    definition = decoder_of(oracle, tmp_path_factory.mktemp("model"))
    assert unsupported(definition.config, 16) == []
    expected = expected_logits(oracle, TOKENS)
    assert expected.std() > 0.8, "the tests would be too easy"
    model = CompiledModel(definition.config, definition.weights.items(), torch.float32)
    return Case(request.param, definition, model, oracle, expected, expected_logits(oracle, SHORT))


def lanes_of(model: CompiledModel) -> KVCache:
    """Return an empty cache for a compiled model."""
    return KVCache(model.config.kv_spec(16, "fp32"), 4 * SLAB_BYTES, 3, torch.float32, layout="cpu")


def step(model: CompiledModel, cache: KVCache, sequence: int, tokens: list[int], **wanted: bool) -> StepOutput:
    """Put `tokens` through the model as part of a text of `LENGTH`; returns what it hands back."""
    start = int(cache.lanes.seen[sequence])
    assert cache.lanes.extend(sequence, len(tokens))
    length_class = np.array([model.config.length_class(LENGTH)], np.int32)
    batch = replace(batch_of([(sequence, start, tokens)]), length_class=length_class)
    return model.step(batch, cache, StepWanted(np.arange(len(tokens), dtype=np.int32), **wanted))


def test_the_definition_has_the_logits_of_transformers_in_chunks_and_token_by_token(case):
    cache = cache_of(case.definition)
    sequence = cache.lanes.open()
    rows = [feed(case.definition, cache, sequence, TOKENS[:37], total=LENGTH)]
    rows.append(feed(case.definition, cache, sequence, TOKENS[37:65], chunk=7, total=LENGTH))
    rows.append(feed(case.definition, cache, sequence, TOKENS[65:], chunk=1, total=LENGTH))
    cache.check_invariants()
    assert (torch.cat(rows) - case.expected).abs().max() < LOGITS_FLOAT32


def test_the_definition_has_the_logits_of_transformers_without_a_cache(case):
    with torch.no_grad():
        found = case.definition.sequence_logits(torch.tensor([SHORT, SHORT[::-1]]))
    assert (found[0] - case.expected_of_short).abs().max() < LOGITS_FLOAT32


def test_the_kernels_have_the_logits_of_transformers_in_chunks_and_token_by_token(case):
    cache, rows = lanes_of(case.model), []
    sequence = cache.lanes.open()
    for start, end in ((0, 37), (37, 60), *((i, i + 1) for i in range(60, LENGTH))):
        output = step(case.model, cache, sequence, TOKENS[start:end], hidden=True)
        assert (case.model.logits(output.hidden) - output.logits).abs().max() < LOGITS_FLOAT32
        rows.append(output.logits)
    assert (torch.cat(rows) - case.expected).abs().max() < LOGITS_FLOAT32


def test_the_last_row_of_a_short_prompt_has_the_logits_of_transformers(case):
    """The last layer then works on that row alone; frequencies that depend on the length are those of a short text."""
    cache, last = lanes_of(case.model), len(SHORT) - 1
    sequence = cache.lanes.open()
    assert cache.lanes.extend(sequence, len(SHORT))
    output = case.model.step(batch_of([(sequence, 0, SHORT)]), cache, StepWanted(np.array([last], np.int32)))
    assert (output.logits - case.expected_of_short[last:]).abs().max() < LOGITS_FLOAT32


def test_an_adopted_prefix_is_as_good_as_a_computed_one(case):
    cache = lanes_of(case.model)
    step(case.model, cache, first := cache.lanes.open(), TOKENS[:64])
    LanePrefixes(cache.lanes).publish(first, PrefixChain(), TOKENS, 0, 4)
    cache.lanes.close(first)
    second = cache.lanes.open()
    LanePrefixes(cache.lanes).adopt(second, cache.index.match(TOKENS, PrefixChain(), LENGTH - 1))
    found = step(case.model, cache, second, TOKENS[64:]).logits
    assert (found - case.expected[64:]).abs().max() < LOGITS_FLOAT32


def test_norms_of_layer_inputs_are_those_of_the_hidden_states_of_transformers(case):
    cache = lanes_of(case.model)
    found = step(case.model, cache, cache.lanes.open(), TOKENS, input_norms=True).input_norms
    with torch.no_grad():
        states = case.oracle(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states
    unit = getattr(case.oracle.config, "residual_multiplier", 1.0)  # Granite's decoder runs on x divided by it
    inputs = states[: case.model.config.num_layers]
    expected = torch.stack([state[0].float().norm(dim=-1) for state in inputs]) / unit
    assert ((found - expected).abs() / expected).max() < 1e-4


EVICTED = slice(5, 41)
"""Tokens that no window of a variant reaches from where decoding goes on."""


def test_lanes_that_lost_tokens_have_the_logits_of_transformers_without_them(case):
    cache = lanes_of(case.model)
    step(case.model, cache, sequence := cache.lanes.open(), TOKENS[:60])
    whole = evict(cache, sequence)
    found = torch.cat([step(case.model, cache, sequence, [token]).logits for token in TOKENS[60:]])
    if case.variant.startswith("bloom"):  # transformers counts distances without the masked tokens
        eager = cache_of(case.definition)
        feed(case.definition, eager, sequence := eager.lanes.open(), TOKENS[:60], total=LENGTH)
        evict(eager, sequence)
        expected = feed(case.definition, eager, sequence, TOKENS[60:], total=LENGTH)
    else:
        expected = cached_logits(case.oracle, TOKENS, 60, EVICTED)
    assert (found - expected).abs().max() < LOGITS_FLOAT32
    assert not whole or (expected - case.expected[60:]).abs().max() > 10 * LOGITS_FLOAT32


def evict(cache: KVCache, sequence: int) -> list[int]:
    """Evict `EVICTED` from the lanes that have no window; returns them."""
    kept = np.delete(np.arange(60), EVICTED)
    whole = [lane for lane, lanes in enumerate(cache.spec.lane_set) if lanes.window is None]
    assert cache.compact(sequence, dict.fromkeys(whole, kept))
    assert cache.lanes.held[sequence, whole].tolist() == [len(kept)] * len(whole)
    return whole


def test_weights_in_8_bits_are_those_of_the_model_with_rounded_weights(case):
    config, weights = case.model.config, case.definition.weights
    model = CompiledModel(config, weights.items(), torch.float32, "int8")
    rounded = Decoder(config, {name: dequantized(name, weight) for name, weight in weights.items()})
    cache = lanes_of(model)
    found = step(model, cache, cache.lanes.open(), TOKENS).logits
    assert (found - logits_of(rounded)).abs().max() < LOGITS_FLOAT32
    assert (found - case.expected).abs().max() > LOGITS_FLOAT32, "nothing was rounded"


def test_sequences_of_unlike_length_are_rotated_each_by_its_own_frequencies(tmp_path):
    oracle = oracle_of("llama, dynamic")
    decoder = decoder_of(oracle, tmp_path)
    model = CompiledModel(decoder.config, decoder.weights.items(), torch.float32)
    cache = lanes_of(model)
    texts = [random_tokens(28, 131, seed=1), random_tokens(LENGTH, 131, seed=2)]
    sequences = [cache.lanes.open() for _ in texts]
    for sequence, text in zip(sequences, texts, strict=True):
        assert cache.lanes.extend(sequence, len(text))
    classes = np.array([model.config.length_class(len(text)) for text in texts], np.int32)
    batch = batch_of([(sequence, 0, text) for sequence, text in zip(sequences, texts, strict=True)])
    rows = np.arange(batch.num_tokens, dtype=np.int32)
    found = model.step(replace(batch, length_class=classes), cache, StepWanted(rows)).logits
    expected = torch.cat([expected_logits(oracle, text) for text in texts])
    assert (found - expected).abs().max() < LOGITS_FLOAT32


def test_sinks_and_slopes_mean_the_same_in_both_decoders():
    config = tiny_config("llama")
    weights = random_weights(config)
    weights |= {f"layers.{i}.sinks": torch.randn(4) for i in range(config.num_layers)}
    config = replace(config, sinks=True, slopes=(0.5, 0.25, 0.125, 0.0625))
    model = CompiledModel(config, weights.items(), torch.float32)
    cache, decoder = lanes_of(model), Decoder(config, weights)
    found = step(model, cache, cache.lanes.open(), TOKENS).logits
    expected = logits_of(decoder)
    assert (found - expected).abs().max() < LOGITS_FLOAT32
    plain = Decoder(replace(config, sinks=False, slopes=()), {n: w for n, w in weights.items() if "sinks" not in n})
    assert (logits_of(plain) - expected).abs().max() > 0.1


def logits_of(decoder: Decoder) -> torch.Tensor:
    """Return the logits of `TOKENS` in one piece, by the definition."""
    cache = cache_of(decoder)
    return feed(decoder, cache, cache.lanes.open(), TOKENS, total=LENGTH)
