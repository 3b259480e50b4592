"""Falcon: one KV head (7B) or a few (40B), attention and MLP in parallel, behind one norm or one each."""

from collections.abc import Collection
from typing import Any

from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families.classic import activation, classic
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import GGUF_CONFIG_KEYS, FamilyConfig
from kvloom.spec.families.rope import longest_position, rope_config, rope_params
from kvloom.spec.families.skeleton import layers_of


def _configure(reader: ConfigReader) -> DecoderConfig:
    if reader.flag("alibi"):
        reader.refuse("alibi true: Falcon rounds its biases to bfloat16 and scales them, which no attention here does")
    grouped, parallel = reader.flag("new_decoder_architecture"), reader.flag("parallel_attn")
    hidden_size = reader.integer("hidden_size", reader.get("n_embed") or 4544)
    num_heads = reader.integer("num_attention_heads", reader.get("n_head") or 71)
    count = reader.integer("num_hidden_layers", reader.get("n_layer") or 32)
    num_kv_heads = 1 if reader.flag("multi_query") else num_heads
    if grouped:
        num_kv_heads = reader.integer("num_kv_heads", reader.get("n_head_kv") or num_heads)
        if not parallel:
            reader.refuse("new_decoder_architecture without parallel_attn")
    two_norms = grouped and reader.integer("num_ln_in_parallel_attn", 2) == 2
    rope = rope_config(reader, rope_params(reader), reader.number("rope_theta"), head_dim=hidden_size // num_heads)
    return classic(
        reader,
        "falcon",
        layers_of([None] * count, rope),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("ffn_hidden_size", 4 * hidden_size),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        max_position=longest_position(rope, reader.integer("max_position_embeddings")),
        norm_eps=reader.number("layer_norm_epsilon"),
        activation=activation(reader, "activation"),
        attention_bias=reader.flag("bias"),
        output_bias=reader.flag("bias"),
        mlp_bias=reader.flag("bias"),
        parallel_residual=parallel,
        shared_norm=parallel and not two_norms,
    )


def _from_gguf(config: dict[str, Any], names: Collection[str]) -> None:
    """Distinguish 7B by its one KV head, and 40B from 11B by its second norm; GGUF has no other kinds."""
    config["bias"] = "blk.0.attn_qkv.bias" in names
    config["new_decoder_architecture"] = config.get("num_kv_heads", 1) > 1
    config["num_ln_in_parallel_attn"] = 2 if "blk.0.attn_norm_2.weight" in names else 1


FALCON = FamilyConfig(
    name="falcon",
    architectures=("FalconForCausalLM", "RWForCausalLM"),
    model_types=("falcon", "RefinedWebModel", "RefinedWeb"),
    gguf_architecture="falcon",
    defaults={
        "vocab_size": 65024,
        "parallel_attn": True,
        "multi_query": True,
        "activation": "gelu",
        "max_position_embeddings": 2048,
        "layer_norm_epsilon": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 11,
        "eos_token_id": 11,
    },
    configure=_configure,
    from_gguf=_from_gguf,
    gguf_config_keys={
        **GGUF_CONFIG_KEYS,
        "feed_forward_length": "ffn_hidden_size",
        "attention.head_count_kv": "num_kv_heads",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
)
