"""The `kv_policy` of a request: parsing of the field, and the policies that requests may name."""

from collections.abc import Sequence
from typing import Any

from kvloom.errors import InvalidInputError, KvloomError
from kvloom.policies.description import describe
from kvloom.policies.reading import read_policy
from kvloom.server.refusal import bad_field
from kvloom.spec.policy import PolicySpec

ALIASES = {"none": "full", "": "full"}
"""Other names of the policy that evicts nothing."""


def read_kv_policy(value: Any) -> PolicySpec | None:
    """Return the policy that a body asks for; None, for an absent one, is the engine's own.

    The engine checks it against the model and the prompt before anything runs.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise bad_field("kv_policy", "kv_policy is one string, such as 'snapkv(budget=1024,window=64)'")
    try:
        return read_policy(ALIASES.get(value.strip(), value))
    except KvloomError as error:
        raise bad_field("kv_policy", str(error), "unsupported") from None


def allowed_policies(given: Sequence[str]) -> tuple[str, ...] | None:
    """Return what requests may ask for, as the engine takes it; None is anything.

    `given` are methods and policies, or `all` or `none` alone; empty stands for every method that does not read the
    prompt a second time, because such a request costs as much as several. Raises `InvalidInputError`.
    """
    if not given:
        methods = [method for method in describe() if method["role"] == "selector"]
        return tuple(method["name"] for method in methods if "replay" not in method["needs"])
    if len(given) > 1 and {"all", "none"} & set(given):
        raise InvalidInputError(f"allow_kv_policies is {', '.join(given)}; all and none stand alone")
    if given[0] == "all":
        return None
    return () if given[0] == "none" else tuple(given)
