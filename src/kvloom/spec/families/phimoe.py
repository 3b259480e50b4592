"""Phi-3.5-MoE: LayerNorms and biases around a mixture of experts that SparseMixer-v2 routes."""

from dataclasses import replace

from kvloom.spec.decoder import DecoderConfig, ExpertsConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import FamilyConfig
from kvloom.spec.families.rope import rope_params
from kvloom.spec.families.routed import checked, routed
from kvloom.spec.families.skeleton import all_windowed, nothing_implied, skeleton


def _configure(reader: ConfigReader) -> DecoderConfig:
    reader.refuse_if_set("tie_word_embeddings")
    experts = ExpertsConfig(
        reader.integer("num_local_experts"),
        reader.integer("num_experts_per_tok"),
        reader.integer("intermediate_size"),
        jitter=reader.number("router_jitter_noise"),
    )
    config = skeleton(
        reader,
        "phimoe",
        all_windowed(reader),
        norm="layer",
        norm_bias=True,
        experts=checked(reader, experts),
        head_bias=reader.flag("lm_head_bias"),
    )
    layers = routed(config).layers
    amplitude = _amplitude(reader)
    if amplitude is not None:
        layers = tuple(
            replace(layer, rope=replace(layer.rope, scaling={**layer.rope.scaling, "amplitude": amplitude}))
            for layer in layers
            if layer.rope is not None
        )
    return replace(config, layers=layers)


def _amplitude(reader: ConfigReader) -> float | None:
    """Return what multiplies cosines and sines where the config says it, for short and for long texts."""
    params = rope_params(reader)
    short, long = params.get("short_mscale"), params.get("long_mscale")
    if short is None and long is None:
        return None
    if isinstance(short, bool) or not isinstance(short, int | float) or short != long:
        reader.refuse(f"short_mscale {short!r} and long_mscale {long!r}, which are not one number")
        return None
    return float(short)


PHIMOE = FamilyConfig(
    name="phimoe",
    architectures=("PhimoeForCausalLM", "PhiMoEForCausalLM"),
    model_types=("phimoe",),
    gguf_architecture=None,
    defaults={
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 6400,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.01,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    configure=_configure,
    from_gguf=nothing_implied,
)
