"""Memory that policies give back: equal to the plan, enough for more requests, and for prompts beyond the arena."""

import pytest
import torch

from harness.small_engine import GEMMA, LLAMA, prompt_of, run, small_engine
from harness.tiny_engine import greedy
from harness.tiny_model import FULL, random_weights, tiny_config
from kvloom.errors import DoesNotFitError, InvalidInputError, UnsupportedError
from kvloom.models.compiled import CompiledModel
from kvloom.policies.reading import read_policy
from kvloom.spec.footprint import request_footprint
from kvloom.spec.method import METHODS
from kvloom.spec.policy import PolicySpec
from kvloom.spec.store import SLAB_BYTES

PROMPT, OUTPUT, BUDGET = 2048, 64, 512
CONFIG = tiny_config("llama", num_heads=9, num_kv_heads=3, head_dim=64, layers=(FULL,) * 2, max_position=1 << 15)
"""The head shape of SmolLM2 in two layers: six lanes in blocks of 8,192 bytes."""


@pytest.fixture(scope="module")
def smol():
    """Return a random model of that shape on the CPU kernels."""
    return CompiledModel(CONFIG, random_weights(CONFIG).items(), torch.float32)


def bytes_of(tokens):
    """Return the arena bytes of an uncompressed sequence."""
    return CONFIG.kv_spec(16, "fp32").request_bytes(tokens)


