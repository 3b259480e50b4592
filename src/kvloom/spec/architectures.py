"""Which architectures are understood: a reader of config.json fields for each `model_type`."""

from collections.abc import Callable, Mapping
from typing import Any

from kvloom.errors import InvalidInputError
from kvloom.registry import Registry
from kvloom.spec.layer import Attention, Experts, FeedForward, Latent, LayerSpec, Mlp, Recurrent
from kvloom.spec.model import ModelSpec


class Config:
    """Typed access to the fields of a config.json, with errors that name the field."""

    def __init__(self, fields: Mapping[str, Any], name: str) -> None:
        self.fields = fields
        self.name = name

    def number(self, *keys: str, default: int | None = None) -> int:
        """Return the first of `keys` that is present, an integer of at least 1."""
        for key in keys:
            value = self.fields.get(key)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise InvalidInputError(f"{key} of {self.name} is {value!r}; it must be an integer of at least 1")
                return value
        if default is None:
            raise InvalidInputError(f"the config of {self.name} has no {' or '.join(keys)}")
        return default

    def flag(self, key: str, default: bool) -> bool:
        """Return the boolean `key`."""
        value = self.fields.get(key)
        return default if value is None else bool(value)

    def optional(self, key: str) -> int | None:
        """Return the integer `key`, or None when it is absent or null."""
        return None if self.fields.get(key) is None else self.number(key)

    def layer_types(self, num_layers: int, known: tuple[str, ...]) -> list[str] | None:
        """Return `layer_types`, one known name per layer, or None when the config has none."""
        types = self.fields.get("layer_types")
        if types is None:
            return None
        if not isinstance(types, list) or len(types) != num_layers:
            raise InvalidInputError(f"layer_types of {self.name} must name one type for each of {num_layers} layers")
        for kind in types:
            if kind not in known:
                names = ", ".join(known)
                raise InvalidInputError(f"layer type {kind!r} of {self.name} is not understood; known: {names}")
        return list(types)


Reader = Callable[[Config], ModelSpec]
ARCHITECTURES: Registry[Reader] = Registry("architecture")

_WINDOWED = ("sliding_attention", "full_attention")


def build(config: Config, layers: list[LayerSpec], hidden: int, **facts: Any) -> ModelSpec:
    """Return the ModelSpec of `layers` with the facts that all readers share."""
    facts.setdefault("tie_embeddings", config.flag("tie_word_embeddings", False))
    facts.setdefault("other_params", hidden)
    return ModelSpec(
        name=config.name,
        family=str(config.fields["model_type"]),
        hidden_size=hidden,
        vocab_size=config.number("vocab_size"),
        layers=tuple(layers),
        max_position=config.number("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", default=2048),
        dtype="bfloat16",
        **facts,
    )


