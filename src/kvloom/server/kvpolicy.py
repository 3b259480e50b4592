"""The `kv_policy` of a request: the one place where a body's wish about the KV cache is read."""

from typing import Any

from kvloom.server.refusal import bad_field

ALIASES = {"none": "full", "": "full"}
"""Other ways to ask for a cache that keeps everything."""


def read_kv_policy(value: Any) -> str | None:
    """Return the policy that a body asks for, as the engine takes it; None, for an absent one, is the engine's own.

    The engine checks it against the model and the prompt before anything runs.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise bad_field("kv_policy", "kv_policy is one string, such as 'snapkv(budget=1024,window=64)'")
    return ALIASES.get(value.strip(), value)
