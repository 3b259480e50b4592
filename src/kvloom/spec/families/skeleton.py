"""The skeleton of most families: RMSNorm, gated MLP, rotary positions. Each family names its differences."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from kvloom.spec.decoder import DecoderConfig, LayerConfig, RopeConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.rope import ROPE_ALIASES, longest_position, rope_config, rope_params

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
               "gelu": "gelu", "relu2": "relu2"}  # fmt: skip
"""Names of activations in a config, and what they are here."""


def head_dim(reader: ConfigReader) -> int:
    """Return the size of a head: as given, else hidden size over heads."""
    hidden_size, num_heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    if reader.get("head_dim") is None and hidden_size % num_heads:
        reader.wrong("hidden_size", f"a multiple of {num_heads} heads, as there is no head_dim", hidden_size)
    return reader.integer("head_dim", max(1, hidden_size // num_heads))


def layer_windows(reader: ConfigReader, is_windowed: Callable[[int], bool]) -> list[int | None]:
    """Return the window of each layer: by `layer_types` if the config has them, else where `is_windowed(index)`."""
    count = reader.integer("num_hidden_layers")
    kinds = ("full_attention", "sliding_attention")
    types: Any = reader.get("layer_types")
    if types is None:
        types = [kinds[is_windowed(i)] for i in range(count)]
    if not isinstance(types, list) or len(types) != count:
        reader.wrong("layer_types", f"a list of {count} names", types)
        return [None] * count
    for unknown in sorted({str(kind) for kind in types} - set(kinds)):
        reader.refuse(f"layers of type {unknown!r}")
    window = reader.integer("sliding_window") if kinds[1] in types else None
    return [window if kind == kinds[1] else None for kind in types]


def all_windowed(reader: ConfigReader) -> list[int | None]:
    """Return one window for all layers, if the config has a `sliding_window`."""
    windowed = reader.get("sliding_window") is not None
    return [reader.integer("sliding_window") if windowed else None] * reader.integer("num_hidden_layers")


def layers_of(windows: Sequence[int | None], rope: RopeConfig | None) -> tuple[LayerConfig, ...]:
    """Return layers with these windows, all with one rotary embedding."""
    return tuple(LayerConfig(window, rope) for window in windows)


def skeleton(
    reader: ConfigReader,
    family: str,
    windows: Sequence[int | None],
    *,
    partial: bool = False,
    rope_aliases: Mapping[str, str] = ROPE_ALIASES,
    **changes: Any,
) -> DecoderConfig:
    """Return the config of a model with the skeleton; `changes` are entries of `DecoderConfig` that differ.

    `partial` allows rotation of a part of each head, `rope_aliases` maps the family's names of kinds of rope.
    """
    width, num_heads = head_dim(reader), reader.integer("num_attention_heads")
    rope = rope_config(
        reader,
        rope_params(reader),
        reader.number("rope_theta", 10000.0),
        head_dim=width,
        partial=partial,
        aliases=rope_aliases,
    )
    entries: dict[str, Any] = {
        "family": family,
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": reader.integer("hidden_size"),
        "intermediate_size": reader.integer("intermediate_size"),
        "num_heads": num_heads,
        "num_kv_heads": reader.integer("num_key_value_heads", num_heads),
        "head_dim": width,
        "layers": layers_of(windows, rope),
        "max_position": longest_position(rope, reader.integer("max_position_embeddings")),
        "activation": "silu",
        "query_scale": width**-0.5,
        "tie_embeddings": reader.flag("tie_word_embeddings"),
        "attention_bias": reader.flag("attention_bias"),
        "output_bias": reader.flag("attention_bias"),
        "mlp_bias": reader.flag("mlp_bias"),
        "eos_token_ids": reader.token_ids("eos_token_id"),
        "bos_token_id": next(iter(reader.token_ids("bos_token_id")), None),
    }
    if "norm_eps" not in changes:
        entries["norm_eps"] = reader.number("rms_norm_eps")
    if "activation" not in changes:
        entries["activation"] = reader.choice("hidden_act", ACTIVATIONS)
    return DecoderConfig(**{**entries, **changes})


def nothing_implied(config: dict[str, Any], names: Collection[str]) -> None:
    """Change nothing: the GGUF metadata of the family hold all entries of a config.json."""
