"""Description: the methods of the registry as plain facts, for tables and pages."""

from dataclasses import asdict
from typing import Any

from kvloom.errors import InvalidInputError
from kvloom.policies import plugins
from kvloom.policies.needs import Needs
from kvloom.policies.scorer import RULES
from kvloom.spec.method import METHODS, MethodSpec, Value

_ACTS_BY_TRIGGER = {"prefill": "prefill", "chunk": "chunk", "step": "decode", "every": "decode", "slack": "decode"}


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
        needs, acts = _needs_and_acts(method)
        facts |= {
            "needs": needs,
            "query_aware": method.query_aware,
            "acts": acts,
            "ragged": method.ragged or METHODS.get(method.default_budget).ragged,
            "budgeted": method.budgeted,
            "triggers": list(method.triggers),
        }
    return facts


def _needs_and_acts(method: MethodSpec) -> tuple[list[str], list[str]]:
    if method.name not in RULES:
        return [], []
    args: dict[str, Value] = {p.name: p.default for p in method.params if p.default is not None}
    try:
        rule = RULES.get(method.name)(args)
    except InvalidInputError:  # it has an argument without default: only the engine, which is given one, can tell
        return [], [_ACTS_BY_TRIGGER[trigger] for trigger in method.triggers]
    needs = [name.replace("_", " ") for name, value in asdict(rule.needs).items() if value != getattr(Needs(), name)]
    acts = ["prefill", *(["chunk"] if rule.per_chunk else []), *(["decode"] if rule.decodes else [])]
    return needs, acts
