"""Weights of Falcon: q, k and v in one matrix, one norm or two in each layer."""

from kvloom.models.families.classic import embeddings, fused_attention, layer_norm, plain_mlp
from kvloom.models.families.family import Family
from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families import falcon as configs


def _two(c: DecoderConfig) -> bool:
    return c.parallel_residual and not c.shared_norm


def _sequential(c: DecoderConfig) -> bool:
    return not c.parallel_residual


_AT = "transformer.h.{i}."


FALCON = Family(
    config=configs.FALCON,
    weights=(
        *embeddings("transformer.word_embeddings.weight"),
        *fused_attention(_AT + "self_attention.query_key_value", _AT + "self_attention.dense", grouped=True),
        *plain_mlp(_AT + "mlp.dense_h_to_4h", _AT + "mlp.dense_4h_to_h"),
        *layer_norm("layers.{i}.attn_norm", _AT + "input_layernorm", lambda c: not _two(c)),
        *layer_norm("layers.{i}.mlp_norm", _AT + "post_attention_layernorm", _sequential),
        *(
            weight
            for name, hf, gguf in (("attn_norm", "ln_attn", "attn_norm_2"), ("mlp_norm", "ln_mlp", "attn_norm"))
            for weight in layer_norm(f"layers.{{i}}.{name}", _AT + hf, _two, f"blk.{{i}}.{gguf}")
        ),
        *layer_norm("final_norm", "transformer.ln_f"),
    ),
)
