"""Memory of one device: weights, activations, runtime and KV; the largest batch and the longest context.

On a CPU the parts are those of an engine's process; its peak occurs while loading or while running::

    runtime + tokenizer + the larger of   weights + loading             one matrix beside its packed copy
                                          weights + activations + KV    buffers of a step, blocks in use
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from kvloom.plan.figure import Figure, Label, of_bounds
from kvloom.plan.process import Process
from kvloom.plan.question import Question
from kvloom.spec.bounds import Bounds
from kvloom.spec.footprint import Footprint, request_footprint
from kvloom.spec.search import largest
from kvloom.spec.solo import solo_peak
from kvloom.units import format_bytes

MOST_TOKENS = 1 << 30
"""Longest context that is searched."""


@dataclass(frozen=True)
class Memory:
    """The bytes on one device that a `Question` needs."""

    question: Question

    @cached_property
    def process(self) -> Process:
        """What is not KV."""
        return Process(self.question)

    @cached_property
    def state(self) -> Figure:
        """Recurrent state of one request, if the model has any; counted whole on every device."""
        note = "of fixed size, whatever the context; its dtype is the engine's choice"
        if self.question.devices > 1:
            note += "; not divided by devices, which an engine may do"
        return Figure(self.question.model.state_bytes, "bytes", "assumed", note)

    @cached_property
    def footprint(self) -> Footprint:
        """KV of one request on one device."""
        return footprint_of(self.question)

    @cached_property
    def kv_of_request(self) -> Figure:
        """Most KV bytes of one request at any time: exact for one that runs alone, else what admission counts."""
        asked, found = self.question, self.footprint.peak
        alone = None
        if asked.users == 1 and asked.device_kv is not None:
            alone = solo_peak(asked.device_kv, asked.policy, asked.prompt, asked.output, asked.chunk)
        return of_bounds(found if alone is None else Bounds(alone, alone), self._open)

    @property
    def _open(self) -> str:
        """Note that says why only an upper bound is known beforehand."""
        known = self.question.policy.lengths_known
        return f"upper bound; {'steps depend on what else runs' if known else 'lengths depend on the data'}"

    def kv_bytes(self, asked: Question) -> int:
        """Return the most KV and state bytes of all users of `asked`.

        Without a policy every user counts with its peak. With a policy, only as many prompts as one step can process
        are at their peak at a time; the other users hold the tokens that the policy kept, and those they generated.
        """
        found = footprint_of(asked)
        busy = asked.users
        if asked.policy.evicts or asked.policy.store is not None:
            busy = min(asked.users, -(-asked.chunk // asked.prompt) + 1)
        steady = min(max(found.settled.high, found.decode.high), found.peak.high)
        return busy * found.peak.high + (asked.users - busy) * steady + asked.users * asked.model.state_bytes

    @cached_property
    def kv(self) -> Figure:
        """KV of all users, as admission counts it: enough for every division into steps."""
        exact = self.footprint.peak.exact
        note = "" if exact else self._open
        if self.question.policy.evicts or self.question.policy.store is not None:
            note = (note + "; " if note else "") + "prompts in flight at their peak, others as the policy leaves them"
        low = None if exact else self.question.users * (self.footprint.settled.low + self.question.model.state_bytes)
        if low is not None and self.question.users == 1 and self.kv_of_request.low is None:
            low = int(self.kv_of_request.value or 0) + self.question.model.state_bytes
            note = "set aside by admission, for every division into steps"
        label: Label = "exact" if exact else "bound"
        if self.question.model.state_bytes:
            label, note = "assumed", (note + "; " if note else "") + "with recurrent states"
        return Figure(self.kv_bytes(self.question), "bytes", label, note, low)

    @cached_property
    def total(self) -> Figure:
        """Everything on one device at the worst moment: while loading, or while running."""
        process = self.process
        idle = sum(int(part.value or 0) for part in (process.runtime, process.tokenizer, process.weights))
        running = sum(int(part.value or 0) for part in (process.activations, self.kv))
        loading = int(process.loading.value or 0)
        note = "the sum" if running >= loading else "the sum while weights are loaded; running takes less"
        return Figure(idle + max(running, loading), "bytes", "assumed", f"{note}; parts of it are assumed")

    @cached_property
    def usable(self) -> Figure:
        """Memory of one device that may be used."""
        asked = self.question
        if asked.device.memory_bytes is None:
            return Figure(None, "bytes", "assumed", "the memory of this device is not known; give e.g. cpu:64GiB")
        whole = asked.device.memory_bytes
        note = f"{asked.utilization:.0%} of {format_bytes(whole)}"
        return Figure(int(whole * asked.utilization), "bytes", "assumed", note)

    @cached_property
    def kv_room(self) -> int | None:
        """Bytes left for KV on one device, negative when not even the weights fit; None when memory is not known."""
        if self.usable.value is None:
            return None
        process = self.process
        parts = (process.weights, process.activations, process.runtime, process.tokenizer)
        return int(self.usable.value - sum(part.value or 0 for part in parts))

    @property
    def fits(self) -> bool | None:
        """Whether all users fit at once; None when the memory of the device is not known."""
        usable = self.usable.value
        return None if usable is None else (self.total.value or 0) <= usable

    def cell(self, context: int, users: int) -> tuple[int, bool | None]:
        """Return the total bytes of `users` requests of `context` tokens, and whether they fit."""
        memory = Memory(replace(self.question.with_context(context), users=users))
        return int(memory.total.value or 0), memory.fits

    def max_users(self, asked: Question | None = None) -> int | None:
        """Return the most users that fit, 0 when none does, None when memory is not known."""
        asked = asked or self.question
        return self._most(lambda users: replace(asked, users=users), 1 << 24)

    def max_context(self, asked: Question | None = None) -> int | None:
        """Return the longest context in tokens that fits for all users, 0 when none does.

        At most `MOST_TOKENS`: a model whose memory does not grow has no limit of its own.
        """
        asked = asked or self.question
        return self._most(asked.with_context, MOST_TOKENS, least=2)

    def _most(self, ask: Callable[[int], Question], most: int, least: int = 1) -> int | None:
        if self.usable.value is None:
            return None

        def fits(number: int) -> bool:
            return bool(Memory(ask(number)).fits)

        return largest(fits, least, most) or 0


def footprint_of(asked: Question) -> Footprint:
    """Return the KV of one request of `asked` on one device."""
    kv = asked.device_kv
    if kv is None:
        none = Bounds(0, 0)
        return Footprint(none, none, none, none, none)
    return _footprint(kv, asked.policy, asked.prompt, asked.output, asked.chunk)


_footprint = lru_cache(maxsize=4096)(request_footprint)
"""Cached: searches compute the same request for several numbers of users."""
