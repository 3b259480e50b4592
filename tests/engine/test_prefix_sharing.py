"""Prefixes are computed once, by the first request, and sharing them does not change answers."""

import pytest
import torch

from harness.tiny_engine import finish, greedy, nothing_left, run, tiny_engine
from harness.tiny_model import random_tokens
from kvloom.cache.arena import Addresses
from kvloom.engine.engine import Engine
from kvloom.engine.params import SamplingParams

PREFIX = random_tokens(1000, seed=9)
KINDS = pytest.mark.parametrize("kind", ["eager", "cpu"])
FAMILIES = pytest.mark.parametrize("family", ["llama", "gemma3"])


def ask(engine: Engine, prompt: list[int], **options: object) -> tuple[list[int], int]:
    """Return output tokens and cached tokens of a prompt."""
    request = engine.add(prompt, greedy(12), **options)  # type: ignore[arg-type]
    finish(engine)
    return request.sequences[0].output_token_ids, engine.output(request).num_cached_tokens


@KINDS
@FAMILIES
def test_a_shared_prefix_of_1000_tokens_is_computed_once(family: str, kind: str) -> None:
    engine = tiny_engine(family, kind=kind, max_num_batched_tokens=256)
    first, second = [*PREFIX, 1, 2, 3], [*PREFIX, 4, 5]
    _, cached = ask(engine, first)
    assert cached == 0
    steps = []
    request = engine.add(second, greedy(12))
    while engine.has_work:
        engine.step()
        steps.append(engine.last_step.tokens)
    assert engine.output(request).num_cached_tokens == 992  # 62 blocks of 16
    assert steps == [10] + [1] * 11
    assert engine.scheduler.prefixes.hits == 992 and engine.scheduler.prefixes.queries == 1003 + 1002
    fresh = tiny_engine(family, kind=kind, prefix=False, max_num_batched_tokens=256)
    assert request.sequences[0].output_token_ids == run(fresh, [second], greedy(12))[0]
    nothing_left(engine)


@KINDS
def test_requests_of_one_batch_share_what_an_earlier_step_computed(kind: str) -> None:
    engine = tiny_engine(kind=kind, max_num_batched_tokens=64)
    requests = [engine.add([*PREFIX[:640], place], greedy(3)) for place in range(4)]
    finish(engine)
    cached = [engine.output(request).num_cached_tokens for request in requests]
    assert cached == [0, 640, 640, 640]


@KINDS
def test_the_last_token_of_a_prompt_is_always_computed(kind: str) -> None:
    engine = tiny_engine(kind=kind)
    prompt = PREFIX[:64]
    first, _ = ask(engine, prompt)
    again, cached = ask(engine, prompt)
    assert cached == 48 and again == first


@KINDS
def test_an_answer_is_a_prefix_of_the_next_turn(kind: str) -> None:
    engine = tiny_engine(kind=kind)
    prompt = PREFIX[:60]
    answer, _ = ask(engine, prompt)
    _, cached = ask(engine, [*prompt, *answer, 7, 8, 9])
    assert cached == 64  # 60 + 11 tokens have K and V: the last of the answer was never put through the model


def test_requests_with_another_salt_share_nothing() -> None:
    engine = tiny_engine()
    prompt = PREFIX[:100]
    assert ask(engine, prompt, cache_salt="a")[1] == 0
    assert ask(engine, prompt, cache_salt="b")[1] == 0
    assert ask(engine, prompt)[1] == 0
    assert ask(engine, prompt, cache_salt="a")[1] == 96


def test_without_prefix_caching_nothing_is_kept() -> None:
    engine = tiny_engine(prefix=False)
    for _ in range(2):
        assert ask(engine, PREFIX[:100])[1] == 0
        assert engine.cache.arena.used_bytes == 0 and len(engine.cache.index) == 0


