"""Rooms import only the rooms below them."""

import ast

LEAVES = {"errors", "registry", "units"}
BELOW = {
    "errors": set(),
    "registry": {"errors"},
    "units": {"errors"},
    "spec": LEAVES,
    "plan": {"spec", *LEAVES},
    "kernels": {"spec", *LEAVES},
    "cache": {"kernels", "spec", *LEAVES},
    "policies": {"cache", "kernels", "spec", *LEAVES},
    "attention": {"policies", "cache", "kernels", "spec", *LEAVES},
    "models": {"attention", "policies", "cache", "kernels", "spec", *LEAVES},
    "engine": {"models", "attention", "policies", "cache", "kernels", "plan", "spec", *LEAVES},
    "bench": LEAVES,
    "measure": {"engine", "models", "attention", "policies", "cache", "kernels", "plan", "spec", *LEAVES},
    "server": {"engine", "models", "attention", "policies", "cache", "kernels", "plan", "spec", "kvloom", *LEAVES},
}
"""What each room may import beside itself. `plan` stands beside the tower, on `spec` alone."""

BELOW["cli"] = set(BELOW) | {"kvloom"}
"""The command line may use everything, the package's version included."""

BELOW["kvloom"] = {"engine"}
"""The package names the public classes of the engine and imports them on first use."""


def imports(module) -> list[tuple[int, str]]:
    """Return (line, dotted name) of everything in `kvloom` that `module` imports, type-checking imports included."""
    found = []
    package = module.name if module.path.name == "__init__.py" else module.name.rpartition(".")[0]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            found += [(node.lineno, source if source != "kvloom" else f"kvloom.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "kvloom"]


def imported_room(name: str) -> str:
    """Return the room that `kvloom.room.thing` is in; names of the package itself are the room `kvloom`."""
    second = name.split(".")[1] if "." in name else ""
    return second if second in BELOW else "kvloom"


def test_every_module_stands_in_a_known_room(modules):
    assert [module.name for module in modules if module.room not in BELOW] == []


def test_a_room_imports_only_rooms_below_it(modules):
    wrong = []
    for module in modules:
        allowed = BELOW[module.room] | {module.room}
        wrong += [
            f"{module.name}:{line} imports {name}"
            for line, name in imports(module)
            if imported_room(name) not in allowed
        ]
    assert wrong == []


def test_no_room_is_below_itself():
    for room, below in BELOW.items():
        for lower in below - {"kvloom"}:
            assert room not in BELOW[lower] | {lower}
