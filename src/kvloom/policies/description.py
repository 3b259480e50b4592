"""Description: the methods of the registry as plain facts, for tables and pages."""

from typing import Any

from kvloom.policies import plugins
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
            "needs": [name.replace("_", " ") for name in method.needs_of(_defaults(method)).gathered],
            "query_aware": method.query_aware,
            "acts": list(method.acts) if method.triggers else [],
            "ragged": method.chooses or METHODS.get(method.default_budget).ragged,
            "budgeted": method.budgeted,
            "triggers": list(method.triggers),
        }
    return facts


def _defaults(method: MethodSpec) -> dict[str, Value]:
    return {p.name: p.default for p in method.params if p.default is not None}
