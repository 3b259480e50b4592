"""Changes for a question that does not fit, cheapest first: settings, memory formats, fewer or shorter requests.

Where no change of settings or formats is enough alone, two of them together are tried, and more devices with one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from kvloom.errors import KvloomError
from kvloom.plan.memory import Memory
from kvloom.plan.question import Question
from kvloom.spec.format import bits_per_element, runs, store_format, store_names
from kvloom.spec.hardware import DEVICES
from kvloom.spec.policy import PolicySpec
from kvloom.spec.search import largest
from kvloom.units import format_bytes

MOST_DEVICES = 64

MOST_PAIRS = 3
"""Most pairs of changes that are advised."""

_QUANTIZATIONS = (("int8", "rounding of weights to 8 bits"), ("int4", "small models lose a lot; measure the loss"))
_FP8 = "float8_e4m3fn"


@dataclass(frozen=True)
class Advice:
    """One change or two: the flags of `kvloom plan` that make it, its cost, and whether everything fits with it."""

    change: str
    flags: str
    cost: str
    enough: bool

    def json(self) -> dict[str, Any]:
        """Return the advice as JSON fields."""
        return {"change": self.change, "flags": self.flags, "cost": self.cost, "enough": self.enough}


@dataclass(frozen=True)
class _Change:
    """A change, its cost, and the question with it."""

    change: str
    cost: str
    asked: Question

    def then(self, other: "_Change") -> "_Change":
        """Return both changes as one; `other` was made to the question of this one."""
        return _Change(f"{self.change}, and {other.change}", f"{self.cost}; {other.cost}", other.asked)


def advise(asked: Question) -> list[Advice]:
    """Return changes in order of their cost, each computed with the same formulas; nothing when all fits already."""
    if Memory(asked).fits is not False:
        return []
    single = [change for step in _STEPS for change in step(asked)]
    pairs = [] if any(_fits(change.asked) for change in single) else list(islice(_pairs(asked), MOST_PAIRS))
    return [
        Advice(found.change, flags(asked, found.asked), found.cost, _fits(found.asked))
        for found in chain(single, pairs, _demand(asked), _devices(asked))
    ]


def flags(asked: Question, changed: Question) -> str:
    """Return the flags of `kvloom plan` in which `changed` differs from `asked`."""
    words = []
    for name, flag in _FLAGS.items():
        value = getattr(changed, name)
        if value != getattr(asked, name):
            shown = f'"{value}"' if name == "policy" else value.name if name == "device" else value
            words.append(f"--{flag} {shown}")
    return " ".join(words)


_FLAGS = {
    "utilization": "gpu-memory-utilization", "chunk": "max-num-batched-tokens", "policy": "kv-policy",
    "block_size": "block-size", "dtype": "dtype", "quantization": "quantization", "users": "users",
    "context": "context", "devices": "devices", "device": "device",
}  # fmt: skip


def _fits(asked: Question) -> bool:
    return bool(Memory(asked).fits)


def _settings(asked: Question) -> Iterator[_Change]:
    if asked.utilization < 0.95:
        yield _Change("use more of the device's memory", "nothing, if the device runs nothing else",
                      replace(asked, utilization=0.95))
    if asked.chunk > 512:
        yield _Change("process prompts in smaller chunks", "slower prefill", replace(asked, chunk=512))


def _stores(asked: Question) -> Iterator[_Change]:
    if asked.policy.store is not None or not asked.model.kv_layers:
        return
    names = [name for name in store_names() if runs(name) and store_format(name).bits < 16]
    for name in sorted(names, key=lambda n: -bits_per_element(n, 128)):
        group = store_format(name).group
        size = -(-asked.block_size // group) * group
        changed = replace(asked, block_size=size, policy=replace(asked.policy, store=PolicySpec.parse(name).store))
        cost = f"{bits_per_element(name, 128):.3g} bits a number; measure the loss"
        yield _Change(f"store K and V as {name}", cost, changed)


def _weights(asked: Question) -> Iterator[_Change]:
    if asked.dtype == "float32":
        yield _Change("run in bfloat16", "rounding of weights and activations", replace(asked, dtype="bfloat16"))
    if asked.quantization is not None or asked.model.weight_format is not None:
        return
    if asked.device.kind != "cpu":
        row = asked.device.name.partition(":")[0]
        if row in DEVICES and DEVICES.get(row).peak(_FP8) is not None and asked.dtype in ("bfloat16", "float16"):
            yield _Change("keep weights in FP8", "rounding of weights to 8 bits", replace(asked, dtype=_FP8))
        return
    for name, cost in _QUANTIZATIONS:
        try:
            changed = replace(asked, quantization=name)
        except KvloomError:
            return
        if not changed.packed.obstacles:
            yield _Change(f"keep weights in {name}", cost, changed)


def _eviction(asked: Question) -> Iterator[_Change]:
    """Yield the largest budget that fits, when the KV after eviction does not fit."""
    if asked.policy.evicts or not asked.model.kv_layers:
        return

    def with_budget(budget: int) -> Question:
        text = f"snapkv(budget={budget})" + (f"+{asked.policy.store.name}" if asked.policy.store else "")
        return replace(asked, policy=PolicySpec.parse(text))

    budget = largest(lambda n: _fits(with_budget(n)), 64, asked.prompt)
    if budget is not None:
        what = f"evict: keep {budget} of {asked.prompt} prompt tokens per lane"
        yield _Change(what, "lossy; measure it on your text", with_budget(budget))


_STEPS: tuple[Callable[[Question], Iterator[_Change]], ...] = (_settings, _stores, _weights, _eviction)
"""Changes that leave requests and devices as they are, cheapest first."""


def _pairs(asked: Question) -> Iterator[_Change]:
    """Yield two changes together with which all fits, where neither is enough alone; each pair once."""
    seen = set()
    for index, step in enumerate(_STEPS):
        for first in step(asked):
            for later in _STEPS[index:]:
                for second in later(first.asked):
                    made = flags(asked, second.asked)
                    if made not in seen and _fits(second.asked):
                        seen.add(made)
                        yield first.then(second)


def _demand(asked: Question) -> Iterator[_Change]:
    memory = Memory(asked)
    users, context = memory.max_users(), memory.max_context()
    if users:
        yield _Change(f"serve {users} users at once; others wait", "longer queues", replace(asked, users=users))
    if context and context > 1:
        yield _Change(f"shorten the context to {context} tokens", "shorter requests", asked.with_context(context))


def _devices(asked: Question) -> Iterator[_Change]:
    """Yield the fewest devices that are enough, fewer ones where one cheaper change helps, and the next larger one."""
    if asked.device.kind == "cpu":
        return
    alone = _fewest(asked)
    best = alone
    helped = None
    for first in chain(_settings(asked), _stores(asked), _weights(asked)):
        found = _fewest(first.asked)
        if found is not None and (best is None or found.asked.devices < best.asked.devices):
            best, helped = found, first.then(found)
    yield from (change for change in (helped, alone) if change is not None)
    now = asked.device.memory_bytes or 0
    larger = sorted((d for _, d in DEVICES.items() if (d.memory_bytes or 0) > now), key=lambda d: d.memory_bytes or 0)
    for device in larger:
        if _fits(replace(asked, device=device)):
            size = format_bytes(device.memory_bytes or 0)
            yield _Change(f"use {device.name} ({size})", "another device", replace(asked, device=device))
            break


def _fewest(asked: Question) -> _Change | None:
    """Return the smallest number of devices above the asked one that is enough, None when there is none."""
    for count in range(asked.devices + 1, MOST_DEVICES + 1):
        try:
            changed = replace(asked, devices=count)
        except KvloomError:
            continue
        if _fits(changed):
            return _Change(f"use {count} devices", f"{count - asked.devices} more of them", changed)
    return None
