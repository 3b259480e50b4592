"""Phi-1, Phi-1.5 and Phi-2: attention and MLP in parallel behind one LayerNorm, heads rotated in part, biases."""

from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import FamilyConfig
from kvloom.spec.families.skeleton import nothing_implied, skeleton


def _configure(reader: ConfigReader) -> DecoderConfig:
    reader.refuse_if_set("tie_word_embeddings")
    return skeleton(
        reader,
        "phi",
        [None] * reader.integer("num_hidden_layers"),
        partial=True,
        norm="layer",
        norm_bias=True,
        norm_eps=reader.number("layer_norm_eps"),
        qk_norm=reader.flag("qk_layernorm"),
        parallel_residual=True,
        shared_norm=True,
        gated=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
    )


PHI = FamilyConfig(
    name="phi",
    architectures=("PhiForCausalLM",),
    model_types=("phi",),
    gguf_architecture=None,
    defaults={
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "hidden_act": "gelu_new",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    configure=_configure,
    from_gguf=nothing_implied,
)
