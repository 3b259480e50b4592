"""Memory that policies give back on SmolLM2 itself, in bfloat16: as planned, for more requests, beyond the arena."""

import pytest
import torch

from harness.small_engine import prompt_of, run, small_engine
from harness.threads import threads
from harness.tiny_engine import greedy
from kvloom.errors import DoesNotFitError
from kvloom.models.checkpoint import open_checkpoint
from kvloom.models.loader import load_model
from kvloom.plan.memory import Memory
from kvloom.plan.question import Question
from kvloom.policies.reading import read_policy
from kvloom.spec.catalogue import catalogue_spec
from kvloom.spec.footprint import request_footprint
from kvloom.spec.hardware import find_device
from kvloom.spec.policy import PolicySpec
from kvloom.spec.store import SLAB_BYTES

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(600)]

PROMPT, OUTPUT, BUDGET, CHUNK = 1024, 32, 256, 1024
LANES, BLOCK_BYTES = 90, 4096
"""30 layers of 3 KV heads; 16 tokens of 64 keys and 64 values in 2 bytes."""


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    """SmolLM2 in bfloat16 on the kernels of the CPU, with two threads."""
    with threads(2):
        yield load_model(open_checkpoint(str(smollm2_path)), torch.bfloat16, block_size=16)


def engine_of(model, slabs):
    """Return an engine for 16 requests at once."""
    return small_engine(model=model, dtype=torch.bfloat16, slabs=slabs, max_num_seqs=16, prefix=False,
                        max_num_batched_tokens=CHUNK)  # fmt: skip


def test_sixteen_requests_hold_what_was_planned_and_reach_no_more_than_the_planned_peak(smollm2):
    policy = PolicySpec.parse(f"snapkv(budget={BUDGET})")
    asked = Question(catalogue_spec("smollm2"), find_device("cpu:16GiB"), PROMPT, OUTPUT, users=16, policy=policy,
                     chunk=CHUNK)  # fmt: skip
    planned = Memory(asked).kv_bytes(asked)
    engine = engine_of(smollm2, 200)
    one = request_footprint(engine.cache.spec, policy, PROMPT, OUTPUT, CHUNK)
    assert one.settled.exact and one.settled.high == LANES * BUDGET // 16 * BLOCK_BYTES
    requests = [engine.add(prompt_of(PROMPT, seed=i), greedy(OUTPUT), kv_policy=policy) for i in range(16)]
    while requests[-1].sequences[0].num_output_tokens == 0:
        engine.step()
    generated = [request.sequences[0].num_output_tokens - 1 for request in requests]
    assert generated[-1] == 0 and len(engine.scheduler.running) == 16
    assert engine.cache.lanes.sequence_bytes(requests[-1].sequences[0].row) == one.settled.high
    assert engine.cache.bytes_in_use == sum(LANES * -(-(BUDGET + n) // 16) * BLOCK_BYTES for n in generated)
    # a step of 1,024 tokens ends one prompt of 1,024 and begins the next: two are whole, and the others are compressed
    assert one.prefill.high < engine.cache.arena.peak_bytes <= planned
    for request in requests:
        usage = engine.kv_usage(request)
        assert usage.evicted_tokens == LANES * (PROMPT - BUDGET)
        assert usage.bytes_peak == one.prefill.high
        engine.abort(request.request_id)
    assert engine.cache.arena.used_bytes == 0


def test_where_four_whole_requests_fit_ten_compressed_ones_run_at_once_and_prompts_may_be_three_times_as_long(smollm2):
    spec = smollm2.config.kv_spec(16, "bf16")
    slabs = -(-4 * spec.request_bytes(PROMPT + OUTPUT) // SLAB_BYTES)
    assert 5 * spec.request_bytes(PROMPT + OUTPUT) > slabs * SLAB_BYTES
    engine = engine_of(smollm2, slabs)
    requests = [engine.add(prompt_of(PROMPT, seed=i), greedy(OUTPUT), kv_policy=read_policy(f"snapkv(budget={BUDGET})"))
                for i in range(11)]  # fmt: skip
    running = []

    def count():
        running.append(sum(r.sequences[0].num_output_tokens > 0 and not r.finished for r in requests))

    run(engine, requests, count)
    assert max(running) >= 10 and engine.scheduler.num_preemptions == 0
    small = engine_of(smollm2, 8)
    room = small.cache.spec.max_tokens_in(small.cache.arena.num_bytes, CHUNK)
    prompt = prompt_of(3 * room)
    answer = small.add(prompt, greedy(4), kv_policy=read_policy("h2o(budget=256)+chunk(tokens=256)+step"))
    assert len(run(small, [answer])[0][0]) == 4
    assert small.kv_usage(answer).bytes_peak <= small.cache.arena.num_bytes
    with pytest.raises(DoesNotFitError, match=rf"{len(prompt) + 4} tokens need .* the arena has 16.*MiB"):
        small.add(prompt, greedy(4), kv_policy=read_policy("snapkv(budget=256)"))
