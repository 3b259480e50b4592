"""Hunyuan, dense: each head of q and k is normed after its rotation, whose base a fixed `alpha` may stretch."""

from dataclasses import replace

from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import FamilyConfig
from kvloom.spec.families.rope import rope_params
from kvloom.spec.families.skeleton import nothing_implied, skeleton


def _configure(reader: ConfigReader) -> DecoderConfig:
    alpha = rope_params(reader).get("alpha")
    static = {"dynamic": "default"} if alpha else {}  # the base does not grow with the length then
    windows = [None] * reader.integer("num_hidden_layers")
    config = skeleton(reader, "hunyuan", windows, rope_aliases=static, qk_norm=True, qk_norm_kind="rotated")
    if not alpha:
        return config
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or alpha <= 0:
        reader.wrong("alpha of the dynamic rotary embedding", "a positive number", alpha)
        return config
    stretch = float(alpha) ** (config.head_dim / max(1, config.head_dim - 2))
    layers = (
        replace(layer, rope=replace(layer.rope, base=layer.rope.base * stretch))
        for layer in config.layers
        if layer.rope is not None
    )
    return replace(config, layers=tuple(layers))


HUNYUAN = FamilyConfig(
    name="hunyuan",
    architectures=("HunYuanDenseV1ForCausalLM",),
    model_types=("hunyuan_v1_dense",),
    gguf_architecture=None,
    defaults={
        "vocab_size": 290943,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    configure=_configure,
    from_gguf=nothing_implied,
)
