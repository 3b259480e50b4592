"""Plugins: methods of this package and of others are registered when the first policy is read, not at import.

Another distribution adds methods with an entry point in the group `kvloom.policies` that names a module (importing it
registers) or a function without arguments (calling it registers).
"""

from functools import cache
from importlib.metadata import entry_points

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
