"""GPT-2 and GPT-BigCode (StarCoder): learned positions; the latter with one KV head for all queries."""

from kvloom.spec.decoder import DecoderConfig, LayerConfig
from kvloom.spec.families.classic import activation, classic
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import GPT_GGUF_KEYS, FamilyConfig
from kvloom.spec.families.skeleton import nothing_implied


def _config(reader: ConfigReader, family: str, num_kv_heads: int) -> DecoderConfig:
    reader.refuse_if_set("scale_attn_by_inverse_layer_idx", "add_cross_attention")
    if reader.get("scale_attn_weights") is False:
        reader.refuse("scale_attn_weights False: scores are always scaled by the head size")
    hidden_size = reader.integer("n_embd")
    return classic(
        reader,
        family,
        [LayerConfig(None, None)] * reader.integer("n_layer"),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("n_inner", 4 * hidden_size),
        num_heads=reader.integer("n_head"),
        num_kv_heads=num_kv_heads,
        max_position=reader.integer("n_positions"),
        norm_eps=reader.number("layer_norm_epsilon"),
        activation=activation(reader, "activation_function"),
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        learned_positions=True,
    )


def _gpt2(reader: ConfigReader) -> DecoderConfig:
    return _config(reader, "gpt2", reader.integer("n_head"))


def _gpt_bigcode(reader: ConfigReader) -> DecoderConfig:
    return _config(reader, "gpt_bigcode", 1 if reader.flag("multi_query") else reader.integer("n_head"))


_DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}


GPT2 = FamilyConfig(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    model_types=("gpt2",),
    gguf_architecture="gpt2",
    defaults={**_DEFAULTS, "activation_function": "gelu_new"},
    configure=_gpt2,
    from_gguf=nothing_implied,
    gguf_config_keys=GPT_GGUF_KEYS,
)


GPT_BIGCODE = FamilyConfig(
    name="gpt_bigcode",
    architectures=("GPTBigCodeForCausalLM",),
    model_types=("gpt_bigcode",),
    gguf_architecture="starcoder",  # which has one KV head
    defaults={**_DEFAULTS, "activation_function": "gelu_pytorch_tanh", "multi_query": True},
    configure=_gpt_bigcode,
    from_gguf=nothing_implied,
    gguf_config_keys=GPT_GGUF_KEYS,
)
