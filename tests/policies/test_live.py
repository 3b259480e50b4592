"""Policies together with preemption, samples, prefixes, refusals and reports."""

import json
from itertools import pairwise

import pytest

from harness.small_engine import GEMMA, LLAMA, prompt_of, run, small_engine
from harness.tiny_engine import greedy
from kvloom.engine.params import SamplingParams
from kvloom.errors import DoesNotFitError, InvalidInputError, UnsupportedError
from kvloom.policies.policy import Policy
from kvloom.policies.reading import read_allow_list, read_policy

POLICIES = ["h2o(budget=40)", "snapkv(budget=40,window=8)+adaptive", "streaming(sinks=4,window=36)",
            "kvzip(budget=40,chunk=64)", "tova(budget=40)+slack(tokens=8)", "h2o(budget=48)+d2o(mass=true)",
            "fastgen(recovery=0.6)"]  # fmt: skip


def alone(prompt, tokens, policy, **options):
    """Return what a request answers on an engine of its own with plenty of room."""
    engine = small_engine(slabs=32, prefix=False, **options)
    return run(engine, [engine.add(prompt, greedy(tokens), kv_policy=read_policy(policy))])[0][0]


@pytest.mark.parametrize("policy", POLICIES)
def test_requests_that_crowd_a_small_arena_answer_as_they_do_alone(policy):
    engine = small_engine(slabs=1, max_num_batched_tokens=96, block_size=16)
    prompts = [prompt_of(n, seed=n) for n in (150, 90, 200, 120, 60)]
    policies = [policy, "full", policy, "full", policy]
    requests = [engine.add(p, greedy(60), kv_policy=read_policy(k)) for p, k in zip(prompts, policies, strict=True)]
    answers = run(engine, requests, engine.cache.check_invariants)
    for prompt, wanted, answer in zip(prompts, policies, answers, strict=True):
        assert answer == [alone(prompt, 60, wanted)]
    engine.cache.index.clear()
    assert engine.cache.arena.used_bytes == 0


def test_a_request_preempted_before_its_first_eviction_answers_as_if_it_had_not_been():
    prompt, policy = prompt_of(100), "h2o(budget=110)"
    engine = small_engine(prefix=False)
    request = engine.add(prompt, greedy(30), kv_policy=read_policy(policy))
    for _ in range(6):
        engine.step()
    sequence = request.sequences[0]
    assert not engine.scheduler.capacity.is_lossy(sequence)
    engine.scheduler.queues.preempt(sequence)
    answer = run(engine, [request])[0][0]
    assert engine.kv_usage(request).evicted_tokens > 0 and sequence.num_preemptions == 1
    assert answer == alone(prompt, 30, policy)


def test_a_request_that_lost_tokens_is_never_preempted():
    engine = small_engine(prefix=False)
    lossy = engine.add(prompt_of(100), greedy(20), kv_policy=read_policy("snapkv(budget=40,window=8)"))
    engine.step()
    plain = engine.add(prompt_of(50), greedy(20))
    engine.step()
    assert engine.scheduler.capacity.is_lossy(lossy.sequences[0])
    assert engine.scheduler._victim(lossy.sequences[0]) is plain.sequences[0]
    run(engine, [lossy, plain])


@pytest.mark.parametrize("policy", ["h2o(budget=40)", "snapkv(budget=40,window=8)+adaptive",
                                    "streaming(sinks=2,window=30,positions=cache)", "h2o(budget=40)+d2o"])  # fmt: skip
def test_samples_of_a_compressed_prompt_go_on_independently(policy):
    prompt = prompt_of(90)
    engine = small_engine()
    params = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=25, ignore_eos=True, detokenize=False)
    request = engine.add(prompt, params, kv_policy=read_policy(policy))
    answers = run(engine, [request], engine.cache.check_invariants)[0]
    assert len({tuple(a) for a in answers}) == 3
    again = small_engine(prefix=False, max_num_batched_tokens=32)
    assert run(again, [again.add(prompt, params, kv_policy=read_policy(policy))])[0] == answers
    first = request.sequences[0].eviction.evicted_tokens
    others = [s.eviction.evicted_tokens for s in request.sequences[1:]]
    lanes = 6
    assert first == others[0] + lanes * (90 - Policy.parse(policy).tokens(90)), "the prompt was evicted once"


