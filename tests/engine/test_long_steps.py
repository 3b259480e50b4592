"""A long step, which the kernels cut into stretches: results are those of each sequence by itself."""

import numpy as np
import pytest
import torch

from harness.tiny_model import batch_of, random_tokens, random_weights, tiny_config
from harness.tolerances import LOGITS_FLOAT32
from kvloom.cache.kvcache import KVCache
from kvloom.models.compiled import CompiledModel
from kvloom.models.model import StepOutput, StepWanted
from kvloom.spec.store import SLAB_BYTES

pytest.importorskip("kvloom.kernels.cpu._ext", reason="the CPU kernels are not built")

SHAPES = {"llama": {"num_heads": 4, "head_dim": 64}, "gemma3": {"num_heads": 2, "head_dim": 256},
          "gpt_neox": {"head_dim": 32, "shared_norm": True}}  # fmt: skip
LENGTHS = (1, 1003, 2, 701, 40)  # 1,747 tokens are four stretches, 1,003 alone are two, 701 are one
PROMPTS = [random_tokens(n, seed=n) for n in LENGTHS]


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt_neox"])
def model(request: pytest.FixtureRequest) -> CompiledModel:
    config = tiny_config(request.param, **SHAPES[request.param])
    return CompiledModel(config, random_weights(config).items(), torch.float32)


def step(model: CompiledModel, prompts: list[list[int]], chunk: int = 0) -> StepOutput:
    """Put all prompts through the model from an empty cache in one step, or in steps of `chunk`; returns the last."""
    cache = KVCache(model.config.kv_spec(16, "fp32"), 24 * SLAB_BYTES, 8, torch.float32, layout="cpu")
    sequences = [cache.lanes.open() for _ in prompts]
    length = max(map(len, prompts))
    for start in range(0, length, chunk or length):
        parts = [tokens[start : start + (chunk or length)] for tokens in prompts]
        count = sum(map(len, parts))
        for sequence, part in zip(sequences, parts, strict=True):
            assert cache.lanes.extend(sequence, len(part))
        rows = np.arange(count, dtype=np.int32)
        batch = batch_of([(sequence, start, part) for sequence, part in zip(sequences, parts, strict=True)])
        output = model.step(batch, cache, StepWanted(rows[-1:], hidden=True, query_rows=rows, lse=True))
    return output


def test_nothing_depends_on_where_a_batch_is_cut(model: CompiledModel) -> None:
    together = step(model, PROMPTS)
    assert together.queries is not None
    queries = together.queries.clone()  # the next step writes to the same memory
    assert together.hidden is not None and together.lse is not None
    at = 0
    for tokens in PROMPTS:
        alone, rows = step(model, [tokens]), slice(at, at + len(tokens))
        assert alone.hidden is not None and torch.equal(together.hidden[rows], alone.hidden)
        assert alone.queries is not None and torch.equal(queries[:, rows], alone.queries)
        assert alone.lse is not None and torch.equal(together.lse[:, rows], alone.lse)
        at = rows.stop


def test_a_long_step_has_the_hidden_states_of_short_ones(model: CompiledModel) -> None:
    tokens = PROMPTS[1]
    whole, last = step(model, [tokens]), step(model, [tokens], chunk=400)
    assert whole.hidden is not None and last.hidden is not None
    assert (whole.hidden[-len(last.hidden) :] - last.hidden).abs().max() < LOGITS_FLOAT32


@pytest.mark.parametrize("prepared", [600, 1003, 4000])
def test_buffers_made_ahead_change_nothing(model: CompiledModel, prepared: int) -> None:
    tokens = PROMPTS[1]
    config = model.config
    other = CompiledModel(config, random_weights(config).items(), torch.float32)
    other.prepare(prepared)
    expected, found = step(model, [tokens]), step(other, [tokens])
    assert expected.hidden is not None and found.hidden is not None and torch.equal(expected.hidden, found.hidden)