def test_sixteen_compressed_requests_hold_what_the_plan_says_and_never_more_than_its_peak(smol):
    engine = small_engine(model=smol, slabs=64, max_num_seqs=16, prefix=False)
    policy = f"snapkv(budget={BUDGET})"
    plan = request_footprint(engine.cache.spec, PolicySpec.parse(policy), PROMPT, OUTPUT, 2048)
    assert plan.settled.exact
    requests = [engine.add(prompt_of(PROMPT, seed=i), greedy(OUTPUT), kv_policy=read_policy(policy)) for i in range(16)]
    highest = 0
    while requests[-1].sequences[0].num_output_tokens == 0:
        engine.step()
        highest = max(highest, engine.cache.arena.peak_bytes)
    grown = [request.sequences[0].num_output_tokens - 1 for request in requests]
    assert grown[-1] == 0
    blocks = sum(6 * -(-(BUDGET + n) // 16) for n in grown)
    assert engine.cache.bytes_in_use == blocks * 8192
    last = requests[-1].sequences[0].row
    assert engine.cache.lanes.sequence_bytes(last) == plan.settled.high
    # a step has room for the end of one prompt and the beginning of the next
    assert highest <= 14 * plan.decode.high + 2 * plan.prefill.high
    engine.cache.check_invariants()
    for request in requests:
        engine.abort(request.request_id)
    assert engine.cache.arena.used_bytes == 0


def test_an_arena_for_four_uncompressed_requests_runs_ten_compressed_ones_at_once(smol):
    slabs = -(-4 * bytes_of(PROMPT + OUTPUT) // SLAB_BYTES)
    plain = small_engine(model=smol, slabs=slabs, max_num_seqs=16, prefix=False)
    assert 4 * bytes_of(PROMPT + OUTPUT) <= plain.cache.arena.num_bytes < 5 * bytes_of(PROMPT + OUTPUT)
    engine = small_engine(model=smol, slabs=slabs, max_num_seqs=16, prefix=False)
    policy = f"knorm(budget={BUDGET},skip_layers=0)"
    requests = [engine.add(prompt_of(PROMPT, seed=i), greedy(OUTPUT), kv_policy=read_policy(policy)) for i in range(12)]
    running = []

    def count():
        running.append(sum(r.sequences[0].num_output_tokens > 0 and not r.finished for r in requests))

    run(engine, requests, count)
    assert max(running) >= 10
    assert engine.scheduler.num_preemptions == 0


def test_a_prompt_three_times_the_arena_runs_per_chunk_and_is_refused_with_numbers_otherwise(smol):
    engine = small_engine(model=smol, slabs=4)
    held = engine.cache.spec.max_tokens_in(engine.cache.arena.num_bytes)
    prompt = prompt_of(3 * held)
    for policy in ("streaming(sinks=4,window=508)", "h2o(budget=512)+chunk(tokens=256)+step",
                   "keydiff(budget=256)+chunk(tokens=128)"):  # fmt: skip
        request = engine.add(prompt, greedy(4), kv_policy=read_policy(policy))
        assert len(run(engine, [request])[0][0]) == 4
        assert engine.kv_usage(request).bytes_peak <= engine.cache.arena.num_bytes
    with pytest.raises(DoesNotFitError, match=rf"{len(prompt) + 4} tokens need .* of KV cache; the arena has 8.*MiB"):
        engine.add(prompt, greedy(4), kv_policy=read_policy("snapkv(budget=512)"))
    engine.cache.check_invariants()


def reserved_for(policy, sequences):
    """Run a request alone, assert that it held no more than was reserved, and return the engine and what was."""
    engine = small_engine(max_num_batched_tokens=128, prefix=False)
    request = engine.add(prompt_of(300), greedy(40, n=sequences), kv_policy=read_policy(policy))
    reserved = request.sequences[0].eviction.occupancy.peak_bytes(340, 128, sequences)
    engine.cache.arena.peak_bytes = 0
    run(engine, [request])
    assert engine.cache.arena.peak_bytes <= reserved
    return engine, reserved


@pytest.mark.parametrize(
    "policy",
    ["snapkv(budget=100)", "snapkv(budget=100)+adaptive", "snapkv(budget=100)+pyramid", "h2o(budget=100)",
     "h2o(budget=100)+every(tokens=16)", "h2o(budget=100)+slack(tokens=20)", "kvzip(budget=100,chunk=128)",
     "streaming(sinks=4,window=96)", "expected(keep=0.5)+global", "tova(budget=64)+chunk(tokens=64)+slack(tokens=8)",
     "knorm(budget=90)", "fastgen(recovery=0.5)"],
)  # fmt: skip
@pytest.mark.parametrize("sequences", [1, 3])
def test_a_request_never_holds_more_than_was_reserved_for_it(policy, sequences):
    engine, _ = reserved_for(policy, sequences)
    assert engine.scheduler.num_preemptions == 0


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("extra", ["", "+chunk(tokens=64)+slack(tokens=8)"])
def test_heads_with_a_limit_of_their_own_never_hold_more_than_was_reserved(tmp_path, extra, sequences):
    (tmp_path / "heads.json").write_text("[[1, 0], [0, 1], [0, 0]]")
    policy = f"duo(pattern={tmp_path / 'heads.json'},sinks=2,window=30){extra}"
    engine, reserved = reserved_for(policy, sequences)
    if extra:
        dense = engine.cache.spec.request_bytes(340, 128)
        assert reserved < sequences * dense * 3 // 4  # four lanes of six are short


@pytest.mark.parametrize("decoder", [LLAMA, GEMMA])
@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.role == "selector" and n not in ("full", "duo")])
def test_what_admission_reserves_is_what_the_plan_counts(decoder, name):
    engine = small_engine(decoder, max_num_batched_tokens=128)
    compared = 0
    for extra in ("", "+chunk(tokens=64)", "+slack(tokens=8)", "+every(tokens=16)", "+adaptive", "+pyramid"):
        text = f"{name}({'budget=100' if METHODS.get(name).budgeted else ''}){extra}"
        try:
            request = engine.add(prompt_of(200), greedy(40), kv_policy=read_policy(text))
        except (UnsupportedError, InvalidInputError):
            continue  # this method does not go with that
        compared += 1
        reserved = request.sequences[0].eviction.occupancy.peak_bytes(240, 128)
        planned = request_footprint(engine.cache.spec, PolicySpec.parse(text), 200, 40, 128).peak.high
        if PolicySpec.parse(text).needs.replay:  # the plan knows no tokenizer, and counts the longest instruction
            assert reserved <= planned
        else:
            assert reserved == planned
    assert compared >= 2


def test_what_a_sequence_still_needs_falls_with_what_it_lost():
    engine = small_engine(max_num_batched_tokens=128)
    policy = read_policy("tova(budget=100)+prefill+slack(tokens=10)")
    request = engine.add(prompt_of(300), greedy(200), kv_policy=policy)
    (sequence,) = request.sequences
    occupancy = sequence.eviction.occupancy
    while not sequence.num_output_tokens:
        engine.step()
    block = engine.cache.spec.layer_block_bytes(0)
    assert occupancy.peak_bytes(500, 128) == 6 * 19 * block
    assert sequence.eviction.future_bytes(sequence.row, 500, 128) == 6 * 7 * block
    assert sequence.eviction.future_bytes(sequence.row, 304, 128) == 6 * 7 * block
    run(engine, [request], lambda: engine.cache.check_invariants())


@pytest.mark.parametrize("policy", ["knorm(budget=32,skip_layers=0)", "snapkv(budget=32,window=8)+adaptive"])
def test_requests_that_cannot_be_preempted_never_run_short_of_each_other(smol, policy):
    engine = small_engine(model=smol, slabs=1, prefix=False)
    held = engine.cache.spec.max_tokens_in(engine.cache.arena.num_bytes)
    requests = [engine.add(prompt_of(120, seed=i), greedy(200), kv_policy=read_policy(policy)) for i in range(5)]
    assert 5 * (32 + 200) > held > 3 * 120
    answers = run(engine, requests)
    assert all(len(answer[0]) == 200 for answer in answers)
    assert engine.scheduler.num_preemptions == 0
