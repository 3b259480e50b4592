"""The last layer computes wanted rows only: logits do not depend on the other wanted rows."""

import numpy as np
import pytest
import torch

from harness.tiny_model import batch_of, random_tokens, random_weights, tiny_config
from harness.tolerances import LOGITS_FLOAT32
from kvloom.cache.kvcache import KVCache
from kvloom.models.compiled import CompiledModel
from kvloom.models.model import StepWanted
from kvloom.spec.store import SLAB_BYTES

pytest.importorskip("kvloom.kernels.cpu._ext", reason="the CPU kernels are not built")

SHAPES = {"llama": {"num_heads": 4, "head_dim": 64}, "gemma3": {"num_heads": 2, "head_dim": 256},
          "gpt_neox": {"head_dim": 32, "shared_norm": True}}  # fmt: skip
LENGTHS = (1, 1703, 2, 150, 1)  # 1,857 tokens are two stretches
TOTAL = sum(LENGTHS)
PROMPTS = [random_tokens(n, seed=n) for n in LENGTHS]
ROWS = {
    "the last token of each": [0, 1703, 1705, 1855, 1856],
    "one prompt goes on in the next step": [0, 1705, 1855, 1856],
    "one token of all": [1855],
    "some last tokens, in both stretches": [900, *range(1690, 1704), 1855],
    "two far apart, and out of order": [1856, 1702, 40],
    "nothing": [],
}


@pytest.fixture(scope="module", params=[("llama", None), ("gemma3", None), ("llama", "w8a8"), ("gpt_neox", None)],
                ids=str)  # fmt: skip
def model(request: pytest.FixtureRequest) -> CompiledModel:
    family, quantization = request.param
    config = tiny_config(family, **SHAPES[family])
    return CompiledModel(config, random_weights(config).items(), torch.float32, quantization)


def steps(model: CompiledModel, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put all prompts through the model. Returns logits of `rows`, all queries, and the logits of the step after."""
    cache = KVCache(model.config.kv_spec(16, "fp32"), 24 * SLAB_BYTES, 8, torch.float32, layout="cpu")
    sequences = [cache.lanes.open() for _ in PROMPTS]
    work = []
    for sequence, tokens in zip(sequences, PROMPTS, strict=True):
        assert cache.lanes.extend(sequence, len(tokens))
        work.append((sequence, 0, tokens))
    wanted = StepWanted(np.array(rows, np.int32), query_rows=np.arange(TOTAL, dtype=np.int32))
    output = model.step(batch_of(work), cache, wanted)
    assert output.logits is not None and output.queries is not None
    logits, queries = output.logits.clone(), output.queries.clone()  # the next step writes to the same memory
    for sequence in sequences:
        assert cache.lanes.extend(sequence, 1)
    work = [(s, len(tokens), [7]) for s, tokens in zip(sequences, PROMPTS, strict=True)]
    after = model.step(batch_of(work), cache, StepWanted(np.arange(len(LENGTHS), dtype=np.int32))).logits
    assert after is not None
    return logits, queries, after.clone()


@pytest.fixture(scope="module")
def whole(model: CompiledModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return steps(model, list(range(TOTAL)))


@pytest.mark.parametrize("case", ROWS)
def test_a_step_gives_what_one_that_makes_all_logits_gives(
    model: CompiledModel, whole: tuple[torch.Tensor, torch.Tensor, torch.Tensor], case: str
) -> None:
    logits, queries, after = steps(model, ROWS[case])
    assert torch.allclose(logits, whole[0][ROWS[case]], atol=LOGITS_FLOAT32)
    assert torch.equal(queries, whole[1])
    assert torch.equal(after, whole[2])  # every key and value is there
