"""Gemma 3, text: windows on most layers, two rope bases, norms of q and k, norms around every block."""

from collections.abc import Callable, Collection
from typing import Any

from kvloom.spec.decoder import DecoderConfig, LayerConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import GGUF_CONFIG_KEYS, FamilyConfig
from kvloom.spec.families.rope import rope_config, rope_params
from kvloom.spec.families.skeleton import layer_windows

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


def implied_query_scale(largest: int) -> Callable[[dict[str, Any], Collection[str]], None]:
    """Return a `from_gguf` that adds the scale of queries, which GGUF files leave out.

    It is one over the root of the head size, but of hidden / heads in the model of `largest` layers.
    """

    def from_gguf(config: dict[str, Any], names: Collection[str]) -> None:
        if config.get("num_hidden_layers") == largest:
            config.setdefault("query_pre_attn_scalar", config["hidden_size"] // config["num_attention_heads"])
        else:
            config.setdefault("query_pre_attn_scalar", config.get("head_dim", 256))

    return from_gguf


GEMMA3 = FamilyConfig(
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
    from_gguf=implied_query_scale(_LARGEST_NUM_LAYERS),
    gguf_config_keys={
        **GGUF_CONFIG_KEYS,
        "attention.sliding_window_pattern": "sliding_window_pattern",
        "rope.freq_base_swa": "rope_local_base_freq",
    },
)