def test_survivors_never_enter_the_prefix_index_and_the_whole_prefix_stays_for_others():
    engine = small_engine()
    prompt = prompt_of(128)
    compressed = engine.add(prompt, greedy(20), kv_policy=read_policy("snapkv(budget=40,window=8)"))
    run(engine, [compressed])
    whole = engine.add(prompt, greedy(20))
    run(engine, [whole])
    assert whole.sequences[0].num_cached_tokens == 112
    assert whole.sequences[0].output_token_ids == alone(prompt, 20, "full")
    longer = [*prompt, *compressed.sequences[0].output_token_ids, 5, 6]
    follow = engine.add(longer, greedy(5))
    run(engine, [follow])
    assert follow.sequences[0].num_cached_tokens == 128, "nothing that was computed after an eviction is shared"
    assert follow.sequences[0].output_token_ids == alone(longer, 5, "full")


def test_two_requests_share_a_prefix_and_compress_it_each_in_its_own_way():
    engine = small_engine()
    prompt = prompt_of(160)
    run(engine, [engine.add(prompt, greedy(1))])
    policies = ["knorm(budget=30,skip_layers=0)", "streaming(sinks=4,window=28)+chunk(tokens=256)+step", "full"]
    requests = [engine.add([*prompt, 3], greedy(30), kv_policy=read_policy(p)) for p in policies]
    answers = run(engine, requests, engine.cache.check_invariants)
    assert [r.sequences[0].num_cached_tokens for r in requests] == [160, 160, 160]
    assert answers == [[alone([*prompt, 3], 30, p)] for p in policies]


def test_the_note_counts_cached_tokens_that_the_policy_could_not_use_and_is_absent_when_nothing_was_cached():
    engine = small_engine()
    watching = read_policy("snapkv(budget=40,window=32)")
    first = engine.add(prompt_of(160), greedy(2), kv_policy=watching)
    run(engine, [first])
    assert engine.kv_usage(first).note is None
    second = engine.add(prompt_of(160), greedy(2), kv_policy=watching)
    run(engine, [second])
    usage = engine.kv_usage(second)
    assert usage.cached_tokens == 128 and usage.note is not None
    assert usage.note.startswith("16 tokens in the prefix cache were not used: snapkv needs queries")
    assert usage.note.endswith("at most 128 tokens may come from one")


def test_an_abort_in_the_middle_frees_everything():
    engine = small_engine(prefix=False, max_num_batched_tokens=64)
    for steps in range(8):
        request = engine.add(prompt_of(200), greedy(30), kv_policy=read_policy("h2o(budget=64)+chunk(tokens=96)+step"))
        for _ in range(steps):
            engine.step()
        engine.abort(request.request_id)
        assert engine.cache.arena.used_bytes == 0
        engine.cache.check_invariants()


