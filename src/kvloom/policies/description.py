"""Description: the methods of the registry as plain facts, for tables and pages."""

from dataclasses import asdict
from typing import Any

from kvloom.errors import InvalidInputError
from kvloom.policies import plugins
from kvloom.policies.needs import Needs
from kvloom.policies.scorer import RULES
from kvloom.spec.method import METHODS, MethodSpec, Value


def describe() -> list[dict[str, Any]]:
    """Return one dict for each method that a policy may name, in the order of registration.

    Keys: name, role, summary, parameters, paper; of selectors also needs (what must be gathered for them), query_aware,
    acts (prefill, chunk, decode), ragged, budgeted and triggers.
    """
    plugins.load_all()
    return [_facts(method) for _, method in METHODS.items()]


def _facts(method: MethodSpec) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": method.name,
        "role": method.role,
        "summary": method.summary,
        "parameters": [
            {"name": p.name, "kind": p.kind, "default": p.default, "choices": list(p.choices), "doc": p.doc}
            for p in method.params
        ],
        "paper": method.paper,
    }
    if method.role == "selector":
        facts |= {
            "needs": _needs(method),
            "query_aware": method.query_aware,
            "acts": list(method.acts) if method.triggers else [],
            "ragged": method.ragged or METHODS.get(method.default_budget).ragged,
            "budgeted": method.budgeted,
            "triggers": list(method.triggers),
        }
    return facts


def _needs(method: MethodSpec) -> list[str]:
    """Return what must be gathered for a selector, [] where only its arguments could tell."""
    args: dict[str, Value] = {p.name: p.default for p in method.params if p.default is not None}
    try:
        needs = RULES.get(method.name)(args).needs if method.name in RULES else Needs()
    except InvalidInputError:  # it has an argument without default
        return []
    return [name.replace("_", " ") for name, value in asdict(needs).items() if value != getattr(Needs(), name)]
