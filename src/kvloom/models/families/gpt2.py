"""Weights of GPT-2 and GPT-BigCode."""

from kvloom.models.families.classic import embeddings, fused_attention, layer_norm, plain_mlp
from kvloom.models.families.family import Family
from kvloom.models.families.weight import Weight
from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families import gpt2 as configs


def _positions(c: DecoderConfig) -> tuple[int, ...]:
    return (c.max_position, c.hidden_size)


def _weights(*, grouped: bool, turn: bool) -> tuple[Weight, ...]:
    at = "transformer.h.{i}."
    return (
        *embeddings("transformer.wte.weight"),
        Weight("positions", "transformer.wpe.weight", "position_embd.weight", _positions),
        *fused_attention(at + "attn.c_attn", at + "attn.c_proj", grouped=grouped, turn=turn),
        *plain_mlp(at + "mlp.c_fc", at + "mlp.c_proj", turn),
        *layer_norm("layers.{i}.attn_norm", at + "ln_1"),
        *layer_norm("layers.{i}.mlp_norm", at + "ln_2"),
        *layer_norm("final_norm", "transformer.ln_f"),
    )


_PREFIXES = (("transformer.", "transformer."), ("lm_head.", "lm_head."), ("", "transformer."))
"""The first checkpoints were saved without their first name."""


GPT2 = Family(
    config=configs.GPT2,
    weights=_weights(grouped=False, turn=True),
    hf_prefixes=_PREFIXES,
)


GPT_BIGCODE = Family(
    config=configs.GPT_BIGCODE,
    weights=_weights(grouped=True, turn=False),
    hf_prefixes=_PREFIXES,
)
