"""The CPU kernels on families that they can run: logits of transformers; and reasons for those that they cannot."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from families import VARIANTS, decoder_of, expected_logits, oracle_of
from kvloom.cache.kvcache import KVCache
from kvloom.models.compiled import CompiledModel, unsupported
from kvloom.models.model import StepWanted
from kvloom.spec.store import SLAB_BYTES
from tiny_model import batch_of, random_tokens
from tolerances import LOGITS_FLOAT32

pytest.importorskip("kvloom.kernels.cpu._ext", reason="the CPU kernels are not built")

WIDE = {"head_dim": 16}
RUNNABLE = {
    "llama, yarn": WIDE,
    "llama, llama3": WIDE,
    "mistral, window": WIDE,
    "qwen2": {"hidden_size": 64},
    "qwen3": {},
    "smollm3": {"hidden_size": 64},
    "gemma2": {},
    "glm, neighbours on half of each head": {},
    "phi3, window": {"hidden_size": 64},
}


@pytest.mark.parametrize("variant", RUNNABLE)
def test_whole_steps_have_the_logits_of_transformers(variant, tmp_path, monkeypatch):
    kind, changes = VARIANTS[variant]
    monkeypatch.setitem(VARIANTS, variant, (kind, {**changes, **RUNNABLE[variant]}))
    oracle = oracle_of(variant)
    decoder = decoder_of(oracle, tmp_path)
    config = decoder.config
    assert unsupported(config, 16) == []
    model = CompiledModel(config, decoder.weights.items(), torch.float32)
    cache = KVCache(config.kv_spec(16, "fp32"), 4 * SLAB_BYTES, 2, torch.float32, layout="cpu")
    tokens = random_tokens(70, 131)
    sequence = cache.lanes.open()
    rows = []
    for start, end in ((0, 37), (37, 60), *((i, i + 1) for i in range(60, 70))):
        assert cache.lanes.extend(sequence, end - start)
        wanted = StepWanted(np.arange(end - start, dtype=np.int32), hidden=True)
        output = model.step(batch_of([(sequence, start, tokens[start:end])]), cache, wanted)
        assert (model.logits(output.hidden) - output.logits).abs().max() < LOGITS_FLOAT32
        rows.append(output.logits)
    assert (torch.cat(rows) - expected_logits(oracle, tokens)).abs().max() < LOGITS_FLOAT32


def test_sinks_and_slopes_mean_the_same_in_both_decoders(tmp_path):
    from families import feed
    from kvloom.models.decoder import Decoder
    from tiny_model import cache_of, random_weights, tiny_config

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


@pytest.mark.parametrize(
    ("variant", "reason"),
    [("llama, dynamic", "depends on the length"), ("phi3, longrope", "depends on the length")],
)
def test_what_the_kernels_cannot_run_is_named(variant, reason, tmp_path):
    config = decoder_of(oracle_of(variant), tmp_path).config
    assert any(reason in entry for entry in unsupported(config, 16))
