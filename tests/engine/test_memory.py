"""32 requests of 96 + 33 tokens under a memory limit, with bytes counted by hand.

SmolLM2 has 30 layers of 3 lanes, heads of 64. A block of 16 tokens of one lane is 16 x (64 + 64) x 4 = 8,192 bytes in
float32. A request ends with 96 + 32 tokens in the cache (the last one is never put through the model): 8 blocks in
each of 90 lanes. 32 requests need 32 x 90 x 8 x 8,192 = 188,743,680 bytes = 90 slabs of 2 MiB, and get exactly that.
The tiny model has 3 of the 30 layers, and so a tenth: 18,874,368 bytes = 9 slabs.
"""

from pathlib import Path

import numpy as np
import pytest

from harness.tiny_engine import finish, greedy, nothing_left, tiny_engine
from harness.tiny_model import FULL, random_tokens
from kvloom.engine.engine import Engine
from kvloom.engine.llm import LLM

LIMIT, TENTH = 188_743_680, 18_874_368
AFTER_PREFILL, TENTH_AFTER_PREFILL = 141_557_760, 14_155_776
PER_REQUEST, TENTH_PER_REQUEST = 5_898_240, 589_824
REQUESTS, PROMPT, NEW = 32, 96, 33

SHAPE = {
    "num_heads": 3, "num_kv_heads": 3, "head_dim": 64, "layers": (FULL,) * 3, "hidden_size": 32,
    "intermediate_size": 32, "max_num_seqs": 32, "max_num_batched_tokens": 8192,
}  # fmt: skip


def walked_bytes(engine: Engine, block_bytes: int) -> int:
    """Unique live extents, from the rows of running requests alone; asserts that they do not overlap."""
    table = engine.cache.lanes.table[[s.row for s in engine.scheduler.running]]
    addresses = np.unique(table[table >= 0]).astype(np.int64) * 128
    assert (np.diff(addresses) >= block_bytes).all()
    assert len(addresses) == (table >= 0).sum(), "nothing is shared here"
    return len(addresses) * block_bytes


def run_to_the_brim(engine: Engine, lanes: int, limit: int, after_prefill: int, per_request: int) -> None:
    """Run the 32 requests, all in step with one another, and compare bytes with the constants after each step."""
    vocab = engine.runner.model.config.vocab_size
    requests = [engine.add(random_tokens(PROMPT, vocab, seed), greedy(NEW)) for seed in range(REQUESTS)]
    for step in range(NEW):
        engine.step()
        if step == 0:
            assert engine.cache.bytes_in_use == after_prefill
        if step < NEW - 1:
            expected = REQUESTS * lanes * -(-(PROMPT + step) // 16) * 8192
            assert engine.cache.bytes_in_use == walked_bytes(engine, 8192) == expected
    assert engine.cache.arena.num_bytes == engine.cache.arena.peak_bytes == limit
    assert all(request.finished for request in requests)
    for request in requests:
        usage = engine.output(request).kv
        assert (usage.bytes_now, usage.bytes_peak) == (0, per_request)
        assert (usage.preemptions, usage.evicted_tokens, usage.cached_tokens) == (0, 0, 0)
    nothing_left(engine)


@pytest.mark.parametrize("kind", ["eager", "cpu"])
def test_thirty_two_requests_fill_the_limit_to_the_last_byte_and_give_everything_back(kind: str) -> None:
    engine = tiny_engine(kind=kind, slabs=9, **SHAPE)  # type: ignore[arg-type]
    run_to_the_brim(engine, 9, TENTH, TENTH_AFTER_PREFILL, TENTH_PER_REQUEST)


@pytest.mark.real_model
@pytest.mark.usefixtures("two_threads")
def test_the_real_model_fills_the_limit_to_the_last_byte_and_gives_everything_back(smollm2_path: Path) -> None:
    llm = LLM(
        str(smollm2_path), dtype="float32", kv_cache_memory_bytes=LIMIT, max_num_seqs=32, max_num_batched_tokens=8192
    )
    assert llm.stats()["kv_cache_bytes"] == LIMIT
    run_to_the_brim(llm.engine, 90, LIMIT, AFTER_PREFILL, PER_REQUEST)
    stats = llm.stats()
    assert stats["kv_bytes_in_use"] == stats["kv_bytes_cached"] == stats["requests_running"] == 0
    assert stats["kv_bytes_peak"] == LIMIT and stats["preemptions"] == 0


def test_one_slab_less_preempts_and_still_finishes_all() -> None:
    engine = tiny_engine(kind="cpu", slabs=8, **SHAPE)  # type: ignore[arg-type]
    requests = [engine.add(random_tokens(PROMPT, seed=seed), greedy(NEW)) for seed in range(REQUESTS)]
    finish(engine)
    assert engine.scheduler.num_preemptions > 0
    assert [request.sequences[0].num_output_tokens for request in requests] == [NEW] * REQUESTS
    assert engine.cache.arena.peak_bytes <= TENTH - (2 << 20)
    nothing_left(engine)


def test_windowed_lanes_keep_their_bytes_bounded_while_the_text_grows() -> None:
    """Two windowed lanes of 20 tokens need at most 3 blocks of 2 KiB in single steps; the full lane grows."""
    engine = tiny_engine("gemma3", prefix=False)
    engine.add(random_tokens(30), greedy(400))
    while engine.has_work:
        engine.step()
        if engine.scheduler.running and engine.num_steps > 20:
            seen = 30 + engine.num_steps - 1
            row = engine.scheduler.running[0].row
            blocks = (engine.cache.lanes.table[row] >= 0).sum(axis=1).tolist()
            assert blocks[2] == -(-seen // 16) and blocks[0] == blocks[1] <= 3
            assert engine.cache.bytes_in_use == sum(blocks) * 2048
    nothing_left(engine)
