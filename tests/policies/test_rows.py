"""A method's row says what its scorer does: how much it protects, which layers it skips, when it acts."""

import pytest

from kvloom.errors import InvalidInputError, UnsupportedError
from kvloom.policies import plugins
from kvloom.policies.policy import Policy
from kvloom.policies.scorer import RULES
from kvloom.spec.method import METHODS
from kvloom.spec.policy import PolicySpec
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
            assert Policy.parse(f"{name}{args}+{trigger}").spec.has_trigger(trigger)
        else:
            with pytest.raises(UnsupportedError, match="cannot act"):
                Policy.parse(f"{name}{args}+{trigger}")
    assert set(row.triggers) <= {"prefill", "chunk", "step"}
    assert {{"step": "decode"}.get(trigger, trigger) for trigger in row.triggers} <= set(row.acts)
