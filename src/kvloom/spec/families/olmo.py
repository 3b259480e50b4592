"""OLMo 2, OLMo 3 and OLMoE: q and k are normed over all heads; the first two have norms after each block only."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvloom.spec.decoder import DecoderConfig, ExpertsConfig, LayerConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import FamilyConfig
from kvloom.spec.families.rope import longest_position, rope_config, rope_params
from kvloom.spec.families.routed import checked, routed
from kvloom.spec.families.skeleton import layer_windows, nothing_implied, skeleton


def _olmo(reader: ConfigReader, family: str, windows: Sequence[int | None], **changes: Any) -> DecoderConfig:
    return skeleton(reader, family, windows, qk_norm=True, qk_norm_kind="layer", **changes)


def _olmo2(reader: ConfigReader) -> DecoderConfig:
    reader.refuse_if_set("sliding_window")  # what a GGUF file of OLMo 3 says, which has the same architecture
    windows = [None] * reader.integer("num_hidden_layers")
    return _olmo(reader, "olmo2", windows, pre_norm=False, sandwich_norm=True)


def _olmo3(reader: ConfigReader) -> DecoderConfig:
    """Every fourth layer sees all tokens; an older `rope_scaling` is of those layers alone."""
    windows = layer_windows(reader, lambda i: bool((i + 1) % 4))
    base = reader.number("rope_theta")
    full = rope_config(reader, rope_params(reader, "full_attention"), base)
    newer = isinstance(reader.get("rope_parameters"), dict)
    local = rope_config(reader, rope_params(reader, "sliding_attention") if newer else {}, base)
    config = _olmo(reader, "olmo3", windows, pre_norm=False, sandwich_norm=True)
    layers = tuple(LayerConfig(window, full if window is None else local) for window in windows)
    longest = longest_position(full, reader.integer("max_position_embeddings"))
    return replace(config, layers=layers, max_position=longest)


def _olmoe(reader: ConfigReader) -> DecoderConfig:
    reader.refuse_if_set("clip_qkv")
    experts = ExpertsConfig(
        reader.integer("num_local_experts", reader.get("num_experts") or 64),
        reader.integer("num_experts_per_tok"),
        reader.integer("intermediate_size"),
        normalise=reader.flag("norm_topk_prob"),
    )
    config = _olmo(reader, "olmoe", [None] * reader.integer("num_hidden_layers"), experts=checked(reader, experts))
    return routed(config)


_DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eos_token_id": 50279,
}

OLMO2 = FamilyConfig(
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    model_types=("olmo2",),
    gguf_architecture="olmo2",
    defaults=_DEFAULTS,
    configure=_olmo2,
    from_gguf=nothing_implied,
)

OLMO3 = FamilyConfig(
    name="olmo3",
    architectures=("Olmo3ForCausalLM",),
    model_types=("olmo3",),
    gguf_architecture=None,
    defaults={**_DEFAULTS, "rope_theta": 500000.0, "sliding_window": 4096},
    configure=_olmo3,
    from_gguf=nothing_implied,
)

OLMOE = FamilyConfig(
    name="olmoe",
    architectures=("OlmoeForCausalLM",),
    model_types=("olmoe",),
    gguf_architecture=None,
    defaults={
        **_DEFAULTS,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "max_position_embeddings": 4096,
        "num_experts_per_tok": 8,
    },
    configure=_olmoe,
    from_gguf=nothing_implied,
)
