"""A method's row says what its scorer does: how much it protects, which layers it skips, when it acts."""

from dataclasses import replace

import pytest

from kvloom.errors import InvalidInputError, UnsupportedError
from kvloom.plan.question import Question
from kvloom.plan.serving import policy_refusals
from kvloom.policies import plugins
from kvloom.policies.policy import Policy
from kvloom.policies.scorer import RULES
from kvloom.policies.scorers.duo import Duo
from kvloom.policies.scorers.knorm import Knorm
from kvloom.spec.catalogue import catalogue_spec
from kvloom.spec.hardware import find_device
from kvloom.spec.method import METHODS, register_selector
from kvloom.spec.needs import Needs
from kvloom.spec.policy import PolicySpec
from kvloom.spec.triggers import Triggers
from policies.lifelike import Life, random_layers

plugins.load_all()
SCORERS = sorted(set(RULES) - {"duo", "fastgen"})  # these two choose by themselves
SPELLED = {"streaming": "sinks=3,window=13", "window": "size=16", "scissorhands": "budget=16,recent=5",
           "h2o": "budget=16,recent=0.3", "snapkv": "budget=16,window=6", "expected": "budget=16,sinks=2",
           "kvzip": "budget=16,sinks=2", "random": "budget=16,sinks=7"}  # fmt: skip


@pytest.mark.parametrize(
    "name, refined",
    [(name, "") for name in SCORERS] + [(name, "+vatp(sinks=4)") for name in SCORERS if METHODS.get(name).attention],
)
def test_a_scorer_protects_as_many_tokens_as_its_row_says(name, refined):
    policy = Policy.parse(f"{name}({SPELLED.get(name, 'budget=16')}){refined}")
    life = Life(random_layers(2, 2, 40, count=3), str(policy.spec), 40)
    life.prefill()
    context = life.eviction.contexts.of_layer(2, life.row)
    protected = policy.rule.protected(context)
    assert int(protected.sum(1).max()) == METHODS.get(name).num_protected(dict(policy.spec.selector.args), 16)
    for refinement in policy.refinements:
        protected = protected | refinement.protected(context)
    assert int(protected.sum(1).max()) <= policy.num_protected(16) <= 16


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if isinstance(m.protected, str) and m.budgeted])
def test_a_budget_below_what_always_stays_is_refused_when_it_is_read(name):
    argument = METHODS.get(name).protected
    with pytest.raises(InvalidInputError, match=f"budget 4 of {name} is below its {argument} of 5 tokens"):
        PolicySpec.parse(f"{name}(budget=4,{argument}=5)")
    assert PolicySpec.parse(f"{name}(budget=5,{argument}=5)").tokens_protected(5) == 5


def test_layers_that_a_row_skips_are_left_to_the_planner_and_the_engine_alike():
    policy = Policy.parse("knorm(budget=8,skip_layers=2)")
    assert policy.spec.layers_skipped == 2 and PolicySpec.parse("h2o(budget=8)").layers_skipped == 0
    life = Life(random_layers(1, 2, 20, count=4), "knorm(budget=8,skip_layers=2)", 20)
    assert life.eviction.layers == [2, 3]


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_method_acts_when_its_row_says_and_at_no_other_time(name, tmp_path):
    (tmp_path / "heads.json").write_text("[[1]]")
    row = METHODS.get(name)
    args = {"duo": f"(pattern={tmp_path / 'heads.json'})"}.get(name, "(budget=64)" if row.budgeted else "")
    for moment, trigger in (("prefill", "prefill"), ("chunk", "chunk"), ("decode", "every")):
        if moment in row.acts:
            when = Policy.parse(f"{name}{args}+{trigger}").triggers
            assert {"prefill": when.prefill, "chunk": when.chunk, "every": when.every}[trigger]
        else:
            with pytest.raises(UnsupportedError, match="cannot act"):
                Policy.parse(f"{name}{args}+{trigger}")
    assert set(row.triggers) <= {"prefill", "chunk", "step"}
    assert {{"step": "decode"}.get(trigger, trigger) for trigger in row.triggers} <= set(row.acts)


@pytest.fixture
def added(monkeypatch):
    """Return what adds a method for one test."""
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))
    monkeypatch.setattr(RULES, "_entries", dict(RULES._entries))

    def add(name, rule, **facts):
        register_selector(name, "for a test", triggers=("prefill",), **facts)
        RULES.register(name, lambda args: rule)
        return PolicySpec.parse(f"{name}(budget=4)" if METHODS.get(name).budgeted else name)

    return add


def test_a_class_that_states_a_fact_of_its_row_is_refused_with_the_fact(added):
    rule = Knorm()
    rule.needs = Needs(queries=4)
    with pytest.raises(InvalidInputError, match=r"the class of stale states needs; .* needs=\.\.\. of"):
        Policy.of(added("stale", rule))


def test_a_selector_whose_row_does_not_say_that_it_chooses_is_refused(added):
    with pytest.raises(InvalidInputError, match="silent is a Selector; its row must say chooses=True"):
        Policy.of(added("silent", Duo([[1]], 0.5, 4, 4), budgeted=False, newest=None))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.role == "trigger"])
def test_every_trigger_has_a_moment(name):
    assert PolicySpec.parse(f"tova(budget=9)+{name}").when != Triggers()


def test_of_two_triggers_of_a_kind_the_tighter_one_counts():
    when = PolicySpec.parse("tova(budget=9)+slack(tokens=64)+step+chunk(tokens=96)+chunk(tokens=32)").when
    assert (when.slack, when.chunk, when.excess) == (0, 32, 1)


def test_the_planner_names_the_same_conflicts_as_the_engine():
    asked = Question(catalogue_spec("smollm2"), find_device("cpu"), 900, 100)
    for text in ("snapkv(budget=64)+step", "knorm(budget=64)+vatp", "fastgen+critical", "kvzip(budget=64)+chunk"):
        policy = PolicySpec.parse(text)
        with pytest.raises(UnsupportedError) as error:
            Policy.of(policy)
        assert set(error.value.reasons) <= set(policy_refusals(replace(asked, policy=policy)))
