"""CompiledDecoder: the weights of a `DecoderConfig` packed once for the CPU kernels, which run whole steps."""

from collections.abc import Mapping

import torch

from kvloom.errors import InvalidInputError, UnsupportedError
from kvloom.kernels.cpu import LayerShape, LayerWeights, PackedWeight, StepDecoder
from kvloom.models.config import DecoderConfig, RopeConfig
from kvloom.models.rope import inverse_frequencies

PRODUCT_OF = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Numbers in which a model of that dtype multiplies when it is not quantised."""


def unsupported(config: DecoderConfig) -> list[str]:
    """Return every reason why the CPU kernels cannot run `config`; [] means that they can."""
    reasons = []
    if config.head_dim % 16 or config.head_dim > 384:
        reasons.append(f"head_dim is {config.head_dim}; the kernels take multiples of 16 up to 384")
    if config.activation not in ("silu", "gelu_tanh"):
        reasons.append(f"activation {config.activation!r} is not one of silu, gelu_tanh")
    return reasons


def compile_decoder(
    config: DecoderConfig, weights: Mapping[str, torch.Tensor], quantization: str | None = None
) -> StepDecoder:
    """Pack canonical `weights` of `config` and return a decoder that steps in one call.

    `quantization` None keeps the checkpoint's dtype; "int8" stores int8 weights with a scale per row and bf16 (float32
    for other dtypes) activations; "w8a8" also quantises activations. Embedding and output layer keep the dtype of the
    checkpoint in "w8a8" and are int8 in "int8". Raises UnsupportedError.
    """
    reasons = unsupported(config)
    if reasons:
        raise UnsupportedError("CPU kernels", reasons)
    dtype = weights["embed"].dtype
    native = PRODUCT_OF[dtype]
    if quantization is None:
        product = native
    elif quantization == "int8":
        product = "int8" if dtype == torch.bfloat16 else "int8_fp32"
    elif quantization == "w8a8":
        product = "w8a8"
    else:
        raise InvalidInputError(f"quantization {quantization!r} is unknown; expected int8 or w8a8")
    output_product = native if product == "w8a8" else product

    embedding = PackedWeight(weights["embed"], output_product)
    output = PackedWeight(weights["lm_head"], output_product) if "lm_head" in weights else embedding
    decoder = StepDecoder(
        embedding,
        output,
        weights["final_norm"],
        config.norm_eps,
        bf16=dtype == torch.bfloat16,
        embedding_scale=float(torch.tensor(config.embedding_scale, dtype=dtype)),
    )
    ropes: list[RopeConfig] = []  # the distinct ones; a model has one or two
    offsets = config.kv_spec(16, "fp32").lane_offset
    for index, layer in enumerate(config.layers):
        at = f"layers.{index}."
        rope = -1
        if layer.rope is not None:
            if layer.rope not in ropes:
                ropes.append(layer.rope)
                decoder.add_rope(inverse_frequencies(layer.rope, config.head_dim))
            rope = ropes.index(layer.rope)
        shape = LayerShape(
            config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim, offsets[index], layer.window or 0
        )
        decoder.add_layer(
            LayerWeights(
                shape=shape,
                qkv=PackedWeight(
                    torch.cat([weights[at + name] for name in "qkv"]),
                    product,
                    bias=torch.cat([weights[f"{at}{name}_bias"].float() for name in "qkv"])
                    if config.attention_bias
                    else None,
                ),
                o=PackedWeight(
                    weights[at + "o"].contiguous(),
                    product,
                    bias=weights[at + "o_bias"].float() if config.output_bias else None,
                ),
                gate_up=PackedWeight(torch.cat((weights[at + "gate"], weights[at + "up"])), product, gated=True),
                down=PackedWeight(weights[at + "down"].contiguous(), product),
                attention_norm=weights[at + "attn_norm"],
                mlp_norm=weights[at + "mlp_norm"],
                post_attention_norm=weights[at + "post_attn_norm"] if config.sandwich_norm else None,
                post_mlp_norm=weights[at + "post_mlp_norm"] if config.sandwich_norm else None,
                q_norm=weights[at + "q_norm"] if config.qk_norm else None,
                k_norm=weights[at + "k_norm"] if config.qk_norm else None,
                rope=rope,
                scale=config.query_scale,
                activation=config.activation,
            )
        )
    return decoder
