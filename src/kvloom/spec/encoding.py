"""What of a policy's store is served: one function of every reason against it, for engine and planner. Torch-free."""

from dataclasses import replace

from kvloom.spec.format import SERVED_STORES, store_format
from kvloom.spec.kv import KVSpec
from kvloom.spec.policy import PolicySpec
from kvloom.spec.store import NATIVE_STORE


def encoded_only(policy: PolicySpec, native: str) -> PolicySpec:
    """Return `policy` without its store where that is the `native` one, in which the model computes.

    So a request keeps its blocks as they are computed (`+bf16`) on an engine that encodes those of others.
    """
    return replace(policy, store=None) if policy.store is not None and policy.store.name == native else policy


def encoding_refusals(policy: PolicySpec, kv: KVSpec | None = None) -> list[str]:
    """Return every reason why requests cannot be served with the store of `policy`; [] when they can, or there is none.

    Without `kv` only what the policy itself says.
    """
    term = policy.store
    if term is None:
        return []
    name, reasons = term.name, []
    if name in NATIVE_STORE.values():
        if kv is not None:
            reasons.append(f"store {name} is what a model of that dtype computes in; this one computes in {kv.store}")
    elif name not in SERVED_STORES:
        reasons.append(f"store {name} is planned only: it is not served yet")
    if term.get("encode") == "streaming":
        reasons.append("encode=streaming is planned only: blocks are encoded once the prompt is complete")
    if policy.when.while_decoding:
        reasons.append(f"{policy.selector.name} evicts while generating, and encoded blocks lose no tokens")
    if kv is not None and not reasons:
        reasons += _lane_reasons(name, kv)
    return reasons


def _lane_reasons(name: str, kv: KVSpec) -> list[str]:
    """Return the reasons that lie in the lanes of a model."""
    store = store_format(name)
    whole = [lanes for lanes in kv.sets if lanes.window is None]
    if not whole:
        return [f"every layer of this model has a window, whose blocks stay in 16 bit, so {name} would encode nothing"]
    if kv.block_size % store.group:
        return [f"{name} encodes {store.group} tokens together, and block_size {kv.block_size} is no multiple"]
    odd = {kv.block_size * (lanes.k_width + lanes.v_width) for lanes in whole}
    return [f"{name} scales follow the codes at multiples of 4 bytes, and a block has {size} bytes of codes"
            for size in sorted(odd) if size % 4]  # fmt: skip
