"""Models with experts beside dense layers: fused steps have the logits of the reference decoder, quantised too."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from harness.dequantized import dequantized
from harness.tiny_model import FULL, batch_of, cache_of, feed, random_tokens, random_weights, tiny_config
from harness.tolerances import LOGITS_FLOAT32
from kvloom.cache.kvcache import KVCache
from kvloom.models.compiled import CompiledModel
from kvloom.models.decoder import Decoder
from kvloom.models.model import StepWanted
from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.store import SLAB_BYTES
from mixtures import HIDDEN, WIDE, mixture_of

pytest.importorskip("kvloom.kernels.cpu._ext", reason="the CPU kernels are not built")

DENSE = ("gate", "up", "down")


def model_of(name: str) -> tuple[DecoderConfig, dict[str, torch.Tensor]]:
    """Return config and weights of a tiny llama whose last two layers of three have the mixture `name`."""
    mixture, layers = mixture_of(name), (FULL, replace(FULL, routed=True), replace(FULL, routed=True))
    config = tiny_config("llama", hidden_size=HIDDEN, layers=layers, experts=mixture.experts)
    weights = {
        key: value
        for key, value in random_weights(config).items()
        if key.startswith("layers.0.") or key.rpartition(".")[2] not in DENSE
    }
    for layer in (1, 2):
        weights |= {f"layers.{layer}.{key}": value for key, value in mixture.weights.items()}
    return config, weights


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2_moe", "gpt_oss"])
def test_chunks_and_single_tokens_have_the_logits_of_the_definition(name: str, quantization: str | None) -> None:
    config, weights = model_of(name)
    model = CompiledModel(config, weights.items(), torch.float32, quantization)
    if quantization is not None:
        weights = {key: dequantized(key, weight, quantization) for key, weight in weights.items()}
    definition = Decoder(config, weights)
    eager = cache_of(definition)
    tokens, rows = random_tokens(40), []
    expected = feed(definition, eager, eager.lanes.open(), tokens)
    cache = KVCache(config.kv_spec(16, "fp32"), 4 * SLAB_BYTES, 2, torch.float32, layout="cpu")
    sequence = cache.lanes.open()
    for start, end in ((0, 30), (30, 37), (37, 38), (38, 39), (39, 40)):
        assert cache.lanes.extend(sequence, end - start)
        batch = batch_of([(sequence, start, tokens[start:end])])
        rows.append(model.step(batch, cache, StepWanted(np.arange(end - start, dtype=np.int32))).logits)
    assert (torch.cat(rows) - expected).abs().max() < LOGITS_FLOAT32


def test_a_step_counts_the_bytes_of_the_experts_that_it_reads() -> None:
    config, weights = model_of("qwen2_moe")
    model = CompiledModel(config, weights.items(), torch.float32)
    cache = KVCache(config.kv_spec(16, "fp32"), 4 * SLAB_BYTES, 2, torch.float32, layout="cpu")
    sequence = cache.lanes.open()
    assert cache.lanes.extend(sequence, 1)
    model.step(batch_of([(sequence, 0, [5])]), cache, StepWanted(np.zeros(1, np.int32)))
    experts, shared = 4 * 3 * HIDDEN * WIDE, 3 * HIDDEN * 80
    assert model.expert_bytes == 2 * (experts + shared) * 4
