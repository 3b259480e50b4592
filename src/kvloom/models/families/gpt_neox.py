"""Weights of GPT-NeoX."""

from kvloom.models.families.classic import embeddings, fused_attention, layer_norm, plain_mlp
from kvloom.models.families.family import Family
from kvloom.spec.families import gpt_neox as configs

_AT = "gpt_neox.layers.{i}."


GPT_NEOX = Family(
    config=configs.GPT_NEOX,
    weights=(
        *embeddings("gpt_neox.embed_in.weight", "embed_out.weight"),
        *fused_attention(_AT + "attention.query_key_value", _AT + "attention.dense", grouped=True),
        *plain_mlp(_AT + "mlp.dense_h_to_4h", _AT + "mlp.dense_4h_to_h"),
        *layer_norm("layers.{i}.attn_norm", _AT + "input_layernorm"),
        *layer_norm("layers.{i}.mlp_norm", _AT + "post_attention_layernorm"),
        *layer_norm("final_norm", "gpt_neox.final_layer_norm"),
    ),
)
