"""Memory of one device: weights, activations, runtime and KV; the largest batch and the longest context."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from kvloom.plan.figure import Figure, Label, of_bounds
from kvloom.plan.question import Question
from kvloom.spec.footprint import Bounds, Footprint, request_footprint
from kvloom.spec.layer import Attention, Experts, Latent, LayerSpec
from kvloom.spec.model import DTYPE_BYTES, ModelSpec
from kvloom.units import MIB

RUNTIME_BYTES = {"cpu": 300 * MIB, "gpu": 800 * MIB}
"""Assumed: interpreter, torch and its libraries on the CPU; context, libraries and workspace on a GPU."""

MOST_TOKENS = 1 << 30
"""Longest context that is searched."""


@dataclass(frozen=True)
class Memory:
    """The bytes of one device that a `Question` comes to."""

    question: Question

    @cached_property
    def weights(self) -> Figure:
        """Weights on one device."""
        asked = self.question
        total = asked.model.stored_weight_bytes(asked.dtype)
        label: Label = "exact" if asked.model.exact else "assumed"
        note = "from the files"
        if asked.model.weight_bytes is None:
            note = "parameters of the config times their width"
        if not asked.model.exact:
            note = "estimated from the numbers given"
        if asked.devices == 1:
            return Figure(total, "bytes", label, note)
        share = device_params(asked.model, asked.devices) / asked.model.num_params
        note = f"{share:.1%} of the whole: matrices divided by {asked.devices}, K/V of few heads and norms replicated"
        return Figure(round(total * share), "bytes", "assumed", note)

    @cached_property
    def activations(self) -> Figure:
        """Largest intermediate results of one step."""
        asked, model = self.question, self.question.model
        rows = min(asked.chunk, asked.users * asked.prompt)
        width = max(_widest(layer, model.hidden_size) for layer in model.layers)
        size = max(2, DTYPE_BYTES[asked.dtype])
        logits = min(asked.users, rows) * model.vocab_size * (4 + size)
        amount = rows * (2 * model.hidden_size + width // asked.devices) * size + logits
        return Figure(amount, "bytes", "assumed", f"{rows} rows of the widest layer, and the logits of last rows")

    @cached_property
    def runtime(self) -> Figure:
        """What the process takes before it loads a model."""
        kind = self.question.device.kind
        return Figure(RUNTIME_BYTES[kind], "bytes", "assumed", "interpreter and libraries" if kind == "cpu" else
                      "device context, libraries and workspace")

    @cached_property
    def state(self) -> Figure:
        """Recurrent state of one request, if the model has any."""
        return Figure(self.question.model.state_bytes, "bytes", "exact", "of fixed size, whatever the context")

    @cached_property
    def footprint(self) -> Footprint:
        """KV of one request on one device."""
        return self.footprint_of(self.question)

    @staticmethod
    def footprint_of(asked: Question) -> Footprint:
        """Return the KV of one request of `asked` on one device."""
        kv = asked.device_kv
        if kv is None:
            none = Bounds(0, 0)
            return Footprint(none, none, none, none, none)
        return request_footprint(kv, asked.policy, asked.prompt, asked.output, asked.chunk)

    @cached_property
    def kv_of_request(self) -> Figure:
        """Most KV bytes of one request at any time: what admission counts."""
        return of_bounds(self.footprint.peak)

    def kv_bytes(self, asked: Question) -> int:
        """Return the most KV and state bytes of all users of `asked`.

        Without a policy every user counts its peak. With one, only as many prompts as the tokens of a step touch are
        at their peak at a time; the other users hold what the policy left them, and what they generated.
        """
        found = self.footprint_of(asked)
        busy = asked.users
        if asked.policy.evicts or asked.policy.store is not None:
            busy = min(asked.users, -(-asked.chunk // asked.prompt) + 1)
        steady = min(max(found.settled.high, found.decode.high), found.peak.high)
        return busy * found.peak.high + (asked.users - busy) * steady + asked.users * asked.model.state_bytes

    @cached_property
    def kv(self) -> Figure:
        """KV of all users."""
        exact = self.footprint.peak.exact
        note = "" if exact else "upper bound; lengths depend on the data"
        if self.question.policy.evicts or self.question.policy.store is not None:
            note = (note + "; " if note else "") + "prompts in flight at their peak, others as the policy leaves them"
        low = None if exact else self.question.users * (self.footprint.settled.low + self.question.model.state_bytes)
        return Figure(self.kv_bytes(self.question), "bytes", "exact", note, low)

    @cached_property
    def total(self) -> Figure:
        """Everything on one device."""
        parts = [self.weights, self.activations, self.runtime, self.kv]
        amount = sum(part.value or 0 for part in parts)
        return Figure(amount, "bytes", "assumed", "the sum; activations and runtime are assumed")

    @cached_property
    def usable(self) -> Figure:
        """Memory of one device that may be used."""
        asked = self.question
        if asked.device.memory_bytes is None:
            return Figure(None, "bytes", "assumed", "the memory of this device is not known; give e.g. cpu:64GiB")
        amount = int(asked.device.memory_bytes * asked.utilization)
        return Figure(amount, "bytes", "assumed", f"{asked.utilization:.0%} of {asked.device.memory_bytes} bytes")

    @cached_property
    def kv_room(self) -> int | None:
        """Bytes left for KV on one device, negative when not even the weights fit; None when memory is not known."""
        if self.usable.value is None:
            return None
        taken = sum(part.value or 0 for part in (self.weights, self.activations, self.runtime))
        return int(self.usable.value - taken)

    @property
    def fits(self) -> bool | None:
        """Whether all users fit at once; None when the memory of the device is not known."""
        return None if self.kv_room is None else self.kv_bytes(self.question) <= self.kv_room

    def cell(self, context: int, users: int) -> tuple[int, bool | None]:
        """Return the total bytes of `users` requests of `context` tokens, and whether they fit."""
        memory = Memory(replace(self.question.with_context(context), users=users))
        return int(memory.total.value or 0), memory.fits

    def max_users(self, asked: Question | None = None) -> int | None:
        """Return the most users that fit, 0 when none does, None when memory is not known."""
        asked = asked or self.question
        return self._largest(lambda users: replace(asked, users=users), 1 << 24)

    def max_context(self, asked: Question | None = None) -> int | None:
        """Return the longest context in tokens that fits for all users, 0 when none does.

        At most `MOST_TOKENS`: a model whose memory does not grow has no limit of its own.
        """
        asked = asked or self.question
        return self._largest(asked.with_context, MOST_TOKENS, least=2)

    def _largest(self, ask: Callable[[int], Question], most: int, least: int = 1) -> int | None:
        if self.usable.value is None:
            return None

        def fits(number: int) -> bool:
            return bool(Memory(ask(number)).fits)

        if not fits(least):
            return 0
        low, high = least, least * 2
        while high <= most and fits(high):
            low, high = high, high * 2
        if high > most:
            return most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def device_params(model: ModelSpec, devices: int) -> float:
    """Return the weights that one of `devices` devices holds: matrices are divided, norms replicated.

    K and V of fewer heads than devices, and the latents of MLA, are replicated too.
    """
    hidden = model.hidden_size
    total = (model.embedding_params + (0 if model.tie_embeddings else model.head_params)) / devices + model.other_params
    for layer in model.layers:
        mixer = layer.mixer
        for name, count in mixer.projections(hidden).items():
            parts = devices
            if name in ("k", "v") and isinstance(mixer, Attention):
                parts = min(devices, mixer.num_kv_heads)
            elif name.endswith("_down"):
                parts = 1
            total += count / parts
        total += mixer.small_params(hidden) + layer.norm_params + layer.extra_params
        if layer.mlp is not None:
            total += layer.mlp.matrix_params(hidden) / devices + layer.mlp.small_params(hidden)
    return total


def _widest(layer: LayerSpec, hidden: int) -> int:
    """Return the widest row of intermediate results inside `layer`, in numbers per token."""
    mixer = layer.mixer
    width = hidden
    if isinstance(mixer, Attention):
        width = (mixer.num_heads + 2 * mixer.num_kv_heads) * mixer.head_dim + mixer.num_heads * mixer.v_width
    elif isinstance(mixer, Latent):
        width = mixer.num_heads * (2 * (mixer.nope_dim + mixer.rope_dim) + 2 * mixer.v_dim)
    inner = 0
    if isinstance(layer.mlp, Experts):
        inner = layer.mlp.matrices * (layer.mlp.per_token * layer.mlp.intermediate + layer.mlp.shared_intermediate)
    elif layer.mlp is not None:
        inner = layer.mlp.matrices * layer.mlp.intermediate
    return max(width, inner)
