"""Gemma 2: windows on every second layer, norms around every block, soft caps on scores and logits."""

from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import GGUF_CONFIG_KEYS, FamilyConfig
from kvloom.spec.families.gemma3 import implied_query_scale
from kvloom.spec.families.skeleton import layer_windows, skeleton

_LARGEST_NUM_LAYERS = 46


def _cap(reader: ConfigReader, key: str) -> float | None:
    return None if reader.get(key) is None else reader.number(key)


def _configure(reader: ConfigReader) -> DecoderConfig:
    reader.refuse_if_set("use_bidirectional_attention")
    return skeleton(
        reader,
        "gemma2",
        layer_windows(reader, lambda i: i % 2 == 0),
        activation=reader.choice("hidden_activation", {"gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}),
        query_scale=reader.number("query_pre_attn_scalar") ** -0.5,
        sandwich_norm=True,
        embedding_scale=reader.integer("hidden_size") ** 0.5,
        score_softcap=_cap(reader, "attn_logit_softcapping"),
        logit_softcap=_cap(reader, "final_logit_softcapping"),
    )


GEMMA2 = FamilyConfig(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    model_types=("gemma2",),
    gguf_architecture="gemma2",
    defaults={
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    configure=_configure,
    from_gguf=implied_query_scale(_LARGEST_NUM_LAYERS),
    gguf_config_keys={
        **GGUF_CONFIG_KEYS,
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
)
