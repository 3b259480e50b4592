"""GPT-NeoX and Pythia: heads rotated in part, attention and MLP in parallel."""

from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families.classic import activation, classic
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import GGUF_CONFIG_KEYS, FamilyConfig
from kvloom.spec.families.rope import longest_position, rope_config, rope_params
from kvloom.spec.families.skeleton import layers_of, nothing_implied


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


GPT_NEOX = FamilyConfig(
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
    gguf_config_keys={
        **GGUF_CONFIG_KEYS,
        "attention.layer_norm_epsilon": "layer_norm_eps",
        "use_parallel_residual": "use_parallel_residual",
        "rope.freq_base": "rotary_emb_base",
    },
    partial_rotary=True,
)
