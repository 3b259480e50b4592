"""Entries of a config.json, typed, and the parts of a shape that most architectures describe in the same words."""

from collections.abc import Callable, Mapping
from typing import Any

from kvloom.errors import InvalidInputError
from kvloom.spec.layer import Attention, Experts, FeedForward, LayerSpec, Mlp
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

    def count(self, key: str) -> int:
        """Return the integer `key` of at least 0; absent or null is 0."""
        value = self.fields.get(key)
        if value is None:
            return 0
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InvalidInputError(f"{key} of {self.name} is {value!r}; it must be an integer of at least 0")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return the boolean `key`."""
        value = self.fields.get(key)
        return default if value is None else bool(value)

    def optional(self, key: str) -> int | None:
        """Return the integer `key`, or None when it is absent or null."""
        return None if self.fields.get(key) is None else self.number(key)

    def layer_types(self, num_layers: int, known: tuple[str, ...], *keys: str) -> list[str] | None:
        """Return the first of `keys` (`layer_types`) that is there, a known name for each layer; None without any."""
        key = next((key for key in keys or ("layer_types",) if self.fields.get(key) is not None), None)
        if key is None:
            return None
        types = self.fields[key]
        if not isinstance(types, list) or len(types) != num_layers:
            raise InvalidInputError(f"{key} of {self.name} must name one type for each of {num_layers} layers")
        for kind in types:
            if kind not in known:
                names = ", ".join(known)
                raise InvalidInputError(f"layer type {kind!r} of {self.name} is not understood; known: {names}")
        return list(types)


Reader = Callable[[Config], ModelSpec]
"""Reads the entries of one architecture."""

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


def head_size(config: Config) -> int:
    """Return `head_dim`, or the hidden size divided by the heads."""
    heads = config.number("num_attention_heads")
    hidden = config.number("hidden_size")
    if config.fields.get("head_dim") is None and hidden % heads:
        raise InvalidInputError(
            f"hidden_size {hidden} of {config.name} is not divisible by {heads} heads, and there is no head_dim"
        )
    return config.number("head_dim", default=hidden // heads)


def attention(config: Config, **facts: Any) -> Attention:
    """Return the attention of a config with the usual fields; `facts` override or add fields."""
    heads, size = config.number("num_attention_heads"), head_size(config)
    facts.setdefault("num_heads", heads)
    facts.setdefault("num_kv_heads", config.number("num_key_value_heads", default=heads))
    facts.setdefault("head_dim", size)
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


def feed_forwards(config: Config, dense: Mlp, routed: Experts) -> list[FeedForward]:
    """Return the MLP of each layer: by `mlp_layer_types`, else `routed` from layer `first_k_dense_replace` on."""
    num_layers = config.number("num_hidden_layers")
    types = config.layer_types(num_layers, ("dense", "sparse"), "mlp_layer_types")
    if types is None:
        first = config.count("first_k_dense_replace")
        return [dense if i < first else routed for i in range(num_layers)]
    return [routed if kind == "sparse" else dense for kind in types]


def routed_experts(config: Config, corrected: bool = True) -> Experts:
    """Return the experts that the entries of DeepSeek-V2 describe, `corrected` with a weight for each choice."""
    experts, narrow = config.number("n_routed_experts"), config.number("moe_intermediate_size")
    return Experts(experts, config.number("num_experts_per_tok"), narrow, narrow * config.count("n_shared_experts"),
                   router_params=experts if corrected else 0)  # fmt: skip
