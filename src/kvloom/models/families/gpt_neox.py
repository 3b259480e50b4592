"""GPT-NeoX and Pythia: heads rotated in part, attention and MLP in parallel."""

from kvloom.models.families.classic import activation, classic, embeddings, fused_attention, layer_norm, plain_mlp
from kvloom.models.families.config_reader import ConfigReader
from kvloom.models.families.family import GGUF_CONFIG_KEYS, Family
from kvloom.models.families.rope import longest_position, rope_config, rope_params
from kvloom.models.families.skeleton import layers_of, nothing_implied
from kvloom.spec.decoder import DecoderConfig


def _configure(reader: ConfigReader) -> DecoderConfig:
    hidden_size, num_heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    part = reader.get("partial_rotary_factor")
    params = {"partial_rotary_factor": reader.get("rotary_pct") if part is None else part, **rope_params(reader)}
    base = reader.number("rotary_emb_base")
    rope = rope_config(reader, params, base, head_dim=max(1, hidden_size // num_heads), partial=True)
    return classic(
        reader,
        "gpt_neox",
        layers_of([None] * reader.integer("num_hidden_layers"), rope),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        max_position=longest_position(rope, reader.integer("max_position_embeddings")),
        norm_eps=reader.number("layer_norm_eps"),
        activation=activation(reader, "hidden_act"),
        attention_bias=reader.flag("attention_bias"),
        output_bias=reader.flag("attention_bias"),
        mlp_bias=True,
        parallel_residual=reader.flag("use_parallel_residual"),
    )


_AT = "gpt_neox.layers.{i}."

GPT_NEOX = Family(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    model_types=("gpt_neox",),
    gguf_architecture="gptneox",
    defaults={
        "vocab_size": 50432,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "hidden_act": "gelu",
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "attention_bias": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    configure=_configure,
    from_gguf=nothing_implied,
    weights=(
        *embeddings("gpt_neox.embed_in.weight", "embed_out.weight"),
        *fused_attention(_AT + "attention.query_key_value", _AT + "attention.dense", grouped=True),
        *plain_mlp(_AT + "mlp.dense_h_to_4h", _AT + "mlp.dense_4h_to_h"),
        *layer_norm("layers.{i}.attn_norm", _AT + "input_layernorm"),
        *layer_norm("layers.{i}.mlp_norm", _AT + "post_attention_layernorm"),
        *layer_norm("final_norm", "gpt_neox.final_layer_norm"),
    ),
    gguf_config_keys={
        **GGUF_CONFIG_KEYS,
        "attention.layer_norm_epsilon": "layer_norm_eps",
        "use_parallel_residual": "use_parallel_residual",
        "rope.freq_base": "rotary_emb_base",
    },
    partial_rotary=True,
)
