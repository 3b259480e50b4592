"""The roofline: bytes and operations of prefill and decode, and the least time that a device needs for them.

A step takes at least `max(bytes / bandwidth, operations / peak)`. Every count is what must be moved or computed once,
so that the times are lower bounds: no real run is faster on that bandwidth and peak.
"""

from dataclasses import dataclass
from functools import cached_property

from kvloom.plan.figure import Figure
from kvloom.plan.operations import Operations
from kvloom.plan.question import Question
from kvloom.plan.rates import Rates
from kvloom.plan.reads import Reads
from kvloom.spec.search import largest


@dataclass(frozen=True)
class Roofline:
    """Work and least times of a `Question`, per device."""

    question: Question

    @cached_property
    def reads(self) -> Reads:
        """Bytes that steps read."""
        return Reads(self.question)

    @cached_property
    def operations(self) -> Operations:
        """Operations of prompts and tokens."""
        return Operations(self.question)

    @cached_property
    def rates(self) -> Rates:
        """Speed of the device."""
        return Rates(self.question)

    def tpot(self, batch: int | None = None, expected: bool = False) -> Figure:
        """Return the least seconds per generated token, for `batch` requests at once: the mean over the output.

        The i-th decode step reads the tokens held after the prompt and i generated tokens. Reads are a concave function
        of i, so the mean of the first and the last step is at most the mean of all steps.
        """
        asked = self.question
        batch = batch or asked.users
        steps = (1, asked.output - 1) if asked.output > 1 else (0,)
        kv = sum(self.reads.kv_read_bytes(asked.prompt, made) for made in steps) / len(steps)
        flops = sum(self.operations.decode_flops(asked.prompt, made) for made in steps) / len(steps)
        return self.rates.time(self.reads.weight_bytes(batch, expected) + batch * kv, batch * flops / asked.devices)

    def ttft(self) -> Figure:
        """Return the least seconds to the first token of one prompt that has the devices to itself."""
        asked = self.question
        return self.rates.time(self.reads.weight_bytes(1), self.operations.prefill_flops(asked.prompt) / asked.devices)

    @cached_property
    def kv_bound_context(self) -> int | None:
        """Context from which a step of all users reads more KV than weights; None when it never does.

        Reads never shrink with the context.
        """
        asked = self.question
        weights = self.reads.weight_bytes(asked.users)
        if asked.users * self.reads.kv_read_bytes(1 << 30, 0) <= weights:
            return None
        return (largest(lambda n: asked.users * self.reads.kv_read_bytes(n, 0) <= weights, 1, 1 << 30) or 0) + 1

    def intensity(self, batch: int) -> float:
        """Return the operations per byte of a decode step of `batch` requests at the full context, on one device."""
        asked = self.question
        generated = max(0, asked.output - 1)
        moved = self.reads.weight_bytes(batch) + batch * self.reads.kv_read_bytes(asked.prompt, generated)
        return batch * self.operations.decode_flops(asked.prompt, generated) / asked.devices / moved

    @cached_property
    def compute_bound_batch(self) -> int | None:
        """Fewest requests at which decode is bound by arithmetic; None when KV reads keep it from ever being so."""
        ridge = self.rates.ridge
        if ridge is None or self.intensity(1 << 30) < ridge:
            return None
        return (largest(lambda batch: self.intensity(batch) < ridge, 1, 1 << 30) or 0) + 1