def attention(config: Config, **facts: Any) -> Attention:
    """Return the attention that most configs describe; `facts` override or add fields."""
    heads = config.number("num_attention_heads")
    hidden = config.number("hidden_size")
    if config.fields.get("head_dim") is None and hidden % heads:
        raise InvalidInputError(
            f"hidden_size {hidden} of {config.name} is not divisible by {heads} heads, and there is no head_dim"
        )
    facts.setdefault("num_heads", heads)
    facts.setdefault("num_kv_heads", config.number("num_key_value_heads", default=heads))
    facts.setdefault("head_dim", config.number("head_dim", default=hidden // heads))
    return Attention(**facts)


def windows(config: Config, num_layers: int, pattern: Callable[[int], bool] | None = None) -> list[int | None]:
    """Return the window of each layer from `layer_types`, else from `pattern(layer)`, else the same everywhere."""
    window = config.optional("sliding_window")
    types = config.layer_types(num_layers, _WINDOWED)
    if types is None and pattern is None:
        return [window] * num_layers
    local = [kind == "sliding_attention" for kind in types] if types else [pattern(i) for i in range(num_layers)]  # type: ignore[misc]
    if any(local) and window is None:
        raise InvalidInputError(f"{config.name} has sliding layers but no sliding_window")
    return [window if is_local else None for is_local in local]


def _llama_like(qkv_bias: bool = False, qk_norm: bool = False, windowed: bool = False) -> Reader:
    def read(config: Config) -> ModelSpec:
        hidden, count = config.number("hidden_size"), config.number("num_hidden_layers")
        bias = config.flag("attention_bias", False)
        mixer = attention(config, qkv_bias=qkv_bias or bias, out_bias=bias)
        if qk_norm:
            mixer = attention(config, qkv_bias=bias, out_bias=bias, extra_params=2 * mixer.head_dim)
        found = windows(config, count) if windowed else [None] * count
        mlp_bias = config.flag("mlp_bias", False)
        mlp = Mlp(config.number("intermediate_size"), up_bias=mlp_bias, down_bias=mlp_bias)
        layers = [LayerSpec(mixer, _routed(config, i) or mlp, w, norm_params=2 * hidden) for i, w in enumerate(found)]
        return build(config, layers, hidden)

    return read


def _routed(config: Config, layer: int) -> Experts | None:
    """Return the experts of a Mixtral- or Qwen-MoE-like layer, or None where the layer is dense."""
    if config.fields["model_type"] == "mixtral":
        return Experts(config.number("num_local_experts"), config.number("num_experts_per_tok"),
                       config.number("intermediate_size"))
    if config.fields["model_type"] not in ("qwen3_moe", "qwen3_next"):
        return None
    step = config.number("decoder_sparse_step", default=1)
    if layer in (config.fields.get("mlp_only_layers") or []) or (layer + 1) % step:
        return None
    shared = config.optional("shared_expert_intermediate_size")
    return Experts(config.number("num_experts", "num_local_experts"), config.number("num_experts_per_tok"),
                   config.number("moe_intermediate_size"), shared or 0, shared_gate=shared is not None)


def _qwen2(config: Config) -> ModelSpec:
    count = config.number("num_hidden_layers")
    fields = dict(config.fields)
    if not config.flag("use_sliding_window", False):
        fields["sliding_window"], fields["layer_types"] = None, None
    elif fields.get("layer_types") is None:
        first = config.number("max_window_layers", default=count)
        fields["layer_types"] = [_WINDOWED[0] if i >= first else _WINDOWED[1] for i in range(count)]
    qwen2 = config.fields["model_type"] == "qwen2"
    return _llama_like(qkv_bias=qwen2, qk_norm=not qwen2, windowed=True)(Config(fields, config.name))


def _gemma(config: Config) -> ModelSpec:
    family = str(config.fields["model_type"]).removesuffix("_text")
    hidden, count = config.number("hidden_size"), config.number("num_hidden_layers")
    head_dim = config.number("head_dim", default=256)
    every = {"gemma2": 2, "gemma3": config.number("sliding_window_pattern", default=6)}.get(family)
    found = windows(config, count, lambda i: bool((i + 1) % every)) if every else [None] * count
    mixer = attention(config, head_dim=head_dim, extra_params=2 * head_dim if family == "gemma3" else 0)
    norms = (2 if family == "gemma" else 4) * hidden
    mlp = Mlp(config.number("intermediate_size"))
    layers = [LayerSpec(mixer, mlp, w, norm_params=norms) for w in found]
    return build(config, layers, hidden, tie_embeddings=config.flag("tie_word_embeddings", True))


def _gemma3n(config: Config) -> ModelSpec:
    hidden, count = config.number("hidden_size"), config.number("num_hidden_layers")
    head_dim = config.number("head_dim", default=256)
    found = windows(config, count, lambda i: bool((i + 1) % 5))
    shared = config.fields.get("num_kv_shared_layers") or 0
    first = count - shared
    streams, rank = config.number("altup_num_inputs", default=4), config.number("laurel_rank", default=64)
    per_layer = config.number("hidden_size_per_layer_input", default=256)
    width = config.fields.get("intermediate_size")
    layers: list[LayerSpec] = []
    for i, window in enumerate(found):
        source = None
        if i >= first:
            alike = [j for j in range(first) if (found[j] is None) == (window is None)]
            if not alike:
                raise InvalidInputError(f"layer {i} of {config.name} shares K/V, but no earlier layer is of its kind")
            source = alike[-1]
        mlp = Mlp(width[i] if isinstance(width, list) else config.number("intermediate_size"))
        mixer = attention(config, head_dim=head_dim, extra_params=(2 if source is None else 1) * head_dim,
                          owns_kv=source is None)
        extra = streams * streams + streams**3 + hidden * streams + 2 * hidden * rank + 2 * hidden * per_layer
        layers.append(LayerSpec(mixer, mlp, window, source, norm_params=8 * hidden, extra_params=extra))
    table = config.number("vocab_size_per_layer_input", default=262144) * count * per_layer
    mixing = hidden * count * per_layer + per_layer + 2 * (streams - 1) * hidden * hidden
    return build(config, layers, hidden, tie_embeddings=config.flag("tie_word_embeddings", True),
                 other_params=hidden + table + mixing, table_params=table)


def _deepseek(config: Config) -> ModelSpec:
    hidden, count = config.number("hidden_size"), config.number("num_hidden_layers")
    q_rank = config.fields.get("q_lora_rank")
    mixer = Latent(config.number("num_attention_heads"), q_rank if q_rank is None else config.number("q_lora_rank"),
                   config.number("kv_lora_rank"), config.number("qk_nope_head_dim"), config.number("qk_rope_head_dim"),
                   config.number("v_head_dim"), config.flag("attention_bias", False))
    dense = config.fields.get("first_k_dense_replace") or 0
    experts, narrow = config.number("n_routed_experts"), config.number("moe_intermediate_size")
    shared = narrow * (config.fields.get("n_shared_experts") or 0)
    bias = experts if config.fields["model_type"] == "deepseek_v3" else 0
    routed = Experts(experts, config.number("num_experts_per_tok"), narrow, shared, router_params=bias)
    layers: list[LayerSpec] = []
    for i in range(count):
        mlp: FeedForward = Mlp(config.number("intermediate_size")) if i < dense else routed
        layers.append(LayerSpec(mixer, mlp, norm_params=2 * hidden))
    return build(config, layers, hidden)


def _gpt_oss(config: Config) -> ModelSpec:
    hidden, count = config.number("hidden_size"), config.number("num_hidden_layers")
    found = windows(config, count, lambda i: i % 2 == 0)
    mixer = attention(config, qkv_bias=True, out_bias=True, extra_params=config.number("num_attention_heads"))
    experts = config.number("num_local_experts")
    mlp = Experts(experts, config.number("num_experts_per_tok", "experts_per_token"),
                  config.number("intermediate_size"), bias=True, router_params=experts)
    return build(config, [LayerSpec(mixer, mlp, w, norm_params=2 * hidden) for w in found], hidden)


def _phi(config: Config) -> ModelSpec:
    hidden, count = config.number("hidden_size"), config.number("num_hidden_layers")
    mixer = attention(config, qkv_bias=True, out_bias=True)
    mlp = Mlp(config.number("intermediate_size"), matrices=2, up_bias=True, down_bias=True)
    layers = [LayerSpec(mixer, mlp, norm_params=2 * hidden) for _ in range(count)]
    return build(config, layers, hidden, other_params=2 * hidden, head_bias=True)


def _gpt2(config: Config) -> ModelSpec:
    hidden, count, heads = config.number("n_embd"), config.number("n_layer"), config.number("n_head")
    if hidden % heads:
        raise InvalidInputError(f"n_embd {hidden} of {config.name} is not divisible by {heads} heads")
    mqa = config.fields["model_type"] == "gpt_bigcode" and config.flag("multi_query", True)
    mixer = Attention(heads, 1 if mqa else heads, hidden // heads, qkv_bias=True, out_bias=True)
    mlp = Mlp(config.number("n_inner", default=4 * hidden), matrices=2, up_bias=True, down_bias=True)
    table = config.number("n_positions", default=1024) * hidden
    layers = [LayerSpec(mixer, mlp, norm_params=4 * hidden) for _ in range(count)]
    return build(config, layers, hidden, tie_embeddings=config.flag("tie_word_embeddings", True),
                 other_params=2 * hidden + table, table_params=table)


def _smollm3(config: Config) -> ModelSpec:
    """SmolLM3: every fourth layer has no positions; those are the ones that may have a window."""
    count = config.number("num_hidden_layers")
    interval = config.number("no_rope_layer_interval", default=4)
    rotates = config.fields.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(count)]
    fields = dict(config.fields)
    if not config.flag("use_sliding_window", False) or fields.get("sliding_window") is None:
        fields["sliding_window"], fields["layer_types"] = None, None
    elif fields.get("layer_types") is None:
        fields["layer_types"] = [_WINDOWED[1] if rotated else _WINDOWED[0] for rotated in rotates]
    return _llama_like(windowed=True)(Config(fields, config.name))


def _glm(config: Config) -> ModelSpec:
    """GLM-4: Llama with biases of q, k and v alone."""
    fields = {**config.fields, "attention_bias": False}
    return _llama_like(qkv_bias=config.flag("attention_bias", True))(Config(fields, config.name))


def _gpt_neox(config: Config) -> ModelSpec:
    hidden, count = config.number("hidden_size"), config.number("num_hidden_layers")
    bias = config.flag("attention_bias", True)
    mixer = attention(config, num_kv_heads=config.number("num_attention_heads"), qkv_bias=bias, out_bias=bias)
    mlp = Mlp(config.number("intermediate_size"), matrices=2, up_bias=True, down_bias=True)
    layers = [LayerSpec(mixer, mlp, norm_params=4 * hidden) for _ in range(count)]
    return build(config, layers, hidden, other_params=2 * hidden)


def _falcon(config: Config) -> ModelSpec:
    hidden = config.number("hidden_size", "n_embed")
    count = config.number("num_hidden_layers", "n_layer")
    heads = config.number("num_attention_heads", "n_head")
    grouped = config.flag("new_decoder_architecture", False)
    kv_heads = config.number("num_kv_heads", "n_head_kv", default=heads) if grouped else (
        1 if config.flag("multi_query", True) else heads)
    bias = config.flag("bias", False)
    mixer = Attention(heads, kv_heads, hidden // heads, qkv_bias=bias, out_bias=bias)
    mlp = Mlp(config.number("ffn_hidden_size", default=4 * hidden), matrices=2, up_bias=bias, down_bias=bias)
    two = not config.flag("parallel_attn", True)
    if grouped:
        two = config.number("num_ln_in_parallel_attn", default=2) == 2
    layers = [LayerSpec(mixer, mlp, norm_params=(4 if two else 2) * hidden) for _ in range(count)]
    return build(config, layers, hidden, tie_embeddings=config.flag("tie_word_embeddings", True),
                 other_params=2 * hidden)


def _bloom(config: Config) -> ModelSpec:
    hidden = config.number("hidden_size", "n_embed")
    count, heads = config.number("n_layer", "num_hidden_layers"), config.number("n_head", "num_attention_heads")
    if hidden % heads:
        raise InvalidInputError(f"hidden_size {hidden} of {config.name} is not divisible by {heads} heads")
    mixer = Attention(heads, heads, hidden // heads, qkv_bias=True, out_bias=True)
    mlp = Mlp(4 * hidden, matrices=2, up_bias=True, down_bias=True)
    layers = [LayerSpec(mixer, mlp, norm_params=4 * hidden) for _ in range(count)]
    return build(config, layers, hidden, tie_embeddings=config.flag("tie_word_embeddings", True),
                 other_params=4 * hidden)


def _mpt(config: Config) -> ModelSpec:
    hidden, count, heads = config.number("d_model"), config.number("n_layers"), config.number("n_heads")
    if hidden % heads:
        raise InvalidInputError(f"d_model {hidden} of {config.name} is not divisible by {heads} heads")
    if not config.flag("no_bias", True):
        raise InvalidInputError(f"{config.name} is an MPT with biases, which is not understood; no_bias must be true")
    inner = config.fields.get("attn_config")
    kv_heads = inner.get("kv_n_heads") if isinstance(inner, Mapping) else None
    mixer = Attention(heads, heads if kv_heads is None else int(kv_heads), hidden // heads)
    mlp = Mlp(config.number("expansion_ratio", default=4) * hidden, matrices=2)
    layers = [LayerSpec(mixer, mlp, norm_params=2 * hidden) for _ in range(count)]
    return build(config, layers, hidden, tie_embeddings=config.flag("tie_word_embeddings", True))


def _qwen3_next(config: Config) -> ModelSpec:
    hidden, count = config.number("hidden_size"), config.number("num_hidden_layers")
    types = config.layer_types(count, ("linear_attention", "full_attention")) or [
        "full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(count)
    ]
    full = attention(config, gated=True, extra_params=2 * config.number("head_dim", default=256))
    kernel = config.number("linear_conv_kernel_dim", default=4)
    k_dim, v_dim = config.number("linear_key_head_dim"), config.number("linear_value_head_dim")
    v_heads = config.number("linear_num_value_heads")
    keys, values = k_dim * config.number("linear_num_key_heads"), v_dim * v_heads
    channels = 2 * keys + values
    linear = Recurrent(
        state_elements=v_heads * k_dim * v_dim + channels * kernel,
        matrix_params=hidden * (2 * keys + 2 * values + 2 * v_heads) + values * hidden,
        other_params=channels * kernel + 2 * v_heads + v_dim,
    )
    dense = Mlp(config.number("intermediate_size"))
    layers = [
        LayerSpec(full if kind == "full_attention" else linear, _routed(config, i) or dense, norm_params=2 * hidden)
        for i, kind in enumerate(types)
    ]
    return build(config, layers, hidden)


def _mamba(config: Config) -> ModelSpec:
    hidden, count = config.number("hidden_size"), config.number("num_hidden_layers")
    inner = config.number("intermediate_size", default=config.number("expand", default=2) * hidden)
    state, kernel = config.number("state_size", default=16), config.number("conv_kernel", default=4)
    rank = config.fields.get("time_step_rank")
    rank = -(-hidden // 16) if rank in (None, "auto") else config.number("time_step_rank")
    bias = config.flag("use_bias", False)
    mixer = Recurrent(
        state_elements=inner * (state + kernel),
        matrix_params=3 * hidden * inner + inner * (rank + 2 * state) + rank * inner,
        other_params=inner * (kernel + 1 + 1 + state + 1) + (2 * inner + hidden if bias else 0),
    )
    layers = [LayerSpec(mixer, None, norm_params=hidden) for _ in range(count)]
    return build(config, layers, hidden, tie_embeddings=config.flag("tie_word_embeddings", True))


for _name, _reader in (
    ("llama", _llama_like()), ("smollm3", _smollm3), ("glm", _glm), ("mistral", _llama_like(windowed=True)),
    ("mixtral", _llama_like(windowed=True)), ("phi3", _llama_like(windowed=True)), ("phi", _phi),
    ("qwen2", _qwen2), ("qwen3", _qwen2), ("qwen3_moe", _qwen2), ("qwen3_next", _qwen3_next),
    ("gemma", _gemma), ("gemma2", _gemma), ("gemma3_text", _gemma), ("gemma3", _gemma),
    ("gemma3n_text", _gemma3n), ("gemma3n", _gemma3n), ("deepseek_v2", _deepseek), ("deepseek_v3", _deepseek),
    ("gpt_oss", _gpt_oss), ("gpt2", _gpt2), ("gpt_bigcode", _gpt2), ("gpt_neox", _gpt_neox), ("falcon", _falcon),
    ("bloom", _bloom), ("mpt", _mpt), ("mamba", _mamba),
):  # fmt: skip
    ARCHITECTURES.register(_name, _reader)
