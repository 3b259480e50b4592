"""Reading: turns users' text into policies. All further code passes policies as objects."""

from collections.abc import Sequence

from kvloom.errors import InvalidInputError
from kvloom.policies import plugins
from kvloom.policies.allowlist import EVERYTHING, AllowList
from kvloom.spec.policy import PolicySpec


def read_policy(given: str | PolicySpec) -> PolicySpec:
    """Return the policy that a user gives: text as `PolicySpec.parse` reads it, in which plug-ins have a spelling too.

    Raises `InvalidInputError` saying what is wrong and what is known.
    """
    plugins.load_all()
    if isinstance(given, PolicySpec):
        return given
    if not isinstance(given, str):
        kind = type(given).__name__
        raise InvalidInputError(f"a policy is text such as 'snapkv(budget=1024)', or a PolicySpec, not {kind}")
    return PolicySpec.parse(given)


def read_allow_list(entries: Sequence[str] | None) -> AllowList:
    """Return what requests may ask for, None for everything: names of selectors, and whole policies.

    Raises `InvalidInputError` for an entry that is neither.
    """
    if entries is None:
        return EVERYTHING
    plugins.load_all()
    return AllowList.parse(entries)
