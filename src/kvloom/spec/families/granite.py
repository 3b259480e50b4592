"""Granite 3: Llama with multipliers on embeddings, scores, residuals and logits; dense, or with experts.

The outputs of attention and MLP are multiplied by r before they are added to the residual stream x. Only RMSNorms read
x, and a common factor of x and the root of epsilon cancels in them. So the decoder runs on x / r, without a multiplier,

    norm(x) = x / sqrt(mean(x ** 2) + eps) = y / sqrt(mean(y ** 2) + eps / r ** 2)   with y = x / r.

Policies that use the input of a layer get y, to which the output of attention is added unscaled.
"""

from typing import Any

from kvloom.spec.decoder import DecoderConfig, ExpertsConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import FamilyConfig
from kvloom.spec.families.routed import checked, routed
from kvloom.spec.families.skeleton import nothing_implied, skeleton


def _multiplied(reader: ConfigReader, family: str, **changes: Any) -> DecoderConfig:
    residual = reader.number("residual_multiplier", 1.0)
    return skeleton(
        reader,
        family,
        [None] * reader.integer("num_hidden_layers"),
        embedding_scale=reader.number("embedding_multiplier", 1.0) / residual,
        query_scale=reader.number("attention_multiplier", 1.0),
        norm_eps=reader.number("rms_norm_eps") / residual**2,
        logit_scale=1.0 / reader.number("logits_scaling", 1.0),
        **changes,
    )


def _granite(reader: ConfigReader) -> DecoderConfig:
    return _multiplied(reader, "granite")


def _granite_moe(reader: ConfigReader) -> DecoderConfig:
    """Weights of experts are the softmax over those chosen, which is the softmax over all divided by its sum there."""
    experts = ExpertsConfig(
        reader.integer("num_local_experts"),
        reader.integer("num_experts_per_tok"),
        reader.integer("intermediate_size"),
    )
    config = _multiplied(reader, "granite_moe", experts=checked(reader, experts))
    return routed(config)


_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

GRANITE = FamilyConfig(
    name="granite",
    architectures=("GraniteForCausalLM",),
    model_types=("granite",),
    gguf_architecture=None,
    defaults=_DEFAULTS,
    configure=_granite,
    from_gguf=nothing_implied,
)

GRANITE_MOE = FamilyConfig(
    name="granite_moe",
    architectures=("GraniteMoeForCausalLM",),
    model_types=("granitemoe",),
    gguf_architecture=None,
    defaults={**_DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2},
    configure=_granite_moe,
    from_gguf=nothing_implied,
)
