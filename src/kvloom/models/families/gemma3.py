"""Gemma 3, text: windows on most layers, two rope bases, norms of q and k, norms around every block."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvloom.models.families.config_reader import ConfigReader
from kvloom.models.families.family import GGUF_CONFIG_KEYS, Family
from kvloom.models.families.rope import rope_config, rope_params
from kvloom.models.families.skeleton import layer_windows
from kvloom.models.families.weight import FINAL_NORM, HEAD_NORMS, PROJECTIONS, Weight, norm
from kvloom.spec.decoder import DecoderConfig, LayerConfig

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST_NUM_LAYERS = 62


def _layers(reader: ConfigReader) -> tuple[LayerConfig, ...]:
    pattern = reader.integer("sliding_window_pattern")
    windows = layer_windows(reader, lambda i: bool((i + 1) % pattern))
    full = rope_config(reader, rope_params(reader, "full_attention"), reader.number("rope_theta"))
    local = rope_config(reader, _local_rope_params(reader), reader.number("rope_local_base_freq"))
    return tuple(LayerConfig(window, full if window is None else local) for window in windows)


def _local_rope_params(reader: ConfigReader) -> dict[str, Any]:
    """Only the newer notation describes the windowed layers; the older `rope_scaling` is for the others."""
    return rope_params(reader, "sliding_attention") if isinstance(reader.get("rope_parameters"), dict) else {}


def _configure(reader: ConfigReader) -> DecoderConfig:
    reader.refuse_if_set("use_bidirectional_attention", "final_logit_softcapping", "attn_logit_softcapping")
    hidden_size = reader.integer("hidden_size")
    return DecoderConfig(
        family="gemma3",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size"),
        num_heads=reader.integer("num_attention_heads"),
        num_kv_heads=reader.integer("num_key_value_heads"),
        head_dim=reader.integer("head_dim"),
        layers=_layers(reader),
        max_position=reader.integer("max_position_embeddings"),
        norm_eps=reader.number("rms_norm_eps"),
        activation=reader.choice("hidden_activation", {"gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}),
        query_scale=reader.number("query_pre_attn_scalar") ** -0.5,
        tie_embeddings=reader.flag("tie_word_embeddings"),
        qk_norm=True,
        sandwich_norm=True,
        embedding_scale=hidden_size**0.5,
        attention_bias=reader.flag("attention_bias"),
        output_bias=reader.flag("attention_bias"),
        eos_token_ids=reader.token_ids("eos_token_id"),
        bos_token_id=next(iter(reader.token_ids("bos_token_id")), None),
    )


def _from_gguf(config: dict[str, Any], names: Collection[str]) -> None:
    """Add the scale of queries: one over the root of the head size, but of hidden/heads in the largest model."""
    if config.get("num_hidden_layers") == _LARGEST_NUM_LAYERS:
        config.setdefault("query_pre_attn_scalar", config["hidden_size"] // config["num_attention_heads"])
    else:
        config.setdefault("query_pre_attn_scalar", config.get("head_dim", 256))


def _plus_one(weight: Tensor, config: DecoderConfig) -> Tensor:
    """Norm weights are stored as their distance from one; GGUF files hold the sum already."""
    return 1.0 + weight


def offset(weight: Weight) -> Weight:
    """Return the weight of a norm that a safetensors file stores as its distance from one."""
    return replace(weight, from_hf=_plus_one)


SANDWICH_NORMS = tuple(
    map(
        offset,
        (
            norm("attn_norm", "input_layernorm.weight", "attn_norm.weight"),
            norm("post_attn_norm", "post_attention_layernorm.weight", "post_attention_norm.weight"),
            norm("mlp_norm", "pre_feedforward_layernorm.weight", "ffn_norm.weight"),
            norm("post_mlp_norm", "post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
            FINAL_NORM,
        ),
    )
)
"""Norms before and after attention and MLP, and before the output."""

GEMMA3 = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    model_types=("gemma3_text", "gemma3"),
    gguf_architecture="gemma3",
    defaults={
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    configure=_configure,
    from_gguf=_from_gguf,
    weights=(*PROJECTIONS, *map(offset, HEAD_NORMS), *SANDWICH_NORMS),
    hf_prefixes=(("language_model.", ""), ("model.language_model.", "model.")),
    ignored=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    gguf_config_keys={
        **GGUF_CONFIG_KEYS,
        "attention.sliding_window_pattern": "sliding_window_pattern",
        "rope.freq_base_swa": "rope_local_base_freq",
    },
)
