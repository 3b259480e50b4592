"""Process: the bytes of one device that are not KV: weights, buffers of a step, runtime, tokenizer and loading."""

from dataclasses import dataclass
from functools import cached_property

from kvloom.plan.figure import Figure, Label
from kvloom.plan.question import Question
from kvloom.spec.layer import Attention, Experts, Latent, LayerSpec
from kvloom.spec.model import DTYPE_BYTES, ModelSpec
from kvloom.units import MIB

RUNTIME_BYTES = {"cpu": 232 * MIB, "gpu": 800 * MIB}
"""Assumed: interpreter, torch and its libraries on the CPU; context, libraries and workspace on a GPU."""

TOKENIZER_BYTES, TOKENIZER_BYTES_PER_TOKEN = 16 * MIB, 400
"""Assumed: bytes of a tokenizer, fixed and for every token of its vocabulary."""

LONGEST_STRETCH = 768
"""Tokens: the CPU kernels process longer steps in stretches of at most this length, so buffers grow no further."""

DECODING_BYTES = 32 * MIB
"""Assumed: pieces of a stored tensor while it is decoded."""


@dataclass(frozen=True)
class Process:
    """What a process takes on one device beside the KV of a `Question`."""

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
        if layer.beside is not None:
            total += layer.beside.matrix_params / devices + layer.beside.other_params
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
