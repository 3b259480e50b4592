"""Fused steps: several tokens of a sequence in one step have the logits of single steps, bit for bit."""

import numpy as np
import pytest
import torch

from harness.tiny_model import batch_of, random_tokens, random_weights, tiny_config
from kvloom.cache.kvcache import KVCache
from kvloom.models.compiled import CompiledModel
from kvloom.models.model import StepWanted
from kvloom.spec.store import NATIVE_STORE, SLAB_BYTES

pytest.importorskip("kvloom.kernels.cpu._ext", reason="the CPU kernels are not built")

RATIOS = [(6, 2), (7, 1), (12, 1), (16, 1)]
"""Query heads and KV heads."""


def logits_of(model: CompiledModel, cache: KVCache, work: list[tuple[int, list[int]]]) -> list[torch.Tensor]:
    """Put tokens behind sequences in one step; returns the logits of each sequence's."""
    starts = [int(cache.lanes.seen[sequence]) for sequence, _ in work]
    for sequence, tokens in work:
        assert cache.lanes.extend(sequence, len(tokens))
    batch = batch_of([(sequence, start, tokens) for start, (sequence, tokens) in zip(starts, work, strict=True)])
    out = model.step(batch, cache, StepWanted(np.arange(batch.num_tokens, dtype=np.int32))).logits
    assert out is not None
    return list(out.split([len(tokens) for _, tokens in work]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", [None, "int8", "int4", "w8a8"])
@pytest.mark.parametrize(("heads", "groups"), RATIOS)
def test_sixteen_tokens_beside_other_sequences_equal_single_steps(
    heads: int, groups: int, quantization: str | None, dtype: torch.dtype
) -> None:
    config = tiny_config("llama", num_heads=heads, num_kv_heads=groups)
    model = CompiledModel(config, random_weights(config, dtype).items(), dtype, quantization)
    store = NATIVE_STORE[str(dtype).removeprefix("torch.")]
    cache = KVCache(config.kv_spec(16, store), 40 * SLAB_BYTES, 40, dtype, layout="cpu")
    prompt, drafted = random_tokens(290), random_tokens(16, seed=1)
    sequences = [cache.lanes.open() for _ in range(33)]
    for sequence in sequences[:2]:
        logits_of(model, cache, [(sequence, prompt)])
    for i, sequence in enumerate(sequences[2:]):
        logits_of(model, cache, [(sequence, random_tokens(20 + i, seed=i))])
    alone = torch.cat([logits_of(model, cache, [(sequences[0], [token])])[0] for token in drafted])
    beside = [(sequence, random_tokens(1 + i % 16, seed=i)) for i, sequence in enumerate(sequences[2:])]
    together = logits_of(model, cache, [*beside[:15], (sequences[1], drafted), *beside[15:]])[15]
    assert torch.equal(together, alone)
