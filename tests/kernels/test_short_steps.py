"""Tokens that are attended to in one step are attended to as in steps of their own, bit for bit."""

import numpy as np
import pytest
import torch

from harness.filled_lanes import FilledLanes, fill_lanes
from harness.threads import threads
from kvloom.kernels import cpu

COUNTS = (2, 3, 5, 8, 13, 16)
RATIOS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 32, 48, 71)
"""Query heads for each KV head: those of all families and the ends of what is treated alike."""


def at_once(filled: FilledLanes, rows: list[int], queries: list[torch.Tensor]) -> list[torch.Tensor]:
    """Attention of the last tokens of sequences `rows`, as many as each has queries, in one call."""
    cu = np.cumsum([0, *map(len, queries)], dtype=np.int32)
    out = cpu.attention(filled.lanes, filled.shape, cu, np.array(rows, np.int32), torch.cat(queries), 0.2)
    return list(out.split([len(q) for q in queries]))


def one_by_one(filled: FilledLanes, row: int, q: torch.Tensor) -> torch.Tensor:
    """Attention of the last tokens of sequence `row` in as many calls, each before the later tokens are there."""
    whole, lanes = (
        filled.end.copy(),
        slice(filled.shape.lane_offset, filled.shape.lane_offset + filled.shape.num_kv_heads),
    )
    found = []
    for i in range(len(q)):
        filled.end[row, lanes] = whole[row, lanes] - len(q) + i + 1
        found += at_once(filled, [row], [q[i : i + 1]])
    filled.end[:] = whole
    return torch.cat(found)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("store", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_up_to_sixteen_tokens_in_one_step_equal_single_steps(
    isa: str, store: str, dtype: torch.dtype, ratio: int
) -> None:
    filled = fill_lanes(store, 2 * ratio, 2, 32, [530, 20])
    for count in COUNTS:
        q = torch.randn(count, 2 * ratio, 32).to(dtype)
        for row in (0, 1):
            assert torch.equal(at_once(filled, [row], [q])[0], one_by_one(filled, row, q))


@pytest.mark.parametrize("window", [17, 260])
@pytest.mark.parametrize("ratio", [1, 3, 8, 16])
def test_windows_change_nothing_about_that(isa: str, ratio: int, window: int) -> None:
    filled = fill_lanes("bf16", 2 * ratio, 2, 32, [530], window=window)
    for count in COUNTS:
        q = torch.randn(count, 2 * ratio, 32).bfloat16()
        assert torch.equal(at_once(filled, [0], [q])[0], one_by_one(filled, 0, q))


@pytest.mark.parametrize("store", ["bf16", "int8", "fp8_e4m3"])
@pytest.mark.parametrize("count", [1, 3])
def test_neither_do_thirty_one_other_sequences_and_the_number_of_threads(isa: str, store: str, count: int) -> None:
    lengths = [530, *(20 + 37 * i for i in range(31))]
    filled = fill_lanes(store, 9, 3, 32, lengths)
    queries = [torch.randn(1 + i % 16 if i else 7, 9, 32).bfloat16() for i in range(32)]
    together = at_once(filled, list(range(32)), queries)
    with threads(count):
        for row in (0, 5, 31):
            assert torch.equal(together[row], one_by_one(filled, row, queries[row]))