def test_ragged_lanes_have_different_lengths_and_numbers_of_blocks():
    engine = small_engine(prefix=False)
    policy = read_policy("snapkv(budget=100,window=8)+adaptive(floor=0.1)")
    request = engine.add(prompt_of(400), greedy(4), kv_policy=policy)
    engine.step()
    lanes, row = engine.cache.lanes, request.sequences[0].row
    held = lanes.held[row]
    assert [held[2 * i : 2 * i + 2].sum() for i in range(3)] == [200] * 3
    assert len(set(held.tolist())) > 3
    blocks = (lanes.table[row] >= 0).sum(1)
    assert blocks.tolist() == [-(-n // 16) for n in held.tolist()] and len(set(blocks.tolist())) > 1
    usage = engine.kv_usage(request)
    assert (usage.shortest_lane, usage.longest_lane) == (held.min(), held.max())
    assert usage.bytes_now == blocks.sum() * engine.cache.spec.layer_block_bytes(0)


def test_lanes_that_share_their_budget_wait_for_the_slack_on_average():
    engine = small_engine(prefix=False)
    policy = read_policy("h2o(budget=64)+global+prefill+slack(tokens=16)")
    request = engine.add(prompt_of(300), greedy(60), kv_policy=policy)
    moments = []
    run(engine, [request], lambda: moments.append(engine.evictions.evicted_tokens))
    acted = [i for i, (a, b) in enumerate(pairwise(moments)) if b > a]
    assert len(acted) == 3 and [b - a for a, b in pairwise(acted)] == [17] * 2


def test_the_spread_of_lane_lengths_leaves_out_windowed_lanes():
    engine = small_engine(GEMMA)
    request = engine.add(prompt_of(100), greedy(3), kv_policy=read_policy("knorm(budget=40,skip_layers=0)"))
    engine.step()
    usage = engine.kv_usage(request)
    assert usage.shortest_lane == usage.longest_lane == 40
    assert usage.method == "knorm(budget=40,skip_layers=0)" and usage.evicted_tokens == 2 * 60


@pytest.mark.parametrize("policy", [*POLICIES, "kvzip(budget=40,chunk=200)", "snapkv(budget=40,window=8)",
                                    "h2o(budget=64)+chunk(tokens=32)+step", "knorm(budget=30)"])  # fmt: skip
def test_the_bytes_and_tokens_that_are_reported_are_those_of_the_arena_and_the_lanes(policy):
    engine = small_engine(prefix=False, max_num_batched_tokens=96)
    request, lanes = engine.add(prompt_of(250), greedy(30), kv_policy=read_policy(policy)), engine.cache.lanes
    arena, moments = engine.cache.arena, []

    def compare():
        row = request.sequences[0].row
        if row is None:
            return
        usage, held = engine.kv_usage(request), lanes.held[row]
        moments.append(usage.evicted_tokens)
        assert usage.bytes_now == arena.used_bytes and usage.bytes_peak == arena.peak_bytes
        assert usage.evicted_tokens == lanes.spec.num_lanes * int(lanes.seen[row]) - int(held.sum())
        assert (usage.shortest_lane, usage.longest_lane) == (held.min(), held.max())
        assert usage.method == str(request.sequences[0].eviction.policy.spec)

    run(engine, [request], compare)
    usage = engine.kv_usage(request)
    assert moments[-1] > 0 and engine.evictions.evicted_tokens == usage.evicted_tokens
    assert (usage.bytes_now, usage.bytes_peak) == (0, arena.peak_bytes)


def test_half_of_the_prompt_is_half_of_the_prompt():
    engine = small_engine()
    request = engine.add(prompt_of(101), greedy(2), kv_policy=read_policy("knorm(keep=0.5,skip_layers=0)"))
    engine.step()
    assert engine.kv_usage(request).longest_lane == 50


def test_text_without_end_needs_constant_memory_with_positions_in_the_cache():
    engine = small_engine(slabs=1, max_model_len=100, prefix=False)
    policy = "streaming(sinks=4,window=44,positions=cache)+chunk(tokens=32)+slack(tokens=15)"
    request = engine.add(prompt_of(60), greedy(400), kv_policy=read_policy(policy))
    sizes = []
    run(engine, [request], lambda: sizes.append(engine.cache.arena.used_bytes))
    assert request.sequences[0].num_output_tokens == 400
    block = engine.cache.spec.layer_block_bytes(0)
    assert max(sizes) <= request.sequences[0].eviction.occupancy.peak_bytes(460, 2048)
    assert set(sizes[40:-1]) <= {6 * blocks * block for blocks in (3, 4)}
    with pytest.raises(InvalidInputError, match="give max_tokens"):
        engine.add(prompt_of(60), SamplingParams(max_tokens=None, detokenize=False), kv_policy=read_policy(policy))


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy, reasons",
    [
        ("snapkv(budget=64)+chunk+step", ["cannot act per chunk", "cannot act while generating"]),
        ("streaming(positions=cache)+d2o", ["cannot be combined with merging"]),
        ("knorm(budget=64)+vatp+critical", ["vatp weighs attention", "critical weighs attention"]),
        ("snapkv(budget=64)+critical+critical", ["each choose the tokens"]),
        ("fastgen+vatp+chunk", ["cannot act per chunk", "there is no score to refine"]),
        ("h2o(budget=64)+int4", ["int4 is planned only", "h2o evicts while generating"]),
    ],
)
def test_what_cannot_be_combined_is_refused_with_every_reason(policy, reasons):
    with pytest.raises(UnsupportedError) as error:
        small_engine().check(prompt_of(100), greedy(4), kv_policy=read_policy(policy))
    assert len(error.value.reasons) == len(reasons)
    for reason in reasons:
        assert reason in str(error.value)


def test_what_a_request_or_model_lacks_is_refused_at_admission(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([[1, 0, 1]]))
    engine = small_engine(kinds=False)
    for policy, reason in [
        ("snapkv(keep=0.2)", "32 tokens are protected but the budget is 20"),
        ("kvzip(budget=64)", "no tokenizer to ask with"),
        ("fastgen", "this engine has no tokenizer"),
        (f"duo(pattern={tmp_path / 'p.json'})", "1 layers of [3] heads"),
        ("knorm(budget=64,skip_layers=3)", "nothing to evict"),
    ]:
        with pytest.raises((UnsupportedError, InvalidInputError)) as error:
            engine.check(prompt_of(100), greedy(4), kv_policy=read_policy(policy))
        assert reason in str(error.value)
    with pytest.raises(UnsupportedError, match="the model was made for 4096"):
        small_engine(slabs=64).check(prompt_of(2100), greedy(4), kv_policy=read_policy("kvzip(budget=64)"))


def test_a_pattern_that_is_no_pattern_is_refused_without_being_quoted(tmp_path):
    (tmp_path / "secret.txt").write_text("password = hunter2\n")
    with pytest.raises(InvalidInputError) as error:
        Policy.parse(f"duo(pattern={tmp_path / 'secret.txt'})")
    assert "hunter2" not in str(error.value)
    with pytest.raises(InvalidInputError, match="cannot be read"):
        Policy.parse(f"duo(pattern={tmp_path / 'none.json'})")


def test_requests_may_name_the_policies_that_the_engine_allows_and_no_others():
    engine = small_engine(
        kv_policy=read_policy("h2o(budget=64)"), allow_kv_policies=read_allow_list(["snapkv", "tova(budget=32)"])
    )
    engine.check(prompt_of(100), greedy(4))
    for policy in ("h2o(budget=64)", "full", "snapkv(budget=99)+adaptive", "tova(budget=32)"):
        engine.check(prompt_of(100), greedy(4), kv_policy=read_policy(policy))
    for policy in ("h2o(budget=65)", "kvzip(budget=64)", "tova(budget=32)+slack"):
        with pytest.raises(UnsupportedError, match=r"this engine allows only: full, snapkv, h2o\(budget=64\)"):
            engine.check(prompt_of(100), greedy(4), kv_policy=read_policy(policy))
    with pytest.raises(InvalidInputError, match="did you mean 'snapkv'"):
        read_allow_list(["snapkw"])


def test_the_room_for_a_replay_is_counted_at_admission():
    engine = small_engine(slabs=1)
    tokens = engine.scheduler.capacity.sure_bytes([]) // (6 * engine.cache.spec.layer_block_bytes(0)) * 16
    prompt = prompt_of(tokens - 32)
    engine.check(prompt, greedy(4), kv_policy=read_policy("snapkv(budget=64)"))
    with pytest.raises(DoesNotFitError):
        engine.check(prompt, greedy(4), kv_policy=read_policy("kvzip(budget=64,chunk=256)"))
    assert LLAMA.config.num_kv_heads == 2