@pytest.mark.parametrize("kind", ["eager", "cpu"])
@pytest.mark.parametrize("gone", ["reclaimed", "kept by the index"])
def test_only_the_first_600_tokens_are_shared_and_the_local_blocks_of_token_600_are_long_gone(
    kind: str, gone: str
) -> None:
    """Windows of 20: after 1000 tokens in small steps a windowed lane holds the last two or three blocks."""
    engine = tiny_engine("gemma3", kind=kind, max_num_batched_tokens=16 if gone == "kept by the index" else 256)
    ask(engine, PREFIX)
    index, local = engine.cache.index, 0
    assert [group.window for group in engine.cache.spec.groups] == [20, None]
    if gone == "reclaimed":
        for entry in list(index._entries.values())[-45:]:  # first blocks are the newest: 1000 tokens are 62 blocks
            blocks: Addresses | None = entry.blocks[local]
            if blocks is not None:
                engine.cache.arena.release(blocks)
                entry.blocks[local] = None
    engine.cache.check_invariants()
    shorter = [*PREFIX[:600], *random_tokens(50, seed=3)]
    answer, cached = ask(engine, shorter)
    fresh = tiny_engine("gemma3", kind=kind, prefix=False, max_num_batched_tokens=256)
    assert answer == run(fresh, [shorter], greedy(12))[0]
    assert cached == (0 if gone == "reclaimed" else 592)
    again, cached = ask(engine, shorter)
    assert again == answer and cached == 640  # now they are there again
    nothing_left(engine)


def test_n_sequences_share_the_blocks_of_their_prompt() -> None:
    """100 tokens in 6 lanes of 32 + 32 bytes... six full blocks shared, and a last one of each sequence's own."""
    engine = tiny_engine(prefix=False, max_num_batched_tokens=256)
    request = engine.add(PREFIX[:100], SamplingParams(n=4, max_tokens=9, ignore_eos=True, seed=3, temperature=2.0))
    lane_block = 16 * 32 * 4
    engine.step()
    assert len(request.sequences) == 4
    assert engine.cache.bytes_in_use == 6 * 7 * lane_block  # forked, nothing written: everything exists once
    engine.step()
    assert engine.cache.bytes_in_use == 6 * (6 + 4) * lane_block
    rows = [s.row for s in request.sequences]
    table = engine.cache.lanes.table[rows]
    assert (table[:, :, :6] == table[:1, :, :6]).all()
    assert len(set(table[:, 0, 6].tolist())) == 4
    finish(engine)
    assert len({tuple(s.output_token_ids) for s in request.sequences}) == 4
    nothing_left(engine)


def test_each_of_n_sequences_is_what_it_would_be_without_sharing() -> None:
    """Every sequence, forced through an engine of its own, meets the very logits that it was drawn from."""
    engine = tiny_engine(max_num_batched_tokens=256)
    request = engine.add(
        PREFIX[:70], SamplingParams(n=3, max_tokens=30, ignore_eos=True, seed=3, temperature=1.5, logprobs=0)
    )
    finish(engine)
    for sequence in request.sequences:
        alone = tiny_engine(prefix=False)
        forced = alone.add(
            PREFIX[:70], SamplingParams(logprobs=0, max_tokens=30), forced_token_ids=sequence.output_token_ids
        )
        finish(alone)
        mine = torch.tensor([e[t].logprob for e, t in zip(sequence.logprobs, sequence.output_token_ids, strict=True)])
        other = torch.tensor(
            [e[t].logprob for e, t in zip(forced.sequences[0].logprobs, sequence.output_token_ids, strict=True)]
        )
        assert (mine - other).abs().max() < 1e-3


def test_cached_prefixes_give_way_to_requests_and_the_ends_of_prefixes_go_first() -> None:
    engine = tiny_engine(slabs=1, num_heads=4, head_dim=64)  # 42 rows of 16 tokens
    ask(engine, PREFIX[:400])
    assert ask(engine, PREFIX[:200])[1] == 192
    ask(engine, random_tokens(500, seed=4))
    assert 0 < ask(engine, PREFIX[:400])[1] < 192
    nothing_left(engine)
