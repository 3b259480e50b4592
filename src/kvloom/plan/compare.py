"""The same question with other attention, stores or policies, side by side."""

from dataclasses import dataclass, replace
from typing import Any

from kvloom.errors import InvalidInputError
from kvloom.plan.figure import ALL_DEVICES, Figure, weakest
from kvloom.plan.memory import Memory
from kvloom.plan.question import Question
from kvloom.plan.roofline import Roofline
from kvloom.plan.serving import policy_refusals
from kvloom.registry import nearest
from kvloom.spec.bounds import Bounds
from kvloom.spec.format import runs, store_format, store_names
from kvloom.spec.hypothetical import attention_variants
from kvloom.spec.policy import PolicySpec, Term

COMPARISONS = ("attention", "stores", "policies")


@dataclass(frozen=True)
class Row:
    """One alternative: its KV, the users and context that fit, and the least time per token; `note` is a condition."""

    name: str
    bytes_per_token: Figure
    kv_of_request: Figure
    max_users: int | None
    max_context: int | None
    tpot: Figure
    note: str = ""

    def json(self) -> dict[str, Any]:
        """Return the row as JSON fields."""
        return {
            "name": self.name, "bytes_per_token": self.bytes_per_token.json(),
            "kv_of_request": self.kv_of_request.json(), "max_users": self.max_users, "max_context": self.max_context,
            "tpot_lower_bound": self.tpot.json(), "note": self.note,
        }  # fmt: skip


def compare(asked: Question, what: str) -> list[Row]:
    """Return the alternatives of `what`; raises `InvalidInputError` for an unknown comparison."""
    if what not in COMPARISONS:
        hint = nearest(what, list(COMPARISONS))
        raise InvalidInputError(f"unknown comparison {what!r}{hint}; known: {', '.join(COMPARISONS)}")
    if not asked.model.kv_layers:
        raise InvalidInputError(f"{asked.model.name} has no keys and values, so there is nothing to compare")
    if what == "attention":
        return [_row(name, replace(asked, model=model), "" if model is asked.model else "would have to be trained")
                for name, model in attention_variants(asked.model)]
    if what == "stores":
        return [_store_row(asked, name) for name in _stores(asked)]
    return [_policy_row(asked, policy) for policy in candidate_policies(asked)]


def candidate_policies(asked: Question) -> list[PolicySpec]:
    """Return policies to compare for `asked`: the asked one, none, stores, eviction to a quarter, and both."""
    budget = max(64, asked.prompt // 4)
    texts = [
        "full", "int8", "int4", f"streaming(window={max(1, budget - 4)})", f"snapkv(budget={budget})",
        f"snapkv(budget={budget})+pyramid", f"snapkv(budget={budget})+adaptive", f"expected(budget={budget})+adaptive",
        f"kvzip(budget={budget})", f"h2o(budget={budget})+slack(tokens=64)", f"tova(budget={budget})",
        f"knorm(budget={budget})", f"snapkv(budget={budget})+int8", f"snapkv(budget={budget})+adaptive+int4",
    ]  # fmt: skip
    found = [asked.policy]
    for text in texts:
        policy = PolicySpec.parse(text)
        if policy not in found:
            found.append(policy)
    return found


def _stores(asked: Question) -> list[str]:
    names = [asked.native_store, *(name for name in store_names() if store_format(name).bits < 16)]
    return list(dict.fromkeys(names))


def _store_row(asked: Question, name: str) -> Row:
    store = store_format(name)
    notes = [] if runs(name) else ["planned only: this store is not served yet"]
    if asked.block_size % store.group:
        size = -(-asked.block_size // store.group) * store.group
        asked = replace(asked, block_size=size)
        notes.append(f"block size {size}")
    if store.residual:
        notes.append(f"newest {store.residual} tokens in 16 bit")
    spec = None if name == asked.native_store else PolicySpec.parse(name).store
    return _row(name, replace(asked, policy=replace(asked.policy, store=spec)), "; ".join(notes))


def _policy_row(asked: Question, policy: PolicySpec) -> Row:
    notes = [] if policy.lengths_known else ["upper bound; lengths depend on the data"]
    if policy.store is not None:
        group = store_format(policy.store.name).group
        if asked.block_size % group:
            asked = replace(asked, block_size=-(-asked.block_size // group) * group)
    changed = replace(asked, policy=policy)
    return _row(str(policy), changed, "; ".join([*notes, *policy_refusals(changed)]))


def per_token(asked: Question, store: Term | None, on_device: bool = False) -> Figure:
    """Return the bytes that one more token adds to a request of full blocks, in `store` or the native one.

    On all devices together, or on each where `on_device`.
    """
    kv = asked.device_kv if on_device else asked.whole_kv
    if kv is None:
        return Figure(0, "bytes", "exact", "no keys and values")
    total = 0
    for index, layer in enumerate(kv.layers):
        if layer.source is None:
            size = kv.layer_block_bytes(index)
            if store is not None and layer.window is None:
                size = store_format(store.name).block_bytes(kv.block_size, layer.k_width, layer.v_width)
            total += layer.num_lanes * size
    label = weakest("exact" if asked.model.exact else "assumed")
    return Figure(total / kv.block_size, "bytes", label, "all layers, before windows are full")


def _row(name: str, asked: Question, note: str) -> Row:
    memory = Memory(asked)
    end = memory.footprint.end
    kv = Bounds(end.low * asked.devices, end.high * asked.devices)
    label = weakest("exact" if kv.exact else "bound", "exact" if asked.model.exact else "assumed")
    figure = Figure(kv.high, "bytes", label, "at the last token", None if kv.exact else kv.low)
    token = per_token(asked, asked.policy.store)
    if asked.devices > 1:
        figure, token = figure.of(ALL_DEVICES), token.of(ALL_DEVICES)
    return Row(name, token, figure, memory.max_users(), memory.max_context(),
               Roofline(asked).tpot(), note)
