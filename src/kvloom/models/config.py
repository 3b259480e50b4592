"""DecoderConfig: everything that distinguishes one model family from another, as data. Torch-free."""

from dataclasses import dataclass, field

from kvloom.spec.kv import KVSpec, LayerKV


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one kind of layer over the whole head: frequencies `base ** (-2 i / head_dim)`, then `kind`.

    `scaling` holds the parameters of the kind: "default" has none; "linear" divides all frequencies by `factor`;
    "llama3" has `factor`, `low_freq_factor`, `high_freq_factor`, `original_max_position_embeddings`.
    """

    base: float
    kind: str = "default"
    scaling: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer: how far it looks back, and how it encodes positions (None: not at all)."""

    window: int | None
    rope: RopeConfig | None


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and mathematics of a decoder-only transformer.

    Norms are RMSNorm; families that store an offset weight (Gemma: `1 + w`) resolve it when they load. `sandwich_norm`
    puts a norm after attention and MLP as well as before (Gemma 2, 3). `qk_norm` normalises each head of q and k before
    the rotation. `embedding_scale` multiplies embeddings, after it was rounded to float32 and then to their dtype;
    `query_scale` multiplies q.k. `activation` of the gated MLP is "silu" or "gelu_tanh". `attention_bias` puts a bias
    on q, k and v; `output_bias` on the projection after attention.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    max_position: int
    norm_eps: float
    activation: str
    query_scale: float
    tie_embeddings: bool
    qk_norm: bool = False
    sandwich_norm: bool = False
    embedding_scale: float = 1.0
    attention_bias: bool = False
    output_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    def kv_spec(self, block_size: int, store: str) -> KVSpec:
        """Return the lanes that this model needs, with `block_size` tokens a block in `store`."""
        return KVSpec(
            tuple(LayerKV(self.num_kv_heads, self.head_dim, self.head_dim, layer.window) for layer in self.layers),
            block_size,
            store,
        )
