"""PolicySpec: a string names the tokens to keep, the times of eviction and the store. Torch-free and frozen.

Grammar: `term (+ term)*`, a term being `name` or `name(key=value,...)`. At most one selector, budget and store;
any number of refinements, triggers and actions in the order in which they act. A lone store is a policy too.
`snapkv(budget=1024,window=64)+adaptive+int4`
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from kvloom.errors import InvalidInputError
from kvloom.registry import nearest
from kvloom.spec.format import is_store, store_format, store_names
from kvloom.spec.method import METHODS, MethodSpec, Parameter, Value
from kvloom.spec.needs import NOTHING, Needs
from kvloom.spec.triggers import Triggers

_TERM = re.compile(r"([A-Za-z_][A-Za-z0-9_.-]*)(?:\((.*)\))?", re.DOTALL)

_STORE_PARAMS = (
    Parameter("residual", "int", None, 0, doc="newest tokens that stay in 16 bit"),
    Parameter("sinks", "int", 0, 0, doc="first tokens that stay in 16 bit"),
    Parameter("encode", "choice", "after", choices=("after", "streaming"), doc="after the prompt, or during it"),
)


@dataclass(frozen=True)
class Term:
    """One named part of a policy with every parameter resolved, in the method's order."""

    name: str
    args: tuple[tuple[str, Value], ...] = ()

    def get(self, key: str) -> Value | None:
        """Return the value of `key`, or None when it has none."""
        return dict(self.args).get(key)

    def number(self, key: str) -> int:
        """Return the integer `key`; only for parameters that always have one."""
        value = dict(self.args)[key]
        assert isinstance(value, int)
        return value


_FULL, _UNIFORM, _DROP = Term("full"), Term("uniform"), Term("drop")


