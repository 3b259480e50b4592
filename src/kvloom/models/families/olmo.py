"""Weights of OLMo 2, OLMo 3 and OLMoE: the norms of q and k are as wide as all heads."""

from kvloom.models.families.family import Family
from kvloom.models.families.routed import QWEN_EXPERTS
from kvloom.models.families.weight import (
    ATTENTION,
    EMBEDDINGS,
    FINAL_NORM,
    PRE_NORMS,
    PROJECTIONS,
    kv,
    norm,
    q,
    rows_of,
)
from kvloom.spec.families import olmo as configs

_QK_NORMS = (
    norm("q_norm", "self_attn.q_norm.weight", "attn_q_norm.weight", rows_of(q)),
    norm("k_norm", "self_attn.k_norm.weight", "attn_k_norm.weight", rows_of(kv)),
)

POST_NORMS = (
    norm("post_attn_norm", "post_attention_layernorm.weight", "post_attention_norm.weight"),
    norm("post_mlp_norm", "post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
    FINAL_NORM,
)
"""Norms after attention, after the MLP and before the output, of models without others."""

_DENSE = (*PROJECTIONS, *_QK_NORMS, *POST_NORMS)

OLMO2 = Family(config=configs.OLMO2, weights=_DENSE)

OLMO3 = Family(config=configs.OLMO3, weights=_DENSE)

OLMOE = Family(
    config=configs.OLMOE,
    weights=(
        *EMBEDDINGS,
        *ATTENTION,
        *_QK_NORMS,
        *QWEN_EXPERTS,
        *PRE_NORMS,
    ),
)
