"""Memory of one device: weights, activations, runtime and KV; the largest batch and the longest context.

On a CPU the parts are those of an engine's process; its peak occurs while loading or while running::

    runtime + tokenizer + the larger of   weights + loading             one matrix beside its packed copy
                                          weights + activations + KV    buffers of a step, blocks in use
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from kvloom.plan.figure import Figure, Label, of_bounds
from kvloom.plan.question import Question
from kvloom.spec.bounds import Bounds
from kvloom.spec.footprint import Footprint, request_footprint
from kvloom.spec.layer import Attention, Experts, Latent, LayerSpec
from kvloom.spec.model import DTYPE_BYTES, ModelSpec
from kvloom.spec.search import largest
from kvloom.spec.solo import solo_peak
from kvloom.units import MIB, format_bytes

RUNTIME_BYTES = {"cpu": 232 * MIB, "gpu": 800 * MIB}
"""Assumed: interpreter, torch and its libraries on the CPU; context, libraries and workspace on a GPU."""

TOKENIZER_BYTES, TOKENIZER_BYTES_PER_TOKEN = 16 * MIB, 400
"""Assumed: bytes of a tokenizer, fixed and for every token of its vocabulary."""

LONGEST_STRETCH = 768
"""Tokens: the CPU kernels process longer steps in stretches of at most this length, so buffers grow no further."""

DECODING_BYTES = 32 * MIB
"""Assumed: pieces of a stored tensor while it is decoded."""

MOST_TOKENS = 1 << 30
"""Longest context that is searched."""


@dataclass(frozen=True)
class Memory:
    """The bytes on one device that a `Question` needs."""

    question: Question

    @cached_property
    def weights(self) -> Figure:
        """Weights on one device."""
        asked, model = self.question, self.question.model
        total, known = model.stored_weight_bytes(asked.dtype), model.exact
        note = "parameters of the config times their width" if model.weight_bytes is None else "from the files"
        if asked.quantization is not None:
            total, known = asked.packed.num_bytes, known and not asked.packed.obstacles
            note = f"as the kernels pack them in {asked.quantization}, scales included"
            if asked.packed.obstacles:
                note = f"estimated: the kernels of {asked.quantization} do not run this model"
        if not model.exact:
            note = "estimated from the numbers given"
        label: Label = "exact" if known else "assumed"
        if asked.devices == 1:
            return Figure(total, "bytes", label, note)
        share = device_params(model, asked.devices) / model.num_params
        note = f"{share:.1%} of the whole: matrices divided by {asked.devices}, K/V of few heads and norms replicated"
        return Figure(round(total * share), "bytes", "assumed", note)

    @cached_property
    def activations(self) -> Figure:
        """Largest intermediate results of one step."""
        asked, model = self.question, self.question.model
        rows = min(asked.chunk, asked.users * asked.prompt)
        size = max(2, DTYPE_BYTES[asked.dtype])
        if asked.device.kind == "cpu":
            # products are computed in float32 and packed, those in 8 bits from whole rows; the residual stream and a
            # branch are float32
            stretch = min(rows, LONGEST_STRETCH)
            store = asked.packed.layers.activation_bytes
            width = max(4 * _projected(layer) + store * (_mixed(layer) + _inner(layer)) for layer in model.layers)
            if store == 1:
                width += 4 * max(max(_mixed(layer), _inner(layer)) for layer in model.layers)
            amount = stretch * (width + (4 + store) * model.hidden_size) + rows * 4 * model.hidden_size
            amount += 2 * 4 * min(asked.users, rows) * model.vocab_size
            return Figure(amount, "bytes", "assumed", f"buffers of a step of {rows} tokens, and logits twice")
        width = max(_widest(layer, model.hidden_size) for layer in model.layers)
        logits = min(asked.users, rows) * model.vocab_size * (4 + size)
        amount = rows * (2 * model.hidden_size + width // asked.devices) * size + logits
        return Figure(amount, "bytes", "assumed", f"{rows} rows of the widest layer, and the logits of last rows")

    @cached_property
    def runtime(self) -> Figure:
        """Bytes of the process before it loads a model."""
        device = self.question.device
        if device.runtime_bytes is not None:
            return Figure(device.runtime_bytes, "bytes", "measured", "interpreter and libraries, as probed")
        return Figure(RUNTIME_BYTES[device.kind], "bytes", "assumed", "interpreter and libraries"
                      if device.kind == "cpu" else "device context, libraries and workspace")

    @cached_property
    def tokenizer(self) -> Figure:
        """Bytes of the tokenizer in the memory of the device: none on a GPU."""
        if self.question.device.kind != "cpu":
            return Figure(0, "bytes", "exact", "in the memory of the host")
        tokens = self.question.model.vocab_size
        amount = TOKENIZER_BYTES + TOKENIZER_BYTES_PER_TOKEN * tokens
        return Figure(amount, "bytes", "assumed", f"a vocabulary of {tokens:,} tokens")

    @cached_property
    def loading(self) -> Figure:
        """Most bytes above the weights while they are loaded on a CPU: each matrix is packed from a copy of its own.

        Embedding and output layer are loaded first, and are the largest; mapped pages of files are not counted. With
        weights in fewer bits the packed weights are smaller, so the last gate and up, joined to one matrix, count too.
        """
        asked, model = self.question, self.question.model
        if asked.device.kind != "cpu":
            return Figure(0, "bytes", "exact", "staged in the memory of the host")
        width, packed = DTYPE_BYTES[asked.dtype], asked.packed
        embedding = model.embedding_params * width + packed.embedding_bytes
        head = 0 if model.tie_embeddings else packed.embedding_bytes + model.head_params * width + packed.head_bytes
        joined = 0 if asked.quantization is None else 2 * packed.joined_params * width
        extra = max(joined, max(embedding, head) - int(self.weights.value or 0)) + DECODING_BYTES
        return Figure(extra, "bytes", "assumed", "the largest matrix beside its packed copy, and pieces being decoded")

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
        return _footprint(kv, asked.policy, asked.prompt, asked.output, asked.chunk)

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
        found = self.footprint_of(asked)
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
        return Figure(self.kv_bytes(self.question), "bytes", "exact" if exact else "bound", note, low)

    @cached_property
    def total(self) -> Figure:
        """Everything on one device at the worst moment: while loading, or while running."""
        idle = sum(int(part.value or 0) for part in (self.runtime, self.tokenizer, self.weights))
        running = sum(int(part.value or 0) for part in (self.activations, self.kv))
        loading = int(self.loading.value or 0)
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
        parts = (self.weights, self.activations, self.runtime, self.tokenizer)
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

        return largest(fits, least, most) or 0


_footprint = lru_cache(maxsize=4096)(request_footprint)
"""Cached: searches compute the same request for several numbers of users."""


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


def _projected(layer: LayerSpec) -> int:
    """Return the numbers per token that the first projection of a layer makes: q, k and v."""
    mixer = layer.mixer
    if isinstance(mixer, Attention):
        return (mixer.num_heads + mixer.num_kv_heads) * mixer.head_dim + mixer.num_kv_heads * mixer.v_width
    if isinstance(mixer, Latent):
        return mixer.num_heads * (2 * (mixer.nope_dim + mixer.rope_dim) + mixer.v_dim)
    return 0


def _mixed(layer: LayerSpec) -> int:
    """Return the numbers per token in the output of attention."""
    mixer = layer.mixer
    if isinstance(mixer, Attention):
        return mixer.num_heads * mixer.v_width
    return mixer.num_heads * mixer.v_dim if isinstance(mixer, Latent) else 0


def _inner(layer: LayerSpec) -> int:
    """Return the widest numbers per token inside the MLP: those of a dense one are gated as they are computed."""
    if isinstance(layer.mlp, Experts):
        return layer.mlp.matrices * (layer.mlp.per_token * layer.mlp.intermediate + layer.mlp.shared_intermediate)
    return 0 if layer.mlp is None else layer.mlp.intermediate


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
