"""Gemma 3 270M after 16,000 tokens: windowed lanes hold their window and nothing else, and logits are transformers'.

15 of its 18 layers see 512 tokens, the other three everything; each has one KV head of 256. A block of 16 tokens of one
lane is 16 x (256 + 256) x 4 = 32,768 bytes in float32. After n tokens a full lane holds ceil(n / 16) blocks. The next
token sees 511 before it, which lie in at most 33 blocks, so this is what a windowed lane has while tokens come singly.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.golden import digest, golden
from harness.real_prompts import LONG_CHUNK, LONG_NEW, LONG_PROMPT, long_prompt
from harness.tiny_engine import nothing_left
from harness.tolerances import LOGITS_FLOAT32
from kvloom import LLM, SamplingParams
from kvloom.spec.footprint import held_bytes, request_footprint
from kvloom.spec.policy import PolicySpec
from kvloom.spec.solo import solo_peak

pytestmark = [pytest.mark.real_model, pytest.mark.usefixtures("two_threads"), pytest.mark.timeout(1800)]

PROMPT, NEW, CHUNK, BLOCK = LONG_PROMPT, LONG_NEW, LONG_CHUNK, 32_768
WINDOWED, FULL = 15, 3


@dataclass
class Step:
    """Lanes after one step: tokens seen, tokens held and blocks of each lane, and bytes walked from the live table."""

    seen: int
    held: list[int]
    blocks: np.ndarray
    used: int


@dataclass
class Generation:
    """A prompt, its greedy answer, the logits [NEW, vocab] of the answer, and the lanes after each step."""

    llm: LLM
    prompt: list[int]
    answer: list[int]
    logits: torch.Tensor
    steps: list[Step]


@pytest.fixture(scope="module")
def generation(gemma_path: Path, two_threads: None) -> Generation:
    llm = LLM(
        gemma_path, dtype="float32", backend="cpu", max_num_seqs=1, max_num_batched_tokens=CHUNK,
        kv_cache_memory_bytes=256 << 20, enable_prefix_caching=False,
    )  # fmt: skip
    engine, cache, logits, steps = llm.engine, llm.engine.cache, [], []
    engine.continuation.observer = lambda sequences, rows: logits.append(rows.clone())
    prompt = long_prompt(llm.tokenizer)
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    sequence = engine.add(prompt, params).sequences[0]
    while engine.has_work:
        engine.step()
        if sequence.row is not None:
            table = cache.lanes.table[sequence.row]
            addresses = np.unique(table[table >= 0])
            assert len(addresses) == (table >= 0).sum(), "nothing is shared here"
            used = int(cache.arena.block_bytes_at(addresses).sum())
            seen, held = int(cache.lanes.seen[sequence.row]), cache.lanes.held[sequence.row].tolist()
            steps.append(Step(seen, held, (table >= 0).sum(axis=1), used))
    nothing_left(engine)
    return Generation(llm, prompt, sequence.output_token_ids, torch.cat(logits), steps)


def test_lanes_hold_whole_texts_or_windows(generation: Generation) -> None:
    windows = [layer.window for layer in generation.llm.engine.cache.spec.layers]
    windowed = np.array([window == 512 for window in windows])
    assert windowed.sum() == WINDOWED and windows.count(None) == FULL
    for step in generation.steps:
        assert (step.blocks[~windowed] == -(-step.seen // 16)).all()
        assert step.blocks[windowed].max() <= (33 if step.seen > PROMPT else (511 + CHUNK) // 16 + 1)
    after = [step.seen for step in generation.steps if step.seen >= PROMPT]
    assert after == list(range(PROMPT, PROMPT + NEW - 1))  # the last token is never put through the model


def test_bytes_in_use_are_the_planned_ones(generation: Generation) -> None:
    kv, full = generation.llm.engine.cache.spec, PolicySpec.parse("full")
    for step in generation.steps:
        assert step.used == step.blocks.sum() * BLOCK == held_bytes(kv, full, step.held, step.seen)
        if step.seen >= PROMPT:
            planned = request_footprint(kv, full, PROMPT, step.seen - PROMPT, CHUNK)
            bounds = planned.settled if step.seen == PROMPT else planned.end
            assert bounds.low <= step.used <= bounds.high
    # most is held after the last whole chunk: 7 x 2,048 tokens in full lanes, 511 + 2,048 in windowed ones
    most = (FULL * 896 + WINDOWED * 160) * BLOCK
    assert generation.llm.engine.cache.arena.peak_bytes == max(step.used for step in generation.steps) == most
    assert most == solo_peak(kv, full, PROMPT, NEW, CHUNK)
    assert most <= request_footprint(kv, full, PROMPT, NEW, CHUNK).peak.high


def test_logits_after_16000_tokens_are_those_of_transformers(generation: Generation) -> None:
    """The 32 best logits of each row and the log-sum-exp of all."""
    expected = golden("gemma")["long"]
    assert (digest(generation.prompt), generation.answer) == (expected["prompt"], expected["tokens"])
    assert generation.logits.shape == (NEW, generation.llm.engine.runner.model.config.vocab_size)
    found = generation.logits.gather(1, torch.tensor(expected["best_tokens"]))
    assert (found - torch.tensor(expected["best_logits"])).abs().max() < LOGITS_FLOAT32
    total = generation.logits.double().logsumexp(-1)
    assert (total - torch.tensor(expected["logsumexp"])).abs().max() < LOGITS_FLOAT32
