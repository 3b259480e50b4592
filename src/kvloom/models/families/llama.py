"""Llama: Llama 1 to 3, SmolLM2 and other models of the same mathematics."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvloom.models.config import DecoderConfig, LayerConfig
from kvloom.models.families.config_reader import ConfigReader
from kvloom.models.families.family import Family
from kvloom.models.families.rope import rope_config, rope_params
from kvloom.models.families.weight import FINAL_NORM, PROJECTIONS, Weight, norm

if TYPE_CHECKING:
    from torch import Tensor


def _configure(reader: ConfigReader) -> DecoderConfig:
    reader.refuse_if_set("mlp_bias")
    num_heads = reader.integer("num_attention_heads")
    hidden_size = reader.integer("hidden_size")
    head_dim = reader.integer("head_dim", max(1, hidden_size // num_heads))
    rope = rope_config(reader, rope_params(reader), reader.number("rope_theta"))
    return DecoderConfig(
        family="llama",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=reader.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        layers=(LayerConfig(None, rope),) * reader.integer("num_hidden_layers"),
        max_position=reader.integer("max_position_embeddings"),
        norm_eps=reader.number("rms_norm_eps"),
        activation=reader.choice("hidden_act", {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}),
        query_scale=head_dim**-0.5,
        tie_embeddings=reader.flag("tie_word_embeddings"),
        attention_bias=reader.flag("attention_bias"),
        output_bias=reader.flag("attention_bias"),
        eos_token_ids=reader.token_ids("eos_token_id"),
        bos_token_id=next(iter(reader.token_ids("bos_token_id")), None),
    )


def _from_gguf(config: dict[str, Any]) -> None:
    """Nothing is implied: a GGUF file of this architecture names all that a config.json does."""


def _halves_from_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of each head from interleaved pairs (0, h, 1, h + 1, ..) back to halves (0, 1, .. h, h + 1, ..).

    GGUF stores q and k of this architecture for a rotation of neighbouring elements; the decoder rotates halves.
    """
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _q_from_gguf(weight: Tensor, config: DecoderConfig) -> Tensor:
    return _halves_from_pairs(weight, config.num_heads)


def _k_from_gguf(weight: Tensor, config: DecoderConfig) -> Tensor:
    return _halves_from_pairs(weight, config.num_kv_heads)


_REORDERED = {"q": _q_from_gguf, "q_bias": _q_from_gguf, "k": _k_from_gguf, "k_bias": _k_from_gguf}


def _reordered(weight: Weight) -> Weight:
    transform = _REORDERED.get(weight.name.removeprefix("layers.{i}."))
    return replace(weight, from_gguf=transform) if transform else weight


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    gguf_architecture="llama",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    configure=_configure,
    from_gguf=_from_gguf,
    weights=(
        *map(_reordered, PROJECTIONS),
        norm("attn_norm", "input_layernorm.weight", "attn_norm.weight"),
        norm("mlp_norm", "post_attention_layernorm.weight", "ffn_norm.weight"),
        FINAL_NORM,
    ),
)
