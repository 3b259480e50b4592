"""Scores and costs of single policies, against other ways to the same numbers."""

import pytest

from kvloom import SamplingParams
from kvloom.measure.cost import cost_of
from kvloom.measure.forced import forced_scores
from kvloom.measure.window import windows_of
from kvloom.spec.footprint import request_footprint
from kvloom.spec.policy import FULL, PolicySpec

PROMPT, FOLLOW = 90, 12


@pytest.fixture
def windows(llm, text):
    """Three windows of the text."""
    return windows_of([llm.tokenizer.encode(text)], PROMPT, FOLLOW, 3)


def test_the_likelihood_under_the_full_cache_is_that_of_one_pass_over_the_whole_text(llm, windows):
    scores = forced_scores(llm.engine, windows, FULL, {})
    for window, score in zip(windows, scores, strict=True):
        whole = [*window.prompt, *window.follow]
        (output,) = llm.generate([whole], SamplingParams(max_tokens=1, prompt_logprobs=0))
        logprobs = [next(iter(output.prompt_logprobs[i].values())).logprob for i in range(PROMPT + 1, len(whole))]
        assert score.nll == pytest.approx(-sum(logprobs) / (FOLLOW - 1), abs=1e-4)
        assert (score.kl, score.agreement, score.evicted) == (0.0, 1.0, 0)


def test_a_budget_that_holds_everything_costs_nothing(llm, windows):
    reference = {}
    full = forced_scores(llm.engine, windows, FULL, reference)
    same = forced_scores(llm.engine, windows, PolicySpec.parse("snapkv(budget=200)"), reference)
    for one, other in zip(full, same, strict=True):
        assert other.nll == pytest.approx(one.nll, abs=1e-5)
        assert other.kl == pytest.approx(0, abs=1e-6)
        assert (other.agreement, other.evicted) == (1.0, 0)


def test_evicted_tokens_are_counted_and_raise_the_divergence(llm, windows):
    reference = {}
    forced_scores(llm.engine, windows, FULL, reference)
    lanes = llm.engine.cache.spec.num_lanes
    for score in forced_scores(llm.engine, windows, PolicySpec.parse("random(budget=20)"), reference):
        assert score.evicted == lanes * (PROMPT - 20)
        assert score.kl > 1e-3


def test_scores_do_not_depend_on_how_many_windows_run_together(llm, windows):
    together, alone = {}, {}
    forced_scores(llm.engine, windows, FULL, together)
    forced_scores(llm.engine, windows[1:2], FULL, alone)
    (one,) = forced_scores(llm.engine, windows[1:2], PolicySpec.parse("tova(budget=30)"), alone)
    other = forced_scores(llm.engine, windows, PolicySpec.parse("tova(budget=30)"), together)[1]
    assert (one.nll, one.kl) == pytest.approx((other.nll, other.kl), abs=1e-5)


def test_a_run_that_is_stopped_leaves_the_engine_as_it_was(llm, windows):
    asked = iter([False, False, True])
    assert forced_scores(llm.engine, windows, FULL, {}, lambda: next(asked)) is None
    assert cost_of(llm.engine, windows[0], FULL, lambda: True) is None
    assert not llm.engine.has_work
    assert llm.engine.continuation.observer is None
    assert llm.engine.cache.arena.used_bytes == 0
    llm.engine.cache.check_invariants()


@pytest.mark.parametrize(
    "policy", ["full", "snapkv(budget=40,window=8)", "streaming(window=30)", "tova(budget=30)+slack"]
)
def test_measured_bytes_are_the_planned_ones(llm, windows, policy):
    kv, chunk, spec = llm.engine.cache.spec, llm.config.max_num_batched_tokens, PolicySpec.parse(policy)
    cost = cost_of(llm.engine, windows[0], spec)
    end = request_footprint(kv, spec, PROMPT, FOLLOW - 2, chunk).end
    assert end.exact
    assert cost.kv_bytes == end.high
    assert end.high <= cost.kv_peak_bytes <= request_footprint(kv, spec, PROMPT, FOLLOW, chunk).peak.high
    assert cost.ttft_s > 0 and cost.tpot_s > 0
