"""Policy: the objects that execute a `PolicySpec`."""

from dataclasses import dataclass
from functools import lru_cache
from inspect import getattr_static

from kvloom.errors import InvalidInputError, UnsupportedError
from kvloom.policies import plugins
from kvloom.policies.action import ACTIONS, Action
from kvloom.policies.budgets import BUDGETS, Budget
from kvloom.policies.modelfacts import ModelFacts
from kvloom.policies.reading import read_policy
from kvloom.policies.refinement import REFINEMENTS, Refinement
from kvloom.policies.replay import HINT
from kvloom.policies.scorer import RULES, Rule, Selector
from kvloom.spec.conflicts import conflicts
from kvloom.spec.encoding import encoding_refusals
from kvloom.spec.kv import KVSpec
from kvloom.spec.method import METHODS
from kvloom.spec.needs import Needs
from kvloom.spec.policy import PolicySpec
from kvloom.spec.triggers import Triggers


@dataclass(frozen=True)
class Policy:
    """Scorer (or selector) x budget x trigger x action of one policy; immutable and shared by requests."""

    spec: PolicySpec
    rule: Rule
    refinements: tuple[Refinement, ...]
    budget: Budget
    action: Action

    @classmethod
    def of(cls, spec: PolicySpec) -> "Policy | None":
        """Return what carries out `spec`, None when it keeps everything as it is; the same object for equal specs.

        Raises `UnsupportedError` for what cannot be combined and `InvalidInputError` for arguments that cannot be used.
        """
        return _build(spec)

    @classmethod
    def parse(cls, text: str) -> "Policy | None":
        """Return what carries out the policy that `text` spells; raises as `read_policy` and `of` do."""
        return cls.of(read_policy(text))

    @property
    def needs(self) -> Needs:
        """All inputs of rule, refinements and action together."""
        return self.spec.needs

    @property
    def triggers(self) -> Triggers:
        """The moments at which the policy acts."""
        return self.spec.when

    @property
    def chooser(self) -> Refinement | None:
        """The refinement that chooses the tokens, None where scores and counts do."""
        for term, refinement in zip(self.spec.refinements, self.refinements, strict=True):
            if METHODS.get(term.name).chooses:
                return refinement
        return None

    @property
    def merges(self) -> bool:
        """True when evicted tokens are merged into kept ones."""
        return self.spec.action.name != "drop"

    @property
    def stacks(self) -> bool:
        """True when the scores of many layers can be computed at once."""
        return self.spec.method.stacks and not self.refinements

    @property
    def acts_below_budget(self) -> bool:
        """True when tokens may be dropped from lanes that do not exceed the budget."""
        return self.spec.method.chooses or self.spec.sharing.acts_always

    def num_protected(self, budget: int) -> int:
        """Return the most tokens of a lane that stay whatever their score."""
        return self.spec.tokens_protected(budget)

    def tokens(self, prompt_tokens: int) -> int:
        """Return the budget in tokens a lane for a prompt of this length; a selector's bound is the prompt."""
        found = self.spec.tokens_kept(prompt_tokens)
        kept = self.spec.tokens_kept(1 << 40)
        if found is None:
            return prompt_tokens
        return found if self.spec.selector.get("keep") is not None or kept is None else kept

    def acts_on(self, kv: KVSpec, layer: int) -> bool:
        """Return whether the policy touches this layer: it has lanes of its own, no window, and is not skipped."""
        own = kv.layers[layer]
        skipped = layer < self.spec.layers_skipped
        return own.num_lanes > 0 and own.source is None and own.window is None and not skipped

    def refusals(self, kv: KVSpec, prompt_tokens: int, model: ModelFacts) -> list[str]:
        """Return every reason why this policy cannot run on such a request; [] when it can."""
        name, needs = self.spec.selector.name, self.needs
        reasons = self.rule.refusals(kv)
        if not any(self.acts_on(kv, layer) for layer in range(len(kv.layers))):
            reasons.append("every layer of this model has a window or is skipped, so there is nothing to evict")
        budget = self.tokens(prompt_tokens)
        protected = self.num_protected(budget)
        if budget < prompt_tokens and protected > budget:
            reasons.append(f"{protected} tokens are protected but the budget is {budget}; raise the budget")
        if any(kv.layers[i].source is not None for i in range(len(kv.layers))):
            reasons.append("layers share the lanes of other layers; evicting from those is not supported")
        if needs.token_kinds and model.token_kinds is None:
            reasons.append(f"{name} tells special tokens and punctuation apart; this engine has no tokenizer")
        if needs.replay:
            reasons += self._replay_refusals(prompt_tokens, model)
        return reasons

    def _replay_refusals(self, prompt_tokens: int, model: ModelFacts) -> list[str]:
        name = self.spec.selector.name
        if model.replay_instruction is None:
            return [f"{name} asks the model to repeat its context; this engine has no tokenizer to ask with"]
        longest = len(model.replay_instruction([0] * HINT)) + min(prompt_tokens, self.needs.replay)
        if prompt_tokens + longest > model.max_position:
            return [
                f"{name} feeds up to {longest} tokens after a prompt of {prompt_tokens}; "
                f"the model was made for {model.max_position}. Lower chunk or shorten the prompt"
            ]
        return []


@lru_cache(maxsize=256)
def _build(spec: PolicySpec) -> Policy | None:
    plugins.load_all()
    what = f"policy {str(spec)!r}"
    reasons = [*encoding_refusals(spec), *(conflicts(spec) if spec.evicts else [])]
    if reasons:
        raise UnsupportedError(what, reasons)
    if not spec.evicts:
        return None
    rule = RULES.get(spec.selector.name)(dict(spec.selector.args))
    policy = Policy(
        spec=spec,
        rule=rule,
        refinements=tuple(REFINEMENTS.get(term.name)(dict(term.args)) for term in spec.refinements),
        budget=BUDGETS.get(spec.budget.name)(dict(spec.budget.args)),
        action=ACTIONS.get(spec.action.name)(dict(spec.action.args)),
    )
    parts = (policy.rule, *policy.refinements, policy.budget, policy.action)
    for term, part in zip((spec.selector, *spec.refinements, spec.budget, spec.action), parts, strict=True):
        _check_row(term.name, part)
    if isinstance(rule, Selector) is not spec.method.chooses:
        chooses = isinstance(rule, Selector)
        kind = "Selector" if chooses else "Scorer"
        raise InvalidInputError(f"{spec.selector.name} is a {kind}; its row must say chooses={chooses}")
    return policy


def _check_row(name: str, part: object) -> None:
    """Raise `InvalidInputError` when the class of a part states what its row in `METHODS` says."""
    facts = [fact for fact in ROW_FACTS if getattr_static(part, fact, None) is not None]
    if facts:
        raise InvalidInputError(
            f"the class of {name} states {', '.join(facts)}; these belong into its row: {facts[0]}=... of "
            "register_selector or MethodSpec"
        )


ROW_FACTS = ("needs", "comparable", "stacks", "chooses", "ragged", "spans_layers", "acts_always")
"""Facts of a row that a class may not state as well."""
