"""Plugins: methods of this package and of others are registered when the first policy is read, not at import.

Another distribution adds methods with an entry point in the group `kvloom.policies` that names a module (importing it
registers) or a function without arguments (calling it registers). A file of no distribution is loaded by its path.
"""

import importlib.util
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from kvloom.errors import InvalidInputError
from kvloom.policies import actions, refinements, scorers

GROUP = "kvloom.policies"
"""Entry point group of methods in other distributions."""


@cache
def load_all() -> None:
    """Register every method once; raises `InvalidInputError` naming an entry point that fails."""
    for package in (scorers, refinements, actions):
        package.load_all()
    for point in entry_points(group=GROUP):
        try:
            loaded = point.load()
            if callable(loaded):
                loaded()
        except Exception as error:
            origin = point.dist.name if point.dist is not None else "an unknown distribution"
            raise InvalidInputError(
                f"the policy {point.name!r} of {origin} ({point.value}) cannot be loaded: "
                f"{type(error).__name__}: {error}. Repair or uninstall {origin}"
            ) from error


def load_file(path: Path) -> None:
    """Run the Python file at `path`, which registers methods, once in a process.

    The module is called `kvloom_plugin_NAME`, so that no other module is replaced. Raises `InvalidInputError` that
    names the file when there is none, when it is no Python file, or when it fails.
    """
    if path.suffix != ".py" or not path.is_file():
        what = "is no .py file" if path.is_file() else "is not a file"
        raise InvalidInputError(f"the plug-in {path} {what}; give a Python file that registers methods")
    _run_file(path.resolve())


@cache
def _run_file(path: Path) -> None:
    name = f"kvloom_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise InvalidInputError(
            f"the plug-in {path} cannot be loaded: {type(error).__name__}: {error}. KVLOOM_DEBUG=1 shows where"
        ) from error
