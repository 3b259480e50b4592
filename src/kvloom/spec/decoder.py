"""DecoderConfig: the properties that distinguish model families, as data. Torch-free."""

from dataclasses import dataclass, field

from kvloom.spec.kv import KVSpec, LayerKV


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one kind of layer: frequencies `base ** (-2 i / R)` of R rotated elements, then `kind`.

    `rotary` is R, None for the whole head. `scaling` holds the numbers of the kind: "default" has none; "linear"
    divides all frequencies by `factor`; "llama3" has `factor`, `low_freq_factor`, `high_freq_factor`, `original`;
    "yarn" `factor`, `original`, `beta_fast`, `beta_slow`, `truncate` (0 or 1) and `amplitude`; "dynamic" `factor` and
    `original`; "longrope" `original` and `amplitude`, and in `divisors` one list of R / 2 for texts within `original`
    and one for longer ones. `original` is the context length of training, `amplitude` multiplies cosines and sines.
    """

    base: float
    kind: str = "default"
    scaling: dict[str, float] = field(default_factory=dict, hash=False)
    rotary: int | None = None
    divisors: tuple[tuple[float, ...], ...] = ()

    @property
    def amplitude(self) -> float:
        """Factor of cosines and sines."""
        return self.scaling.get("amplitude", 1.0)

    @property
    def depends_on_length(self) -> bool:
        """True when the frequencies of a text depend on its largest possible length."""
        return self.kind in ("dynamic", "longrope")

    def length_class(self, num_tokens: int) -> int:
        """Return the class of texts of `num_tokens`, a length: texts of one class have the same frequencies.

        0 where the frequencies depend on no length. All cached keys of a sequence are rotated by the frequencies of one
        class.
        """
        if not self.depends_on_length:
            return 0
        original = int(self.scaling["original"])
        if self.kind == "longrope":
            return original if num_tokens <= original else original + 1
        return max(num_tokens, original)


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer: its sliding window, its position encoding (None: none), and its kind of MLP.

    A `chunked` layer attends back to the start of its chunk of `window` positions, which a lane of that window holds.
    """

    window: int | None
    rope: RopeConfig | None
    routed: bool = False
    chunked: bool = False


@dataclass(frozen=True)
class ExpertsConfig:
    """Mixture of experts in the layers that are `routed`: `count` gated MLPs, of which each token passes `per_token`.

    Scores are the softmax of the router's logits over all experts, or their `sigmoid`. The experts with the highest
    scores are chosen, or with the highest sum of score and a learned `selection_bias`; where experts lie in `groups` of
    neighbours, only those of the `kept_groups` whose `group_best` best choices sum highest. A chosen expert's result is
    multiplied by its score, divided by the sum of the chosen ones' scores if `normalise`, times `scale`
    (DeepSeek-V3, arXiv:2412.19437, section 2.1.2). `clamp`, if given, is (alpha, limit) of gate' = min(gate, limit),
    up' = clamp(up, -limit, limit) and (up' + 1) * gate' * sigmoid(alpha * gate') in place of activation(gate) * up
    (gpt-oss). `bias` puts a bias on router and experts. Every token also passes a gated MLP of `shared_size`, if that
    is not 0; with `shared_gate` its result is multiplied by the sigmoid of a learned logit. With `scale_input` a score
    multiplies what its expert reads, not its result (Llama 4). With a `jitter` an expert's multiplier is the softmax
    over the logits near it, without those that were chosen before (Phi-3.5-MoE; SparseMixer-v2, arXiv:2409.12136).
    """

    count: int
    per_token: int
    intermediate_size: int
    normalise: bool = True
    bias: bool = False
    clamp: tuple[float, float] | None = None
    sigmoid: bool = False
    selection_bias: bool = False
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    group_best: int = 1
    shared_size: int = 0
    shared_gate: bool = False
    scale_input: bool = False
    jitter: float = 0.0


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and mathematics of a decoder-only transformer.

    `norm` is "rms" (RMSNorm; families that store an offset weight, Gemma's `1 + w`, resolve it when they load) or
    "layer" (LayerNorm). `norm_bias` says that LayerNorms have a bias, `embed_norm` that there is one after the
    embedding. `sandwich_norm` puts a norm after attention and MLP as well as before (Gemma 2, 3), or only after without
    `pre_norm` (OLMo 2). `qk_norm` normalises q and k; `qk_norm_kind` is "head" (each head, before the rotation),
    "layer" (all heads at once, before it), "rotated" (each head, after it) or "unit" (each head after it, without
    weights, in layers that rotate). `temperature` (period, scale) lets queries grow with their position in layers
    that do not rotate (`models.parts.Append`). With `parallel_residual` attention and MLP read the same input and both
    are added; `shared_norm` lets both read one norm. `embedding_scale` multiplies embeddings, after it was rounded to
    float32 and then to their dtype; `query_scale` multiplies q.k. `activation` is "silu", "gelu_tanh", "gelu",
    "relu2" (max(x, 0) squared) or "xielu" (arXiv:2411.13010); the MLP is activation(gate) * up when `gated`, else
    activation(up). `attention_bias` puts a bias on q, k and v, `output_bias` on the projection after attention,
    `mlp_bias` on those of the MLP, `head_bias` on the output matrix. `qkv_clip` bounds q, k and v. `score_softcap` c
    makes scores c tanh(score / c), `logit_softcap` does the same to logits, `logit_scale` multiplies them. `slopes`,
    one for each query head, subtract slope * distance from scores (ALiBi). `sinks` are learned scores, one for each
    query head, that join the denominator. `learned_positions` adds a row of a table to each embedding.
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
    norm: str = "rms"
    norm_bias: bool = False
    embed_norm: bool = False
    parallel_residual: bool = False
    shared_norm: bool = False
    gated: bool = True
    mlp_bias: bool = False
    qkv_clip: float | None = None
    score_softcap: float | None = None
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    slopes: tuple[float, ...] = ()
    sinks: bool = False
    learned_positions: bool = False
    experts: ExpertsConfig | None = None
    pre_norm: bool = True
    qk_norm_kind: str = "head"
    head_bias: bool = False
    temperature: tuple[float, float] | None = None

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def rotary(self) -> int:
        """Rotated elements of a head, of all layers that rotate; the head size where none does."""
        return next((r.rotary for r in (layer.rope for layer in self.layers) if r and r.rotary), self.head_dim)

    @property
    def score_terms(self) -> tuple[str, ...]:
        """Names of the terms of attention scores beside q.k: a softcap, ALiBi, sinks."""
        terms = {"a softcap": self.score_softcap is not None, "ALiBi": bool(self.slopes), "sinks": self.sinks}
        return tuple(term for term, there in terms.items() if there)

    def length_class(self, num_tokens: int) -> int:
        """Return the class of texts of `num_tokens` (`RopeConfig.length_class`)."""
        return max((layer.rope.length_class(num_tokens) for layer in self.layers if layer.rope), default=0)

    @property
    def has_few_length_classes(self) -> bool:
        """True where texts have one of two classes, by their length, and not one class for every length."""
        kinds = {layer.rope.kind for layer in self.layers if layer.rope and layer.rope.depends_on_length}
        return kinds == {"longrope"}

    def kv_spec(self, block_size: int, store: str) -> KVSpec:
        """Return the lanes that this model needs, with `block_size` tokens a block in `store`."""
        return KVSpec(
            tuple(LayerKV(self.num_kv_heads, self.head_dim, self.head_dim, layer.window) for layer in self.layers),
            block_size,
            store,
        )
