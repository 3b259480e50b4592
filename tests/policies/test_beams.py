"""Beam search under policies: every beam evicts separately, and holds what its own tokens lead to."""

import pytest

from harness.small_engine import prompt_of, run, small_engine
from harness.tiny_engine import greedy
from harness.tolerances import LOGPROB_FLOAT32
from kvloom.engine.beam import BeamSearchParams
from kvloom.policies.reading import read_policy

POLICIES = ["h2o(budget=40)", "snapkv(budget=40,window=8)+adaptive", "streaming(sinks=4,window=36)",
            "streaming(sinks=2,window=30,positions=cache)", "tova(budget=40)+slack(tokens=8)",
            "h2o(budget=48)+d2o(mass=true)", "h2o(budget=40)+cam", "fastgen(recovery=0.6)", "kvzip(budget=40,chunk=64)",
            "h2o(budget=110)"]  # fmt: skip
PARAMS = BeamSearchParams(beam_width=3, max_tokens=24, ignore_eos=True)


def beams_of(engine, prompt, policy, **options):
    """Return the request of a beam search and its best sequences with the sums of their log-probabilities."""
    request = engine.add_beam_search(prompt, PARAMS, kv_policy=read_policy(policy), **options)
    run(engine, [request], engine.cache.check_invariants)
    return request, [(s.output_token_ids, s.cumulative_logprob) for s in request.sequences]


def forced(prompt, tokens, policy):
    """Return the sum of the log-probabilities of `tokens` when they alone follow the prompt under `policy`."""
    engine = small_engine(prefix=False)
    params = greedy(len(tokens), logprobs=0, seed=0)
    request = engine.add(prompt, params, forced_token_ids=tokens, kv_policy=read_policy(policy))
    run(engine, [request])
    return request.sequences[0].cumulative_logprob


@pytest.mark.parametrize("policy", POLICIES)
def test_every_beam_has_the_likelihood_that_its_tokens_have_alone_under_the_policy(policy):
    prompt = prompt_of(100)
    engine = small_engine(prefix=False)
    engine.num_arrived = 0  # requests without a seed of their own draw by the order of arrival
    request, beams = beams_of(engine, prompt, policy)
    assert len(beams) == 3 and len({tuple(tokens) for tokens, _ in beams}) == 3
    for tokens, logprob in beams:
        assert logprob == pytest.approx(forced(prompt, tokens, policy), abs=2e-3)
    usage = engine.kv_usage(request)
    assert usage.method.startswith(policy.partition("(")[0])
    assert usage.evicted_tokens > 0
    assert engine.cache.arena.used_bytes == 0


@pytest.mark.parametrize("policy", POLICIES[:6])
def test_beams_in_a_crowded_arena_are_those_that_a_search_alone_finds(policy):
    prompt = prompt_of(100)
    _, alone = beams_of(small_engine(prefix=False, slabs=32), prompt, policy)
    engine = small_engine(slabs=1, max_num_batched_tokens=64)
    others = [engine.add(prompt_of(n, seed=n), greedy(60)) for n in (150, 200, 90)]
    request = engine.add_beam_search(prompt, PARAMS, kv_policy=read_policy(policy))
    run(engine, [request, *others], engine.cache.check_invariants)
    assert [s.output_token_ids for s in request.sequences] == [tokens for tokens, _ in alone]
    engine.cache.index.clear()
    assert engine.cache.arena.used_bytes == 0


def test_a_budget_that_holds_everything_changes_no_beam():
    prompt = prompt_of(80)
    found, expected = (beams_of(small_engine(), prompt, policy)[1] for policy in ("h2o(budget=200)", "full"))
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert [logprob for _, logprob in found] == pytest.approx([logprob for _, logprob in expected], abs=LOGPROB_FLOAT32)


def test_aborted_beams_free_everything():
    engine = small_engine(prefix=False)
    for steps in range(1, 6):
        request = engine.add_beam_search(prompt_of(100), PARAMS, kv_policy=read_policy("h2o(budget=40)"))
        for _ in range(steps):
            engine.step()
        engine.abort(request.request_id)
        assert engine.cache.arena.used_bytes == 0
