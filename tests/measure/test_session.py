"""Sessions: the order of measurements, the file of results, and continuation from it."""

import json
import math

import pytest

from kvloom.cli.measure import time_left
from kvloom.cli.measuretext import results_text
from kvloom.errors import InvalidInputError
from kvloom.measure import session as sessions
from kvloom.measure.cost import Cost
from kvloom.measure.forced import Score
from kvloom.measure.results import Results
from kvloom.measure.session import Session, runnable
from kvloom.measure.window import windows_of
from kvloom.plan.measured import read_measurements
from kvloom.spec.policy import FULL, PolicySpec

FACTS = {"dtype": "float32"}
POLICIES = [PolicySpec.parse("snapkv(budget=30,window=8)"), PolicySpec.parse("random(budget=20)")]
KEYDIFF, KNORM = PolicySpec.parse("keydiff(budget=30)"), PolicySpec.parse("knorm(budget=9)")
TOVA, DUO = PolicySpec.parse("tova(budget=9)"), PolicySpec.parse("duo")
LATE = PolicySpec.parse("snapkv(budget=9,window=4)+step")


def session(llm, text, results, count=5, policies=POLICIES, **options):
    """Return a session over windows of 80 tokens."""
    windows = windows_of([llm.tokenizer.encode(text)], 70, 10, count)
    return Session(llm.engine, windows, policies, results, **options)


def scores_of(results):
    return {row.policy: row.scores for row in results.rows}


@pytest.fixture(scope="module")
def whole(llm, text):
    """Results of a run from beginning to end, and its progress."""
    results = Results("tiny", "here", FACTS)
    return results, list(session(llm, text, results).run())


def test_every_policy_and_the_full_cache_get_all_windows_and_costs(whole):
    results, progress = whole
    assert [row.policy for row in results.rows] == [FULL, *POLICIES]
    assert all((len(row.scores), len(row.costs)) == (5, 2) for row in results.rows)
    assert (progress[0].done, progress[-1].done, progress[-1].total) == (0, 3 * 7, 3 * 7)
    assert [p.done for p in progress] == sorted(p.done for p in progress)


def test_a_result_is_the_mean_over_windows_against_the_same_windows_of_the_full_cache(whole):
    results, _ = whole
    full, some = (next(e for e in results.summaries() if e["policy"] == name) for name in ("full", str(POLICIES[0])))
    change = [a - b for a, b in zip(some["by_window"]["nll"], full["by_window"]["nll"], strict=True)]
    assert some["loss"] == pytest.approx(math.exp(sum(change) / 5) - 1)
    assert some["loss_low"] <= some["loss"] <= some["loss_high"]
    assert some["loss"] == pytest.approx(some["perplexity"] / full["perplexity"] - 1)
    assert (full["loss"], full["loss_high"], full["kl"]) == (0, 0, 0)


