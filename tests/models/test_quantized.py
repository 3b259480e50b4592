"""Quantised models compute what the model of their dequantised weights computes."""

import numpy as np
import pytest
import torch

from harness.dequantized import dequantized
from harness.tiny_model import batch_of, random_tokens, random_weights, tiny_config
from harness.tolerances import LOGITS_FLOAT32
from kvloom.cache.kvcache import KVCache
from kvloom.models.compiled import CompiledModel
from kvloom.models.model import StepWanted
from kvloom.spec.store import SLAB_BYTES

pytest.importorskip("kvloom.kernels.cpu._ext", reason="the CPU kernels are not built")


def logits_of(model: CompiledModel, tokens: list[int], cuts: list[int]) -> torch.Tensor:
    """Return logits [T, V] of `tokens` in steps that end at `cuts`."""
    cache = KVCache(model.config.kv_spec(16, "fp32"), 4 * SLAB_BYTES, 2, torch.float32, layout="cpu")
    sequence, rows = cache.lanes.open(), []
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        assert cache.lanes.extend(sequence, end - start)
        batch = batch_of([(sequence, start, tokens[start:end])])
        rows.append(model.step(batch, cache, StepWanted(np.arange(end - start, dtype=np.int32))).logits)
    return torch.cat(rows)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_a_quantised_model_is_the_model_of_its_dequantised_weights(family: str, quantization: str) -> None:
    config = tiny_config(family)
    weights = random_weights(config)
    rounded = {name: dequantized(name, weight, quantization) for name, weight in weights.items()}
    tokens = random_tokens(110)
    found = logits_of(CompiledModel(config, weights.items(), torch.float32, quantization), tokens, [100, 101, 108])
    expected = logits_of(CompiledModel(config, rounded.items(), torch.float32), tokens, [])
    assert (found - expected).abs().max() < LOGITS_FLOAT32
    exact = logits_of(CompiledModel(config, weights.items(), torch.float32), tokens, [])
    assert (found - exact).abs().max() > LOGITS_FLOAT32  # else nothing was quantised


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_activations_in_8_bits_cost_little_beside_weights_in_8_bits(family: str) -> None:
    config = tiny_config(family)
    weights, tokens = random_weights(config), random_tokens(60)
    exact = logits_of(CompiledModel(config, weights.items(), torch.float32), tokens, [])
    off = {
        name: (logits_of(CompiledModel(config, weights.items(), torch.float32, name), tokens, [50, 51]) - exact).norm()
        for name in ("int8", "w8a8")
    }
    assert off["int8"] < off["w8a8"] < 1.5 * off["int8"]


def test_int4_leaves_the_vocabulary_in_8_bits() -> None:
    config = tiny_config("llama")
    weights = random_weights(config)
    halved, whole = (CompiledModel(config, weights.items(), torch.float32, name).num_bytes for name in ("int4", "int8"))
    smaller = CompiledModel(config, weights.items(), torch.float32).num_bytes
    vocabulary = 2 * 224 * (48 + 4)  # embedding and output layer: panels of 32 rows, codes and a scale for each
    norms = sum(weight.numel() * 4 for weight in weights.values() if weight.dim() == 1)
    qkv, o, gate_up, down = 128 * 64, 64 * 64, 192 * 64, 64 * 96  # rows in whole panels, inputs in whole groups
    assert halved == vocabulary + norms + 3 * (qkv + o + gate_up + down) * 5 // 8
    assert halved < whole < smaller