@dataclass(frozen=True)
class PolicySpec:
    """Which tokens are evicted and how the rest is stored; `str()` gives a string that parses to the same policy.

    `store` is None for the model's own dtype. `triggers` is never empty unless the selector is `full`.
    """

    selector: Term = _FULL
    refinements: tuple[Term, ...] = ()
    budget: Term = _UNIFORM
    triggers: tuple[Term, ...] = ()
    action: Term = _DROP
    store: Term | None = None

    @classmethod
    def parse(cls, text: str) -> "PolicySpec":
        """Return the policy that `text` spells; raises `InvalidInputError` saying what is wrong and what is known."""
        found: dict[str, list[Term]] = {}
        for part in _split(text):
            match = _TERM.fullmatch(part)
            if match is None:
                raise InvalidInputError(f"{part!r} in policy {text!r} is not a term; write name or name(key=value,...)")
            name, inner = match[1], match[2]
            if is_store(name) and name not in METHODS:
                found.setdefault("store", []).append(_store_term(name, inner))
                continue
            if name not in METHODS:
                known = [*METHODS, *store_names()]
                raise InvalidInputError(f"unknown policy {name!r}{nearest(name, known)}; known: {', '.join(known)}")
            method = METHODS.get(name)
            found.setdefault(method.role, []).append(Term(name, _arguments(name, method.params, inner)))
        for role in ("selector", "budget", "action", "store"):
            if len(found.get(role, ())) > 1:
                names = " and ".join(term.name for term in found[role])
                raise InvalidInputError(f"policy {text!r} names two of the kind {role}: {names}; keep one")
        selector = found.get("selector", [_FULL])[0]
        method = METHODS.get(selector.name)
        _check_budget(text, selector, method)
        if selector == _FULL:
            spare = [t.name for role in ("refine", "budget", "trigger", "action") for t in found.get(role, ())]
            if spare:
                names = ", ".join(spare)
                raise InvalidInputError(f"policy {text!r} evicts nothing, so {names} cannot act; name a selector")
        elif found.get("budget") and not method.budgeted:
            added = found["budget"][0].name
            raise InvalidInputError(f"{selector.name} takes no budget, so {added} cannot be added; leave it out")
        triggers = found.get("trigger") or [Term(name, _arguments(name, METHODS.get(name).params, None))
                                            for name in method.triggers]
        return cls(
            selector=selector,
            refinements=tuple(found.get("refine", ())),
            budget=found.get("budget", [_default_budget(method)])[0],
            triggers=tuple(triggers),
            action=found.get("action", [_DROP])[0],
            store=found.get("store", [None])[0],
        )

    def terms(self) -> Iterator[Term]:
        """Yield the terms that differ from the defaults, in canonical order."""
        if self.selector != _FULL or self.store is None:
            yield self.selector
        yield from self.refinements
        if self.budget != _default_budget(self.method):
            yield self.budget
        if tuple(_shown(term) for term in self.triggers) != self.method.triggers:
            yield from self.triggers
        if self.action != _DROP:
            yield self.action
        if self.store is not None:
            yield self.store

    def __str__(self) -> str:
        return "+".join(_shown(term) for term in self.terms())

    @property
    def evicts(self) -> bool:
        """True when tokens are dropped at all."""
        return self.selector != _FULL

    @property
    def method(self) -> MethodSpec:
        """The row of the selector."""
        return METHODS.get(self.selector.name)

    @property
    def sharing(self) -> MethodSpec:
        """The row of the budget: how lanes share it."""
        return METHODS.get(self.budget.name)

    @cached_property
    def needs(self) -> Needs:
        """Everything that has to be gathered for selector, action and refinements together."""
        needs = NOTHING
        for term in (self.selector, self.action, *self.refinements):
            needs = needs.union(METHODS.get(term.name).needs_of(dict(term.args)))
        return needs

    @cached_property
    def when(self) -> Triggers:
        """The moments at which the policy acts."""
        moments = Triggers()
        for term in self.triggers:
            moments = moments.union(METHODS.get(term.name).when(dict(term.args)))
        return moments

    @property
    def moved_sinks(self) -> int | None:
        """First tokens that move along where positions are counted in the cache; None where they are as seen."""
        rule = self.method.moved_sinks
        return None if rule is None else rule(dict(self.selector.args))

    def tokens_kept(self, prompt: int) -> int | None:
        """Return the average tokens kept per lane of a prompt of that length, None where the data decides."""
        if not self.evicts:
            return prompt
        if self.method.newest is not None:
            stays = self.method.num_protected(dict(self.selector.args), prompt)
            return min(prompt, stays + self.selector.number(self.method.newest))
        budget, keep = self.selector.get("budget"), self.selector.get("keep")
        if isinstance(budget, int):
            return min(prompt, budget)
        if keep is not None:
            fraction = Fraction(str(keep))
            return max(1, fraction.numerator * prompt // fraction.denominator)
        return None

    def tokens_protected(self, budget: int) -> int:
        """Return the most tokens of a lane that stay whatever their score, for a budget of that many."""
        terms = (self.selector, *self.refinements)
        return sum(METHODS.get(term.name).num_protected(dict(term.args), budget) for term in terms)

    @property
    def layers_skipped(self) -> int:
        """Number of first layers from which the method evicts nothing."""
        argument = self.method.skipped
        return 0 if argument is None else self.selector.number(argument)

    @property
    def lengths_known(self) -> bool:
        """True when every lane's length follows from the prompt's length alone."""
        return not self.method.chooses and not self.sharing.ragged


FULL = PolicySpec()
"""Keeps every token, in the model's own dtype."""


def _default_budget(method: MethodSpec) -> Term:
    """Return the default budget of a selector."""
    name = method.default_budget
    return Term(name, _arguments(name, METHODS.get(name).params, None))


def _split(text: str) -> list[str]:
    """Return the terms of `text`, split at `+` outside parentheses and stripped of blanks."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char == "(") - (char == ")")
        if depth < 0 or depth > 1:
            raise InvalidInputError(f"unbalanced parentheses in policy {text!r}")
        if char == "+" and depth == 0 and not re.search(r"\de$", current):
            parts.append(current.strip())
            current = ""
        else:
            current += char
    if depth:
        raise InvalidInputError(f"unbalanced parentheses in policy {text!r}")
    parts.append(current.strip())
    if not all(parts):
        raise InvalidInputError(f"policy {text!r} has an empty term; write e.g. snapkv(budget=1024)+int8")
    return parts


def _arguments(name: str, params: tuple[Parameter, ...], inner: str | None) -> tuple[tuple[str, Value], ...]:
    given: dict[str, Value] = {}
    method = MethodSpec(name, "selector", "", params)
    for pair in [p.strip() for p in (inner or "").split(",") if p.strip()]:
        key, equals, value = (s.strip() for s in pair.partition("="))
        if not equals or not value:
            raise InvalidInputError(f"{pair!r} in {name}({inner}) is not an argument; write key=value")
        if key in given:
            raise InvalidInputError(f"{name} is given {key} twice")
        given[key] = method.parameter(key).parse(value, name)
    resolved: list[tuple[str, Value]] = []
    for parameter in params:
        chosen = given.get(parameter.name, parameter.default)
        if chosen is not None:
            resolved.append((parameter.name, chosen))
    return tuple(resolved)


def _store_term(name: str, inner: str | None) -> Term:
    store = store_format(name)
    params = (Parameter("residual", "int", store.residual, 0), *_STORE_PARAMS[1:])
    return Term(store.name, _arguments(name, params, inner))


def _check_budget(text: str, selector: Term, method: MethodSpec) -> None:
    if not method.budgeted:
        return
    given = [key for key in ("budget", "keep") if selector.get(key) is not None]
    if len(given) != 1:
        problem = "neither" if not given else "both"
        raise InvalidInputError(
            f"{selector.name} in policy {text!r} has {problem} of budget and keep; "
            f"give one, e.g. {selector.name}(budget=1024) or {selector.name}(keep=0.5)"
        )
    budget, argument = selector.get("budget"), method.protected
    if isinstance(budget, int) and isinstance(argument, str) and budget < selector.number(argument):
        stays = f"its {argument} of {selector.number(argument)} tokens, which always stay"
        raise InvalidInputError(f"budget {budget} of {selector.name} is below {stays}")


def _shown(term: Term) -> str:
    """Return the spelling of `term` without arguments that equal their defaults."""
    if term.name in METHODS:
        params = METHODS.get(term.name).params
    else:
        params = (Parameter("residual", "int", store_format(term.name).residual, 0), *_STORE_PARAMS[1:])
    defaults = {parameter.name: parameter.default for parameter in params}
    shown = [f"{key}={_spell(value)}" for key, value in term.args if value != defaults[key]]
    return f"{term.name}({','.join(shown)})" if shown else term.name


def _spell(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