def test_a_stopped_session_goes_on_from_its_file_to_the_same_scores(llm, text, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(sessions, "MOST_AT_ONCE", 2)
    path = tmp_path / "results.json"
    results, runs = Results("tiny", "here", FACTS), 0
    while not all(len(row.scores) == 5 and len(row.costs) == 2 for row in results.rows) or not results.rows:
        runs += 1
        results = Results.open(path, "tiny", "here", FACTS)
        steps = iter(range(25))
        list(session(llm, text, results, stop=lambda steps=steps: next(steps, None) is None).run())
        results.save(path)
    assert runs > 3
    for policy, scores in scores_of(whole[0]).items():
        found = scores_of(results)[policy]
        assert [s.nll for s in found] == pytest.approx([s.nll for s in scores], abs=1e-5)
        assert [s.evicted for s in found] == [s.evicted for s in scores]


def test_more_windows_and_policies_are_added_to_what_there_is(llm, text, whole, tmp_path):
    path = tmp_path / "results.json"
    whole[0].save(path)
    results = Results.open(path, "tiny", "here", FACTS)
    before = scores_of(whole[0])
    list(session(llm, text, results, count=7, policies=[*POLICIES, KEYDIFF]).run())
    found = scores_of(results)
    assert {name: len(scores) for name, scores in found.items()} == dict.fromkeys(found, 7)
    for policy, scores in before.items():
        assert found[policy][:5] == scores
    assert len(found) == 4


def test_what_is_complete_is_not_run_again(llm, text, whole, monkeypatch):
    monkeypatch.setattr(sessions, "forced_scores", None)
    monkeypatch.setattr(sessions, "cost_of", None)
    assert len(list(session(llm, text, whole[0]).run())) == 1


def test_the_file_is_what_the_planner_reads(whole, tmp_path):
    path = tmp_path / "results.json"
    whole[0].save(path)
    found = read_measurements(path)
    assert (found.model, found.machine) == ("tiny", "here")
    one = next(entry for entry in whole[0].summaries() if entry["policy"] == str(POLICIES[1]))
    read = next(entry for entry in found.results if entry.policy == POLICIES[1])
    assert (read.context, read.loss, read.loss_high) == (80, one["loss"], one["loss_high"])
    assert (read.tpot_s, read.kv_peak_bytes) == (one["tpot_s"], one["kv_peak_bytes"])
    assert read.evicted_tokens == 4 * (70 - 20)


def test_results_of_something_else_are_refused_with_what_differs(whole, tmp_path):
    path = tmp_path / "results.json"
    whole[0].save(path)
    with pytest.raises(InvalidInputError, match="dtype 'float32', not 'bfloat16'"):
        Results.open(path, "tiny", "here", {"dtype": "bfloat16"})
    with pytest.raises(InvalidInputError, match="model 'tiny', not 'other'"):
        Results.open(path, "other", "here", FACTS)


@pytest.mark.parametrize("part", ["by_window", "costs", "output"])
def test_results_that_do_not_say_how_they_were_measured_cannot_be_gone_on_with(whole, tmp_path, part):
    path = tmp_path / "results.json"
    data = json.loads(json.dumps(whole[0].json()))
    del data["results"][1][part]
    path.write_text(json.dumps(data))
    with pytest.raises(InvalidInputError, match="cannot continue from it"):
        Results.open(path, "tiny", "here", FACTS)


def test_nothing_is_written_before_there_is_a_result(tmp_path):
    Results("tiny", "here", FACTS).save(tmp_path / "results.json")
    assert list(tmp_path.iterdir()) == []


def test_a_policy_with_fewer_windows_is_compared_on_those(tmp_path):
    results = Results("tiny", "here", FACTS)
    results.row(FULL, 80, 10).scores = [Score(2.0, 0, 1, 0), Score(4.0, 0, 1, 0)]
    results.row(KNORM, 80, 10).scores = [Score(2.5, 0.1, 0.9, 7)]
    results.row(KNORM, 80, 10).costs = [Cost(0.1, 0.02, 64, 128), Cost(0.3, 0.04, 64, 128)]
    entry = results.summaries()[1]
    assert entry["loss"] == pytest.approx(math.exp(0.5) - 1)
    assert (entry["windows"], entry["ttft_s"], entry["kv_bytes"], entry["kv_peak_bytes"]) == (1, 0.2, 64, 128)
    assert [entry[f"{name}_{end}"] for name in ("ttft_s", "tpot_s") for end in ("min", "max")] == [0.1, 0.3, 0.02, 0.04]
    row = results_text([results.summaries()[0], entry], "tiny", "here").splitlines()[-1]
    assert row.endswith("200.0 ms (100.0 to 300.0)  30.0 ms (20.0 to 40.0)")


@pytest.mark.parametrize(
    "done, missing, elapsed, words",
    [
        (0, 8, 5.0, ""), (8, 0, 5.0, ""), (4, 8, 6.0, "about 12 s left"), (1, 5, 60.0, "about 5 min left"),
        (2, 18, 900.0, "about 2.2 h left"), (100, 1, 1.0, "about 1 s left"),
    ],
)  # fmt: skip
def test_the_time_left_is_that_of_the_missing_runs_at_the_speed_so_far(done, missing, elapsed, words):
    assert time_left(done, missing, elapsed) == words


def test_policies_that_cannot_run_are_named_with_their_reasons(llm, text):
    window = windows_of([llm.tokenizer.encode(text)], 70, 10, 1)[0]
    able, refused = runnable(llm.engine, window, [TOVA, DUO, LATE])
    assert able == [TOVA]
    assert "duo needs the file" in refused[DUO]
    assert "it cannot act while generating" in refused[LATE]


def test_a_policy_that_cannot_run_is_refused_before_anything_runs(llm, text):
    with pytest.raises(InvalidInputError, match="duo needs the file"):
        session(llm, text, Results("tiny", "here", FACTS), policies=[DUO])
