"""A method that returns what cannot be used, or reads what it did not declare, is named with what was expected."""

import pytest
import torch

from harness.small_engine import prompt_of, run, small_engine
from harness.tiny_engine import greedy
from kvloom.errors import MethodError
from kvloom.policies.reading import read_policy
from kvloom.policies.scorers.duo import Duo
from kvloom.policies.scorers.knorm import Knorm
from policies.lifelike import Life, random_layers

TOKENS = 20


def one_nan(self, context):
    scores = context.positions.double()
    scores[0, 7] = float("nan")
    return scores


def act(policy="knorm(budget=8,skip_layers=0)"):
    """Let a method choose among 20 tokens of one layer with two lanes."""
    life = Life(random_layers(2, 2, TOKENS, count=1), policy, TOKENS)
    life.prefill()
    life.act()
    return life


@pytest.mark.parametrize(
    "score, message",
    [
        (one_nan, "score of knorm returned NaN for 1 of 40 tokens of layer 0"),
        (lambda self, context: context.keys, r"score of knorm returned \[2, 20, 8\]; it must return numbers \[2, 20\]"),
        (lambda self, context: context.positions.tolist(), r"score of knorm returned list; .* numbers \[2, 20\]"),
        (lambda self, context: context.key_mass, r"knorm reads key_mass, .* add Needs\(key_mass=True\)"),
        (lambda self, context: context.near_mass, r"knorm reads near_mass, .* add Needs\(near=...\)"),
        (lambda self, context: context.queries, r"knorm reads queries, .* add Needs\(queries=...\)"),
        (lambda self, context: context.window_mass(4), r"newest 4 queries and declared 0; add Needs\(queries=4\)"),
        (lambda self, context: context.query_moments, r"knorm reads query_moments, .* Needs\(query_moments=True\)"),
        (lambda self, context: context.output_norms(1), r"reads output_weight, .* Needs\(output_weights=True\)"),
        (lambda self, context: context.replay, r"knorm reads replay, .* add Needs\(replay=...\)"),
        (lambda self, context: context.special, r"knorm reads special, .* add Needs\(token_kinds=True\)"),
    ],
)
def test_a_score_that_cannot_be_used_is_refused_with_the_method_s_name(score, message, monkeypatch):
    monkeypatch.setattr(Knorm, "score", score)
    with pytest.raises(MethodError, match=message):
        act()


def test_nan_where_a_lane_holds_nothing_does_not_matter(monkeypatch):
    monkeypatch.setattr(
        Knorm, "score", lambda self, context: context.positions.double().masked_fill(~context.valid, float("nan"))
    )
    life = act("knorm(budget=8,skip_layers=0)+adaptive+chunk(tokens=10)")
    assert sum(len(lane) for lane in life.held(0)) == 16


def test_what_is_protected_must_be_yes_or_no(monkeypatch):
    monkeypatch.setattr(Knorm, "protected", lambda self, context: context.positions)
    with pytest.raises(MethodError, match=r"protected of knorm returned torch.int64; it must return torch.bool"):
        act()


def test_a_selector_must_say_yes_or_no_of_every_slot(monkeypatch, tmp_path):
    (tmp_path / "heads.json").write_text("[[1, 0]]")
    monkeypatch.setattr(Duo, "keep", lambda self, context: context.valid[0])
    with pytest.raises(MethodError, match=r"keep of duo returned \[20\]; it must return bool \[2, 20\]"):
        act(f"duo(pattern={tmp_path / 'heads.json'})+prefill")


def test_what_a_method_raises_is_told_with_its_name(monkeypatch):
    monkeypatch.setattr(Knorm, "score", lambda self, context: context.keys[99])
    with pytest.raises(MethodError, match="score of knorm raised IndexError: index 99"):
        act()


@pytest.mark.parametrize("policy", ["knorm(budget=8)+prefill+step", "knorm(budget=8)+chunk(tokens=16)"])
def test_a_request_whose_method_fails_ends_alone_with_the_error_and_leaves_nothing_in_use(policy, monkeypatch):
    engine = small_engine()
    expected = run(engine, [engine.add(prompt_of(40, seed=1), greedy(3))])
    monkeypatch.setattr(Knorm, "score", lambda self, context: torch.full(context.valid.shape, float("nan")))
    engine = small_engine()
    bad = engine.add(prompt_of(40), greedy(3), kv_policy=read_policy(policy))
    good = engine.add(prompt_of(40, seed=1), greedy(3))
    assert bad in engine.step()
    assert bad.finished and bad.sequences[0].finish_reason == "error"
    assert "score of knorm returned NaN" in str(bad.error) and bad.request_id in str(bad.error)
    assert run(engine, [good]) == expected and good.error is None
    assert not engine.requests and not engine.has_work
    engine.cache.check_invariants()
