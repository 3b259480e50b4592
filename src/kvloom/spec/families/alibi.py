"""BLOOM and MPT: no position embedding; each head subtracts a penalty proportional to distance (ALiBi)."""

from collections.abc import Collection
from typing import Any

from kvloom.spec.decoder import DecoderConfig, LayerConfig
from kvloom.spec.families.classic import (
    alibi_slopes,
    classic,
)
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import GPT_GGUF_KEYS, FamilyConfig
from kvloom.spec.families.skeleton import nothing_implied


def _bloom(reader: ConfigReader) -> DecoderConfig:
    reader.refuse_if_set("apply_residual_connection_post_layernorm")
    hidden_size = reader.integer("hidden_size", reader.get("n_embed") or 64)
    num_heads = reader.integer("n_head", reader.get("num_attention_heads") or 8)
    return classic(
        reader,
        "bloom",
        [LayerConfig(None, None)] * reader.integer("n_layer", reader.get("num_hidden_layers") or 2),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        max_position=reader.integer("seq_length", 2048),
        norm_eps=reader.number("layer_norm_epsilon"),
        activation="gelu_tanh",
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        embed_norm=True,
        slopes=alibi_slopes(num_heads),
    )


def _mpt_slopes(num_heads: int, most: float) -> tuple[float, ...]:
    """Return 2 ** (-most h / P), P the least power of two >= heads; if P > heads, even h come before odd ones."""
    power = 1 << (num_heads - 1).bit_length()
    slopes = [2.0 ** (-most * (i + 1) / power) for i in range(power)]
    return tuple((slopes if power == num_heads else [*slopes[1::2], *slopes[::2]])[:num_heads])


def _mpt(reader: ConfigReader) -> DecoderConfig:
    attention: Any = reader.get("attn_config") or {}
    for key in ("qk_ln", "prefix_lm", "attn_uses_sequence_id"):
        if attention.get(key):
            reader.refuse(f"attn_config.{key} {attention[key]!r}")
    if not attention.get("alibi", True):
        reader.refuse("attn_config.alibi false: positions are learned")
    if attention.get("kv_n_heads") not in (None, reader.integer("n_heads")):
        reader.refuse(f"attn_config.kv_n_heads {attention['kv_n_heads']!r}")
    biased = reader.get("no_bias") is False
    if biased:
        reader.refuse("no_bias false: projections with biases")
    if reader.get("logit_scale") is not None:
        reader.refuse(f"logit_scale {reader.get('logit_scale')!r}")
    hidden_size, num_heads = reader.integer("d_model"), reader.integer("n_heads")
    kv_heads = attention.get("kv_n_heads")
    scale, clip = attention.get("softmax_scale"), attention.get("clip_qkv")
    return classic(
        reader,
        "mpt",
        [LayerConfig(None, None)] * reader.integer("n_layers"),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("expansion_ratio") * hidden_size,
        num_heads=num_heads,
        num_kv_heads=kv_heads if isinstance(kv_heads, int) and kv_heads > 0 else num_heads,
        max_position=reader.integer("max_seq_len"),
        norm_eps=reader.number("layer_norm_epsilon"),
        activation="gelu",
        norm_bias=biased,
        attention_bias=biased,
        output_bias=biased,
        mlp_bias=biased,
        query_scale=(hidden_size // num_heads) ** -0.5 if scale is None else float(scale),
        qkv_clip=float(clip) if clip else None,
        slopes=_mpt_slopes(num_heads, float(attention.get("alibi_bias_max", 8))),
    )


def _mpt_from_gguf(config: dict[str, Any], names: Collection[str]) -> None:
    """Gather what the config has in `attn_config`; no bias on distances means learned positions."""
    attention = {name: config.pop(name) for name in ("clip_qkv", "alibi_bias_max", "kv_n_heads") if name in config}
    config["attn_config"] = {**attention, "alibi": attention.get("alibi_bias_max", 0) > 0}
    config["expansion_ratio"] = config.pop("inner", 0) // max(1, config.get("d_model", 1))


BLOOM = FamilyConfig(
    name="bloom",
    architectures=("BloomForCausalLM",),
    model_types=("bloom",),
    gguf_architecture="bloom",
    defaults={
        "vocab_size": 250880,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    configure=_bloom,
    from_gguf=nothing_implied,
    gguf_config_keys={**GPT_GGUF_KEYS, "context_length": "seq_length", "embedding_length": "hidden_size"},
)


MPT = FamilyConfig(
    name="mpt",
    architectures=("MptForCausalLM", "MPTForCausalLM"),
    model_types=("mpt",),
    gguf_architecture="mpt",
    defaults={
        "vocab_size": 50368,
        "d_model": 2048,
        "n_heads": 16,
        "n_layers": 24,
        "expansion_ratio": 4,
        "max_seq_len": 2048,
        "layer_norm_epsilon": 1e-5,
        "no_bias": True,
        "tie_word_embeddings": True,
    },
    configure=_mpt,
    from_gguf=_mpt_from_gguf,
    gguf_config_keys={
        "context_length": "max_seq_len",
        "embedding_length": "d_model",
        "block_count": "n_layers",
        "feed_forward_length": "inner",
        "attention.head_count": "n_heads",
        "attention.head_count_kv": "kv_n_heads",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "attention.clamp_kqv": "clip_qkv",
        "attention.max_alibi_bias": "alibi_bias_max",
    },
)
