"""Lowering: the parts of a decoder, from its config. Torch-free."""

from dataclasses import replace

from kvloom.models.parts import (
    Add,
    AddExperts,
    Append,
    Attend,
    Embed,
    Heads,
    Norm,
    NormSpec,
    Output,
    Part,
    ProductSpec,
    Up,
)
from kvloom.spec.decoder import DecoderConfig, LayerConfig

CURVES = {"xielu": ("act_p", "act_n", "act_beta", "act_eps")}
"""Weights of activations that have some, in each layer."""


def lower_input(config: DecoderConfig) -> Embed:
    """Return the part that computes the input of the first layer."""
    norm = _norm(config, "embed_norm") if config.embed_norm else None
    return Embed(config.embedding_scale, config.learned_positions, norm)


def lower_layer(config: DecoderConfig, index: int) -> tuple[Part, ...]:
    """Return the parts of layer `index`, in the order in which they are executed."""
    layer, at = config.layers[index], f"layers.{index}."

    def product(*names: str, biased: bool) -> ProductSpec:
        return ProductSpec(tuple(at + name for name in names), biased)

    def before(name: str) -> Norm:
        return Norm(_norm(config, at + name) if config.pre_norm else None)

    def behind(name: str) -> NormSpec | None:
        return _norm(config, at + name) if config.sandwich_norm else None

    attention: list[Part] = [
        before("attn_norm"),
        Heads(product("q", "k", "v", biased=config.attention_bias)),
        _append(config, layer, at),
        Attend(
            config.query_scale,
            config.score_softcap,
            config.slopes,
            at + "sinks" if config.sinks else None,
            layer.window if layer.chunked else None,
        ),
    ]
    added: list[Part] = [Add(product("o", biased=config.output_bias), True, behind("post_attn_norm"))]
    mlp: list[Part] = [before("attn_norm" if config.shared_norm else "mlp_norm")]
    if layer.routed:
        mlp_added: list[Part] = [AddExperts(at, behind("post_mlp_norm"))]
    else:
        names = ("gate", "up") if config.gated else ("up",)
        curve = tuple(at + name for name in CURVES.get(config.activation, ()))
        mlp.append(Up(product(*names, biased=config.mlp_bias), config.activation, curve))
        mlp_added = [Add(product("down", biased=config.mlp_bias), False, behind("post_mlp_norm"))]
    if config.parallel_residual:
        return (*attention, *mlp, *added, *mlp_added)
    return (*attention, *added, *mlp, *mlp_added)


def lower_output(config: DecoderConfig) -> Output:
    """Return the part that computes logits from the output of the last layer."""
    return Output(_norm(config, "final_norm"), config.logit_scale, config.logit_softcap, config.head_bias)


def _append(config: DecoderConfig, layer: LayerConfig, at: str) -> Append:
    kind = config.qk_norm_kind
    unit = kind == "unit"
    normed = config.qk_norm and (layer.rope is not None or not unit)
    q_norm, k_norm = (
        replace(_norm(config, at + name), weight=None if unit else at + name) if normed else None
        for name in ("q_norm", "k_norm")
    )
    return Append(
        config.qkv_clip,
        q_norm,
        k_norm,
        layer.rope,
        over_heads=normed and kind == "layer",
        after_rope=normed and kind in ("rotated", "unit"),
        temperature=config.temperature if layer.rope is None else None,
    )


def _norm(config: DecoderConfig, weight: str) -> NormSpec:
    centred = config.norm == "layer"
    return NormSpec(weight, config.norm_eps, centred, centred and config.norm_bias)
