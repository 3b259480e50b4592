"""The policies that are measured by default, and the spelling of a method for a share of the prompt. Torch-free."""

from collections.abc import Iterator

from kvloom.spec.format import is_store, runs, store_names
from kvloom.spec.method import METHODS
from kvloom.spec.policy import PolicySpec

DEFAULT_METHODS = (
    "random(sinks=4)", "streaming+slack", "tova+slack", "snapkv(pooling=max,kernel=7)",
    "snapkv(pooling=max,kernel=7)+adaptive", "expected", "h2o+prefill+slack",
)  # fmt: skip
"""Random eviction as a floor, a sliding window, and one method of each kind that works well."""

_BASES = {"refine": ("snapkv", "h2o+prefill"), "budget": ("snapkv",), "action": ("h2o+prefill",)}
"""Methods with which parts that cannot act alone are measured."""


def at_share(method: str, keep: float, prompt: int) -> PolicySpec:
    """Return the policy of `method` (a selector and its additions, or a store) that keeps `keep` of a prompt.

    Methods with a budget get the share itself, windows its tokens; methods that choose their own length and stores are
    unchanged.
    """
    head, plus, additions = method.partition("+")
    name, _, inner = head.partition("(")
    given = inner.rstrip(")")
    tokens = max(8, int(keep * prompt))
    if is_store(name):
        return PolicySpec.parse(method)
    row = METHODS.get(name)
    if row.newest is not None:
        others = tokens - row.num_protected(dict(PolicySpec.parse(head).selector.args), tokens)
        given = ",".join(filter(None, [given, f"{row.newest}={max(1, others)}"]))
    elif row.budgeted:
        given = ",".join(filter(None, [f"keep={keep:g}", given]))
    return PolicySpec.parse(f"{name}({given}){plus}{additions}" if given else method)


def registered_methods() -> Iterator[str]:
    """Yield every method that is registered, alone, and every other part of a policy with a method to act on."""
    for name, method in METHODS.items():
        if method.role == "selector" and name != "full":
            yield name
    for name, method in METHODS.items():
        for base in _BASES.get(method.role, ()):
            if name not in ("uniform", "drop"):
                yield f"{base}+{name}"


def registered_stores() -> Iterator[str]:
    """Yield every store that requests may name."""
    for name in store_names():
        if runs(name) and name not in ("bf16", "fp16", "fp32"):
            yield name
