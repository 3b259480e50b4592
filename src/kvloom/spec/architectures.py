"""Architectures that are planned and do not run: a reader of config.json fields for each `model_type`.

For architectures that run, the shape follows from the family's config (`kvloom.spec.families`).
"""

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
    """Return the attention of a config with the usual fields; `facts` override or add fields."""
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


def _routed(config: Config, layer: int) -> Experts | None:
    """Return the experts of a layer of a Qwen mixture, or None where the layer is dense."""
    step = config.number("decoder_sparse_step", default=1)
    if layer in (config.fields.get("mlp_only_layers") or []) or (layer + 1) % step:
        return None
    shared = config.optional("shared_expert_intermediate_size")
    return Experts(config.number("num_experts", "num_local_experts"), config.number("num_experts_per_tok"),
                   config.number("moe_intermediate_size"), shared or 0, shared_gate=shared is not None)


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
    ("gemma3n_text", _gemma3n), ("gemma3n", _gemma3n), ("deepseek_v2", _deepseek),
    ("deepseek_v3", _deepseek), ("qwen3_next", _qwen3_next), ("mamba", _mamba),
):  # fmt: skip
    ARCHITECTURES.register(_name, _reader)
