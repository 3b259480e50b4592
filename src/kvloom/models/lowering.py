"""Lowering: the parts of a decoder, from its config. Torch-free."""

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
from kvloom.spec.decoder import DecoderConfig


def lower_input(config: DecoderConfig) -> Embed:
    """Return what makes the input of the first layer."""
    norm = _norm(config, "embed_norm") if config.embed_norm else None
    return Embed(config.embedding_scale, config.learned_positions, norm)


def lower_layer(config: DecoderConfig, index: int) -> tuple[Part, ...]:
    """Return the parts of layer `index`, in the order in which they are executed."""
    layer, at = config.layers[index], f"layers.{index}."

    def product(*names: str, biased: bool) -> ProductSpec:
        return ProductSpec(tuple(at + name for name in names), biased)

    def behind(name: str) -> NormSpec | None:
        return _norm(config, at + name) if config.sandwich_norm else None

    attention: list[Part] = [
        Norm(_norm(config, at + "attn_norm")),
        Heads(product("q", "k", "v", biased=config.attention_bias)),
        Append(
            config.qkv_clip,
            _norm(config, at + "q_norm") if config.qk_norm else None,
            _norm(config, at + "k_norm") if config.qk_norm else None,
            layer.rope,
        ),
        Attend(config.query_scale, config.score_softcap, config.slopes, at + "sinks" if config.sinks else None),
    ]
    added: list[Part] = [Add(product("o", biased=config.output_bias), True, behind("post_attn_norm"))]
    mlp: list[Part] = [Norm(_norm(config, at + ("attn_norm" if config.shared_norm else "mlp_norm")))]
    if layer.routed:
        mlp_added: list[Part] = [AddExperts(at, behind("post_mlp_norm"))]
    else:
        names = ("gate", "up") if config.gated else ("up",)
        mlp.append(Up(product(*names, biased=config.mlp_bias), config.activation))
        mlp_added = [Add(product("down", biased=config.mlp_bias), False, behind("post_mlp_norm"))]
    if config.parallel_residual:
        return (*attention, *mlp, *added, *mlp_added)
    return (*attention, *added, *mlp, *mlp_added)


def lower_output(config: DecoderConfig) -> Output:
    """Return what makes logits of the output of the last layer."""
    return Output(_norm(config, "final_norm"), config.logit_scale, config.logit_softcap)


def _norm(config: DecoderConfig, weight: str) -> NormSpec:
    centred = config.norm == "layer"
    return NormSpec(weight, config.norm_eps, centred, centred and config.norm_bias)
