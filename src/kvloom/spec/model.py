"""ModelSpec: the shape of a model, from which every figure of a plan follows. Torch-free."""

from dataclasses import dataclass, field
from functools import cached_property

from kvloom.errors import InvalidInputError
from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.kv import KVSpec, LayerKV
from kvloom.spec.layer import Attention, Experts, Latent, LayerSpec, Recurrent

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1}
"""Bytes of one weight in each dtype that a plan can be asked for."""

INDEX = "index"
"""Role of the keys by which an indexer chooses tokens."""


@dataclass(frozen=True)
class WeightFormat:
    """How a checkpoint with low-bit weights stores them: `bits` on `covers`, the rest in the dtype.

    `covers` is "experts" (the matrices of routed experts) or "layers" (every matrix of the decoder layers).
    """

    name: str
    bits: float
    covers: str


@dataclass(frozen=True)
class ModelSpec:
    """Layers, widths and vocabulary of a decoder-only model, with where they were read.

    `other_params` are weights outside layers, embeddings and output head (final norm, learned positions, tables).
    `table_params` is the part of them that is read by row, never multiplied as a whole. `head_bias` adds a bias to
    the output head. `weight_bytes` are those of the files as loaded in `dtype`, `file_bytes` those on disk, both None
    when no file was read. `exact` is true where the weights follow from a known architecture; those of a hypothetical
    model are an estimate. `decoder` is the config that the engine runs, None for an architecture that does not run;
    `refused` lists every reason in the config why the engine refuses to load it.
    """

    name: str
    family: str
    hidden_size: int
    vocab_size: int
    layers: tuple[LayerSpec, ...]
    tie_embeddings: bool
    max_position: int | None
    dtype: str
    other_params: int = 0
    table_params: int = 0
    head_bias: bool = False
    embedding_width: int | None = None
    weight_format: WeightFormat | None = None
    source: str = ""
    exact: bool = True
    weight_bytes: int | None = None
    file_bytes: int | None = None
    notes: tuple[str, ...] = field(default=())
    decoder: DecoderConfig | None = None
    refused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.layers:
            raise InvalidInputError(f"{self.name} has no layers")
        for name in ("hidden_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} of {self.name} is {getattr(self, name)}; it must be at least 1")
        for index, layer in enumerate(self.layers):
            if layer.source is not None and not 0 <= layer.source < index:
                raise InvalidInputError(f"layer {index} reads the K/V of layer {layer.source}, which is not earlier")

    @property
    def num_layers(self) -> int:
        """Number of decoder layers of every kind."""
        return len(self.layers)

    @property
    def embedding_params(self) -> int:
        """Weights of the input embedding."""
        return self.vocab_size * (self.embedding_width or self.hidden_size)

    @property
    def head_params(self) -> int:
        """Weights of the output head as it is multiplied, whether stored once more or shared with the embedding."""
        return self.vocab_size * self.hidden_size

    @cached_property
    def num_params(self) -> int:
        """All weights, a shared output head counted once."""
        head = 0 if self.tie_embeddings else self.head_params
        bias = self.vocab_size if self.head_bias else 0
        layers = sum(layer.num_params(self.hidden_size) for layer in self.layers)
        return self.embedding_params + head + bias + layers + self.other_params

    @cached_property
    def active_params(self) -> int:
        """Weights that one token uses: all but the experts that were not chosen."""
        idle = sum(
            (layer.mlp.num_experts - layer.mlp.per_token) * layer.mlp.expert_params(self.hidden_size)
            for layer in self.layers
            if isinstance(layer.mlp, Experts)
        )
        return self.num_params - idle

    @cached_property
    def layer_matrix_params(self) -> int:
        """Weights of the decoder layers that one token is multiplied with."""
        return sum(layer.active_matrix_params(self.hidden_size) for layer in self.layers)

    @cached_property
    def expert_params(self) -> int:
        """Matrix weights of all routed experts."""
        return sum(
            layer.mlp.num_experts * layer.mlp.expert_params(self.hidden_size)
            for layer in self.layers
            if isinstance(layer.mlp, Experts)
        )

    @cached_property
    def kv_layers(self) -> tuple[int, ...]:
        """Indices of the layers that read keys and values, in order; recurrent layers have none."""
        return tuple(i for i, layer in enumerate(self.layers) if not isinstance(layer.mixer, Recurrent))

    def kv_spec(self, block_size: int, store: str) -> KVSpec:
        """Return the lanes that this model needs, with `block_size` tokens a block in `store`.

        Raises `InvalidInputError` when no layer has keys and values.
        """
        return KVSpec(self.layer_kv, block_size, store)

    @cached_property
    def layer_kv(self) -> tuple[LayerKV, ...]:
        """Lanes of each layer that reads K/V; recurrent layers are left out, so indices are those of `kv_layers`."""
        place = {layer: index for index, layer in enumerate(self.kv_layers)}
        found: list[LayerKV] = []
        for index in self.kv_layers:
            layer = self.layers[index]
            source = None if layer.source is None else place[layer.source]
            if isinstance(layer.mixer, Latent):
                width = layer.mixer.index_dim
                beside = (LayerKV(1, width, 0, layer.window, role=INDEX),) if width else ()
                found.append(LayerKV(1, layer.mixer.width, 0, layer.window, source, beside=beside))
            elif isinstance(layer.mixer, Attention):
                mixer = layer.mixer
                found.append(LayerKV(mixer.num_kv_heads, mixer.head_dim, mixer.v_width, layer.window, source))
        return tuple(found)

    @cached_property
    def state_bytes(self) -> int:
        """Bytes of recurrent state of one request, independent of its length."""
        return sum(part.state_elements * part.state_bytes for layer in self.layers for part in layer.recurrences)

    def stored_weight_bytes(self, dtype: str) -> int:
        """Return the bytes of all weights: those of the files where known, else parameters times their width."""
        if self.weight_bytes is not None and dtype == self.dtype:
            return self.weight_bytes
        width = DTYPE_BYTES[dtype]
        if self.weight_format is None or dtype != self.dtype:
            return self.num_params * width
        covered = self.expert_params
        if self.weight_format.covers == "layers":
            covered = sum(
                sum(layer.mixer.projections(self.hidden_size).values())
                + (0 if layer.beside is None else layer.beside.matrix_params)
                + (0 if layer.mlp is None else layer.mlp.matrix_params(self.hidden_size))
                for layer in self.layers
            )
        return round(covered * self.weight_format.bits / 8) + (self.num_params - covered) * width

    @cached_property
    def attention_kind(self) -> str:
        """Kind of attention of the layers: MHA, GQA-8, MQA, MLA, recurrent, or several joined by ` + `."""
        kinds: list[str] = []
        for layer in self.layers:
            mixer = layer.mixer
            if isinstance(mixer, Latent):
                kind = f"MLA ({mixer.kv_rank}+{mixer.rope_dim})"
            elif isinstance(mixer, Recurrent):
                if not mixer.state_elements:
                    continue
                kind = "recurrent state"
            elif mixer.num_kv_heads == 1 and mixer.num_heads > 1:
                kind = "MQA"
            elif mixer.num_kv_heads == mixer.num_heads:
                kind = "MHA"
            else:
                kind = f"GQA-{mixer.num_kv_heads}"
            if layer.beside is not None:
                kind += " beside recurrent state"
            if kind not in kinds:
                kinds.append(kind)
        return " + ".join(kinds)
