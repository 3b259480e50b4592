"""Changes for a question that does not fit, cheapest first: settings, memory formats, fewer or shorter requests."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
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

_QUANTIZATIONS = (("int8", "rounding of weights to 8 bits"), ("int4", "small models lose a lot; measure the loss"))


@dataclass(frozen=True)
class Advice:
    """One change: the flags of `kvloom plan` that make it, its cost, and whether everything fits with it."""

    change: str
    flags: str
    cost: str
    enough: bool

    def json(self) -> dict[str, Any]:
        """Return the advice as JSON fields."""
        return {"change": self.change, "flags": self.flags, "cost": self.cost, "enough": self.enough}


def advise(asked: Question) -> list[Advice]:
    """Return changes in order of their cost, each computed with the same formulas; nothing when all fits already."""
    if Memory(asked).fits is not False:
        return []
    found: list[Advice] = []
    for step in (_settings, _stores, _weights, _eviction, _demand, _devices):
        found.extend(step(asked))
    return found


def _fits(asked: Question) -> bool:
    return bool(Memory(asked).fits)


def _settings(asked: Question) -> Iterator[Advice]:
    if asked.utilization < 0.95:
        yield Advice("use more of the device's memory", "--gpu-memory-utilization 0.95",
                     "nothing, if the device runs nothing else", _fits(replace(asked, utilization=0.95)))
    if asked.chunk > 512:
        yield Advice("process prompts in smaller chunks", "--max-num-batched-tokens 512",
                     "slower prefill", _fits(replace(asked, chunk=512)))


def _stores(asked: Question) -> Iterator[Advice]:
    if asked.policy.store is not None or not asked.model.kv_layers:
        return
    names = [name for name in store_names() if runs(name) and store_format(name).bits < 16]
    for name in sorted(names, key=lambda n: -bits_per_element(n, 128)):
        group = store_format(name).group
        size = -(-asked.block_size // group) * group
        changed = replace(asked, block_size=size, policy=replace(asked.policy, store=PolicySpec.parse(name).store))
        extra = f" --block-size {size}" if size != asked.block_size else ""
        cost = f"{bits_per_element(name, 128):.3g} bits a number; measure the loss"
        yield Advice(f"store K and V as {name}", f'--kv-policy "{changed.policy}"{extra}', cost, _fits(changed))


def _weights(asked: Question) -> Iterator[Advice]:
    if asked.dtype == "float32":
        yield Advice("run in bfloat16", "--dtype bfloat16", "rounding of weights and activations",
                     _fits(replace(asked, dtype="bfloat16")))
    if asked.device.kind != "cpu" or asked.quantization is not None or asked.model.weight_format is not None:
        return
    for name, cost in _QUANTIZATIONS:
        try:
            changed = replace(asked, quantization=name)
        except KvloomError:
            return
        if not changed.packed.obstacles:
            yield Advice(f"keep weights in {name}", f"--quantization {name}", cost, _fits(changed))


def _eviction(asked: Question) -> Iterator[Advice]:
    """Yield the largest budget that fits, when the KV after eviction does not fit."""
    if asked.policy.evicts or not asked.model.kv_layers:
        return

    def with_budget(budget: int) -> Question:
        text = f"snapkv(budget={budget})" + (f"+{asked.policy.store.name}" if asked.policy.store else "")
        return replace(asked, policy=PolicySpec.parse(text))

    budget = largest(lambda n: _fits(with_budget(n)), 64, asked.prompt)
    if budget is not None:
        yield Advice(f"evict: keep {budget} of {asked.prompt} prompt tokens per lane",
                     f'--kv-policy "{with_budget(budget).policy}"', "lossy; measure it on your text", True)


def _demand(asked: Question) -> Iterator[Advice]:
    memory = Memory(asked)
    users, context = memory.max_users(), memory.max_context()
    if users:
        yield Advice(f"serve {users} users at once; others wait", f"--users {users}", "longer queues", True)
    if context and context > 1:
        yield Advice(f"shorten the context to {context} tokens", f"--context {context}", "shorter requests", True)


def _devices(asked: Question) -> Iterator[Advice]:
    if asked.device.kind == "cpu":
        return
    for count in range(asked.devices + 1, MOST_DEVICES + 1):
        try:
            changed = replace(asked, devices=count)
        except KvloomError:
            continue
        if _fits(changed):
            yield Advice(f"use {count} devices", f"--devices {count}", f"{count - asked.devices} more of them", True)
            break
    now = asked.device.memory_bytes or 0
    larger = sorted((d for _, d in DEVICES.items() if (d.memory_bytes or 0) > now), key=lambda d: d.memory_bytes or 0)
    for device in larger:
        if _fits(replace(asked, device=device)):
            size = format_bytes(device.memory_bytes or 0)
            yield Advice(f"use {device.name} ({size})", f"--device {device.name}", "another device", True)
            break
