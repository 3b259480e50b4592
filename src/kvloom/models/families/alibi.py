"""Weights of BLOOM and MPT."""

from kvloom.models.families.classic import (
    embeddings,
    fused_attention,
    layer_norm,
    plain_mlp,
)
from kvloom.models.families.family import Family
from kvloom.spec.families import alibi as configs

_BLOOM_AT, _MPT_AT = "transformer.h.{i}.", "transformer.blocks.{i}."


BLOOM = Family(
    config=configs.BLOOM,
    weights=(
        *embeddings("transformer.word_embeddings.weight"),
        *layer_norm("embed_norm", "transformer.word_embeddings_layernorm"),
        *fused_attention(
            _BLOOM_AT + "self_attention.query_key_value", _BLOOM_AT + "self_attention.dense", grouped=True
        ),
        *plain_mlp(_BLOOM_AT + "mlp.dense_h_to_4h", _BLOOM_AT + "mlp.dense_4h_to_h"),
        *layer_norm("layers.{i}.attn_norm", _BLOOM_AT + "input_layernorm"),
        *layer_norm("layers.{i}.mlp_norm", _BLOOM_AT + "post_attention_layernorm"),
        *layer_norm("final_norm", "transformer.ln_f"),
    ),
    hf_prefixes=(("transformer.", "transformer."), ("lm_head.", "lm_head."), ("", "transformer.")),
)


MPT = Family(
    config=configs.MPT,
    weights=(
        *embeddings("transformer.wte.weight"),
        *fused_attention(_MPT_AT + "attn.Wqkv", _MPT_AT + "attn.out_proj", grouped=False),
        *plain_mlp(_MPT_AT + "ffn.up_proj", _MPT_AT + "ffn.down_proj"),
        *layer_norm("layers.{i}.attn_norm", _MPT_AT + "norm_1"),
        *layer_norm("layers.{i}.mlp_norm", _MPT_AT + "norm_2"),
        *layer_norm("final_norm", "transformer.norm_f"),
    ),
)
