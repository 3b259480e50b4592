"""`kvloom methods`: the table of cache methods, from the registry that the engine uses."""

from typing import Any

from kvloom.cli.answer import write, write_json
from kvloom.cli.command import Command, Flag
from kvloom.cli.plugin import PLUGIN_FLAG
from kvloom.cli.table import table

ROLES = {
    "selector": "what is kept",
    "refine": "refinements of scores",
    "budget": "how a budget is divided",
    "trigger": "when a policy acts",
    "action": "what happens to evicted tokens",
}


def run(as_json: bool) -> None:
    """Print every method that a policy may name, as tables or as JSON."""
    from kvloom.policies.description import describe

    methods = describe()
    if as_json:
        write_json({"methods": methods})
        return
    for role, title in ROLES.items():
        chosen = [method for method in methods if method["role"] == role]
        header, *rows = _rows(role, chosen)
        write("\n".join([title, *table(header, rows, indent=2)]) + "\n\n")


def _rows(role: str, methods: list[dict[str, Any]]) -> list[list[str]]:
    """Return the header and a row for each method; only eviction methods have the columns of needs and length."""
    rows = [["name", "what it does", "arguments", "paper"]]
    if role == "selector":
        rows[0][2:2] = ["needs", "query-aware", "acts", "lanes"]
    for method in methods:
        arguments = ", ".join(f"{p['name']}={_shown(p['default'])}" for p in method["parameters"])
        row = [method["name"], method["summary"], arguments, method["paper"]]
        if role == "selector":
            row[2:2] = [
                ", ".join(method["needs"]) or "-",
                "yes" if method["query_aware"] else "no",
                ", ".join(method["acts"]) or "-",
                "ragged" if method["ragged"] else "equal",
            ]
        rows.append(row)
    return rows


def _shown(default: object) -> str:
    return "..." if default is None else str(default).lower() if isinstance(default, bool) else str(default)


methods = Command(
    "methods",
    callback=run,
    short_help="List the methods that a cache policy may name.",
    help="""List what `--kv-policy` and `kv_policy` may name: what each method scores and needs, whether the question
    must be in the prompt for its published quality, when it can act, whether lanes get different lengths, its paper.
    Methods of other installed packages are listed as well.""",
    params=[PLUGIN_FLAG, Flag(["--json", "as_json"], is_flag=True, help="Print one JSON object.")],
)
