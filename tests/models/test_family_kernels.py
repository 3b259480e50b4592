"""The CPU kernels on every family that they run: logits of transformers; and reasons for those that they cannot run."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from harness.families import VARIANTS, decoder_of, expected_logits, longrope, oracle_of
from harness.tiny_model import batch_of, random_tokens
from harness.tolerances import LOGITS_FLOAT32
from kvloom.cache.kvcache import KVCache
from kvloom.models.compiled import CompiledModel
from kvloom.models.model import StepWanted
from kvloom.spec.kernels import unsupported
from kvloom.spec.store import SLAB_BYTES

pytest.importorskip("kvloom.kernels.cpu._ext", reason="the CPU kernels are not built")

LENGTH = 70
"""Tokens of a test text: twice the original context of the variants that extend it."""

WIDER = {
    "gpt2": {"n_embd": 64}, "gpt2, untied": {"n_embd": 64}, "gpt-bigcode": {"n_embd": 64},
    "gpt-bigcode, multi-head": {"n_embd": 64}, "bloom": {"hidden_size": 64}, "bloom, six heads": {"hidden_size": 96},
    "mpt": {"d_model": 64}, "mpt, six heads": {"d_model": 96}, "llama, longrope": {"hidden_size": 64, **longrope(16)},
    "phi3, longrope": {"hidden_size": 64, **longrope(16)}, "mistral, wide heads": {"head_dim": 32},
}  # fmt: skip
"""Changes that make heads a multiple of 16; of other variants a hidden size of 64 does."""
RUNNABLE = [name for name, (kind, _) in VARIANTS.items() if kind != "Nemotron"]
"""Variants whose parts the kernels have: they lack the squared ReLU."""


@pytest.fixture(scope="module", params=RUNNABLE)
def pair(request, tmp_path_factory):
    """Return (compiled model, model of transformers) of one variant."""
    kind, changes = VARIANTS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        wider = WIDER.get(request.param, {"hidden_size": 64})
        patch.setitem(VARIANTS, request.param, (kind, {**changes, **wider}))
        oracle = oracle_of(request.param)
    decoder = decoder_of(oracle, tmp_path_factory.mktemp("model"))
    assert unsupported(decoder.config, 16) == []
    return CompiledModel(decoder.config, decoder.weights.items(), torch.float32), oracle


def cache_of(model):
    """Return an empty cache for a compiled model."""
    return KVCache(model.config.kv_spec(16, "fp32"), 4 * SLAB_BYTES, 3, torch.float32, layout="cpu")


def step(model, cache, sequence, tokens, total, **wanted):
    """Put `tokens` through the model as part of `total`; returns what it hands back."""
    start = int(cache.lanes.seen[sequence])
    assert cache.lanes.extend(sequence, len(tokens))
    length_class = np.array([model.config.length_class(total)], np.int32)
    batch = replace(batch_of([(sequence, start, tokens)]), length_class=length_class)
    return model.step(batch, cache, StepWanted(np.arange(len(tokens), dtype=np.int32), **wanted))


def test_chunks_and_single_tokens_have_the_logits_of_transformers(pair):
    model, oracle = pair
    cache, tokens, rows = cache_of(model), random_tokens(LENGTH, 131), []
    sequence = cache.lanes.open()
    for start, end in ((0, 37), (37, 60), *((i, i + 1) for i in range(60, LENGTH))):
        output = step(model, cache, sequence, tokens[start:end], LENGTH, hidden=True)
        assert (model.logits(output.hidden) - output.logits).abs().max() < LOGITS_FLOAT32
        rows.append(output.logits)
    assert (torch.cat(rows) - expected_logits(oracle, tokens)).abs().max() < LOGITS_FLOAT32


def test_the_last_row_of_a_prompt_has_the_logits_of_transformers(pair):
    """The last layer then works on that row alone."""
    model, oracle = pair
    cache, tokens = cache_of(model), random_tokens(28, 131)
    sequence = cache.lanes.open()
    assert cache.lanes.extend(sequence, 28)
    output = model.step(batch_of([(sequence, 0, tokens)]), cache, StepWanted(np.array([27], np.int32)))
    assert (output.logits - expected_logits(oracle, tokens)[27:]).abs().max() < LOGITS_FLOAT32


def test_an_adopted_prefix_is_as_good_as_a_computed_one(pair):
    model, oracle = pair
    cache, tokens = cache_of(model), random_tokens(LENGTH, 131)
    first = cache.lanes.open()
    step(model, cache, first, tokens[:64], LENGTH)
    cache.lanes.publish(first, cache.chain(), tokens, 0, 4)
    cache.lanes.close(first)
    second = cache.lanes.open()
    cache.lanes.adopt(second, cache.index.match(tokens, cache.chain(), LENGTH - 1))
    found = step(model, cache, second, tokens[64:], LENGTH).logits
    assert (found - expected_logits(oracle, tokens)[64:]).abs().max() < LOGITS_FLOAT32


def test_norms_of_layer_inputs_are_those_of_the_hidden_states_of_transformers(pair):
    model, oracle = pair
    cache, tokens = cache_of(model), random_tokens(28, 131)
    found = step(model, cache, cache.lanes.open(), tokens, 28, input_norms=True).input_norms
    with torch.no_grad():
        states = oracle(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    unit = getattr(oracle.config, "residual_multiplier", 1.0)  # Granite's decoder runs on x divided by it
    expected = torch.stack([state[0].float().norm(dim=-1) for state in states[: model.config.num_layers]]) / unit
    assert ((found - expected).abs() / expected).max() < 1e-4


def test_sequences_of_unlike_length_are_rotated_each_by_its_own_frequencies(tmp_path, monkeypatch):
    kind, changes = VARIANTS["llama, dynamic"]
    monkeypatch.setitem(VARIANTS, "llama, dynamic", (kind, {**changes, "hidden_size": 64}))
    oracle = oracle_of("llama, dynamic")
    decoder = decoder_of(oracle, tmp_path)
    model = CompiledModel(decoder.config, decoder.weights.items(), torch.float32)
    cache = cache_of(model)
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


def test_sinks_and_slopes_mean_the_same_in_both_decoders(tmp_path):
    from harness.tiny_model import cache_of, feed, random_weights, tiny_config
    from kvloom.models.decoder import Decoder

    config = tiny_config("llama")
    weights = random_weights(config)
    weights |= {f"layers.{i}.sinks": torch.randn(4) for i in range(config.num_layers)}
    config = replace(config, sinks=True, slopes=(0.5, 0.25, 0.125, 0.0625))
    model = CompiledModel(config, weights.items(), torch.float32)
    cache = KVCache(config.kv_spec(16, "fp32"), 4 * SLAB_BYTES, 2, torch.float32, layout="cpu")
    tokens = random_tokens(50, 131)
    sequence = cache.lanes.open()
    assert cache.lanes.extend(sequence, 50)
    found = model.step(batch_of([(sequence, 0, tokens)]), cache, StepWanted(np.arange(50, dtype=np.int32)))
    decoder = Decoder(config, weights)
    eager = cache_of(decoder)
    expected = feed(decoder, eager, eager.lanes.open(), tokens)
    assert (found.logits - expected).abs().max() < LOGITS_FLOAT32
    plain = Decoder(replace(config, sinks=False, slopes=()), {n: w for n, w in weights.items() if "sinks" not in n})
    other = cache_of(plain)
    assert (feed(plain, other, other.lanes.open(), tokens) - expected).abs().max() > 0.1


def test_what_the_kernels_cannot_run_is_named(tmp_path):
    config = decoder_of(oracle_of("gpt2"), tmp_path).config
    assert any("head_dim is 12; the kernels take multiples" in entry for entry in unsupported(config, 16))
