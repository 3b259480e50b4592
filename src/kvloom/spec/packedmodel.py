"""PackedModel: the bytes of a model's weights as the CPU kernels pack them, from its shape alone."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

from kvloom.spec.kernels import MAX_HEAD_DIM, model_reasons
from kvloom.spec.layer import Attention, Experts, FeedForward, Latent, LayerSpec, Mixer
from kvloom.spec.model import ModelSpec
from kvloom.spec.packing import FLOAT_BYTES, PACKINGS, Matrix, Packing, products_of


@dataclass(frozen=True)
class PackedModel:
    """A model with the packings of its `layers`, `vocabulary` (embedding and output head) and `tables`.

    Norms are float32.

    Bytes are those of the engine, padding included, unless there are `obstacles`: then they are an estimate.
    """

    model: ModelSpec
    layers: Packing
    vocabulary: Packing
    tables: Packing

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """Matrices of the layers; for a layer that the kernels do not run, matrices of as many weights."""
        hidden = self.model.hidden_size
        return tuple(matrix for layer in self.model.layers for matrix in _matrices(layer, hidden))

    @cached_property
    def routers(self) -> tuple[Matrix, ...]:
        """Routers of experts, which are held in float32."""
        hidden = self.model.hidden_size
        return tuple(router for layer in self.model.layers for router in _routers(layer, hidden))

    @cached_property
    def obstacles(self) -> tuple[str, ...]:
        """Every reason why the kernels do not run the model, so that the packing is not known."""
        if self.model.decoder is not None:
            return tuple(model_reasons(self.model.decoder))
        found = [reason for layer in self.model.layers for reason in _obstacles(layer)]
        return tuple(dict.fromkeys(found))

    @property
    def embedding_bytes(self) -> int:
        """Bytes of the input embedding."""
        model = self.model
        return self.vocabulary.held_bytes(Matrix(model.vocab_size, model.embedding_params // model.vocab_size))

    @property
    def head_bytes(self) -> int:
        """Bytes of a separate output head, 0 where it is the embedding."""
        return 0 if self.model.tie_embeddings else self.vocabulary.held_bytes(self._head)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        model = self.model
        small = sum(_small_params(layer, model.hidden_size) for layer in model.layers) + model.other_params
        vectors = FLOAT_BYTES * (small - model.table_params)
        rows = -(-model.table_params // model.hidden_size)
        tables = self.tables.held_bytes(Matrix(rows, model.hidden_size)) if rows else 0
        layers = sum(self.layers.held_bytes(matrix) for matrix in self.matrices)
        layers += sum(PACKINGS["fp32"].held_bytes(router) for router in self.routers)
        return self.embedding_bytes + self.head_bytes + layers + vectors + tables

    @cached_property
    def bytes_per_layer_weight(self) -> float:
        """Fewest bytes that are read for a weight of the layers: its code, and its share of the scales."""
        read = sum(self.layers.read_bytes(matrix) for matrix in self.matrices)
        read += sum(PACKINGS["fp32"].read_bytes(router) for router in self.routers)
        return read / sum(matrix.num_params for matrix in (*self.matrices, *self.routers))

    @property
    def bytes_per_head_weight(self) -> float:
        """Fewest bytes that are read for a weight of the output head."""
        return self.vocabulary.read_bytes(self._head) / self._head.num_params

    @property
    def joined_params(self) -> int:
        """Most weights that are joined to one matrix before they are packed: those of gate and up."""
        return max((matrix.num_params for matrix in self.matrices if matrix.gated), default=0)

    @property
    def _head(self) -> Matrix:
        return Matrix(self.model.vocab_size, self.model.hidden_size, bias=self.model.head_bias)


@lru_cache(maxsize=64)
def packed_model(model: ModelSpec, native: str, quantization: str | None) -> PackedModel:
    """Return `model` as it is packed where `native` stores its dtype, the same object for the same question."""
    layers, vocabulary = products_of(native, quantization)
    return PackedModel(model, PACKINGS[layers], PACKINGS[vocabulary], PACKINGS[native])


def _matrices(layer: LayerSpec, hidden: int) -> list[Matrix]:
    found = [*_mixer_matrices(layer.mixer, hidden), *_mlp_matrices(layer.mlp, hidden)]
    beside = 0 if layer.beside is None else layer.beside.matrix_params
    return [*found, *_estimated(layer.extra_params + beside, hidden)]


def _mixer_matrices(mixer: Mixer, hidden: int) -> list[Matrix]:
    """Return q, k and v as one matrix and the projection after attention."""
    parts = mixer.projections(hidden)
    if isinstance(mixer, Attention):
        inner = mixer.num_heads * mixer.v_width
        joined = (sum(parts.values()) - parts["o"]) // hidden
        return [Matrix(joined, hidden, bias=mixer.qkv_bias), Matrix(hidden, inner, bias=mixer.out_bias)]
    return _estimated(sum(parts.values()), hidden)


def _mlp_matrices(mlp: FeedForward | None, hidden: int) -> list[Matrix]:
    """Return gate and up as one matrix and down."""
    if mlp is None:
        return []
    if isinstance(mlp, Experts):
        return _expert_matrices(mlp, hidden)
    gated = mlp.matrices == 3
    first = Matrix((mlp.matrices - 1) * mlp.intermediate, hidden, gated=gated, bias=mlp.up_bias)
    return [first, Matrix(hidden, mlp.intermediate, bias=mlp.down_bias)]


def _expert_matrices(mlp: Experts, hidden: int) -> list[Matrix]:
    """Return gate and up as one matrix and down, of each expert and of the shared one."""
    if mlp.matrices != 3:
        return _estimated(mlp.matrix_params(hidden) - _router(mlp, hidden).num_params, hidden)

    def pair(width: int, bias: bool) -> list[Matrix]:
        return [Matrix(2 * width, hidden, gated=True, bias=bias), Matrix(hidden, width, bias=bias)]

    shared = pair(mlp.shared_intermediate, False) if mlp.shared_intermediate else []
    return [*pair(mlp.intermediate, mlp.bias) * mlp.num_experts, *shared]


def _router(mlp: Experts, hidden: int) -> Matrix:
    """Return the router, a row for each expert and one for the gate of a shared one."""
    return Matrix(mlp.num_experts + mlp.shared_gate, hidden, bias=mlp.bias)


def _routers(layer: LayerSpec, hidden: int) -> list[Matrix]:
    return [_router(layer.mlp, hidden)] if isinstance(layer.mlp, Experts) else []


def _estimated(num_params: int, hidden: int) -> list[Matrix]:
    """Return a matrix of that many weights that reads the residual stream, none for none."""
    return [Matrix(-(-num_params // hidden), hidden)] if num_params else []


def _small_params(layer: LayerSpec, hidden: int) -> int:
    """Return the numbers of a layer outside its matrices and the biases beside them."""
    matrices = [*_matrices(layer, hidden), *_routers(layer, hidden)]
    biases = sum(matrix.outputs for matrix in matrices if matrix.bias)
    return max(0, layer.num_params(hidden) - sum(matrix.num_params for matrix in matrices) - biases)


def _obstacles(layer: LayerSpec) -> list[str]:
    """Return every reason why the kernels do not run a layer of a model that belongs to no family."""
    mixer, mlp = layer.mixer, layer.mlp
    if not isinstance(mixer, Attention):
        return [f"it has {'latent attention' if isinstance(mixer, Latent) else 'recurrent layers'}"]
    applies = {
        f"head_dim is {mixer.head_dim}; the kernels take at most {MAX_HEAD_DIM}": mixer.head_dim > MAX_HEAD_DIM,
        "heads of K and V differ in width": mixer.v_width != mixer.head_dim,
        "attention has a gate": mixer.gated,
        "layers share keys and values": layer.source is not None or not mixer.owns_kv,
        "experts have no gate": isinstance(mlp, Experts) and mlp.matrices != 3,
        "K and V have one projection": mixer.v_of_k,
        "a recurrence reads the same input": layer.beside is not None,
        "layers have matrices beside attention and MLP": layer.extra_params > 0,
    }
    return [reason for reason, there in applies.items() if there]
