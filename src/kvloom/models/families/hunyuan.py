"""Weights of Hunyuan, dense."""

from kvloom.models.families.family import Family
from kvloom.models.families.weight import PRE_NORMS, PROJECTIONS, head_norm
from kvloom.spec.families import hunyuan as configs

HUNYUAN = Family(
    config=configs.HUNYUAN,
    weights=(
        *PROJECTIONS,
        head_norm("q_norm", "self_attn.query_layernorm.weight", "attn_q_norm.weight"),
        head_norm("k_norm", "self_attn.key_layernorm.weight", "attn_k_norm.weight"),
        *PRE_NORMS,
    ),
)
