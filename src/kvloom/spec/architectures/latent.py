"""Multi-head latent attention: DeepSeek-V2 to V3.2, Kimi-K2, GLM-4.7-Flash, GLM-5, Mistral 4."""

from dataclasses import replace

from kvloom.spec.architectures.entries import Config, Reader, build, feed_forwards, routed_experts
from kvloom.spec.layer import Latent, LayerSpec, Mlp
from kvloom.spec.model import ModelSpec

_UNCORRECTED = ("deepseek_v2", "mistral4")
"""Architectures whose router has no learned correction of its choice."""


def latent(config: Config) -> Latent:
    """Return the attention that the entries of DeepSeek-V2 describe."""
    rank = None if config.fields.get("q_lora_rank") is None else config.number("q_lora_rank")
    return Latent(
        config.number("num_attention_heads"),
        rank,
        config.number("kv_lora_rank"),
        config.number("qk_nope_head_dim"),
        config.number("qk_rope_head_dim"),
        config.number("v_head_dim"),
        config.flag("attention_bias", False),
    )


def _latent(config: Config) -> ModelSpec:
    hidden, mixer = config.number("hidden_size"), latent(config)
    experts = routed_experts(config, corrected=config.fields["model_type"] not in _UNCORRECTED)
    mlps = feed_forwards(config, Mlp(config.number("intermediate_size")), experts)
    return build(config, [LayerSpec(mixer, mlp, norm_params=2 * hidden) for mlp in mlps], hidden)


def _indexed(config: Config) -> ModelSpec:
    """Add an indexer, whose keys are cached beside the latent, to the layers that have one of their own."""
    plain, count = _latent(config), config.number("num_hidden_layers")
    kinds = config.layer_types(count, ("full", "shared"), "indexer_types") or ["full"] * count
    heads, width = config.number("index_n_heads"), config.number("index_head_dim")
    mixer = replace(latent(config), index_heads=heads, index_dim=width)
    layers = [
        replace(layer, mixer=mixer) if kind == "full" else layer
        for layer, kind in zip(plain.layers, kinds, strict=True)
    ]
    chosen = config.number("index_topk", default=2048)
    note = f"keys of the indexer in the dtype of K/V; times count all tokens, and attention reads at most {chosen}"
    return replace(plain, layers=tuple(layers), notes=(note,))


LATENT_READERS: dict[str, Reader] = {
    "deepseek_v2": _latent,
    "deepseek_v3": _latent,
    "deepseek_v32": _indexed,
    "glm4_moe_lite": _latent,
    "glm_moe_dsa": _indexed,
    "kimi_k2": _latent,
    "mistral4": _latent,
}
