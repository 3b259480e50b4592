"""Hybrids of attention with linear attention or short convolutions: Qwen3-Next, Qwen3.5, MiniMax, LFM2."""

from kvloom.errors import InvalidInputError
from kvloom.spec.architectures.entries import Config, Reader, attention, build, head_size
from kvloom.spec.layer import Experts, FeedForward, LayerSpec, Mlp, Recurrent
from kvloom.spec.model import ModelSpec


def _routed(config: Config, layer: int) -> Experts | None:
    """Return the experts of a layer of a Qwen mixture, or None where the layer is dense."""
    step = config.number("decoder_sparse_step", default=1)
    if layer in (config.fields.get("mlp_only_layers") or []) or (layer + 1) % step:
        return None
    shared = config.optional("shared_expert_intermediate_size")
    return Experts(config.number("num_experts", "num_local_experts"), config.number("num_experts_per_tok"),
                   config.number("moe_intermediate_size"), shared or 0, shared_gate=shared is not None)


def _mlp(config: Config, layer: int, kind: str) -> FeedForward:
    """Return the MLP of a layer: experts in all of Qwen3.5-MoE, in none of Qwen3.5."""
    routed = None if kind == "qwen3_5_text" else _routed(config, layer)
    return routed or Mlp(config.number("intermediate_size"))


def _qwen3_next(config: Config) -> ModelSpec:
    hidden, count = config.number("hidden_size"), config.number("num_hidden_layers")
    types = config.layer_types(count, ("linear_attention", "full_attention")) or [
        "full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(count)
    ]
    full = attention(config, gated=True, extra_params=2 * config.number("head_dim", default=256))
    kernel = config.number("linear_conv_kernel_dim", default=4)
    k_dim, v_dim = config.number("linear_key_head_dim"), config.number("linear_value_head_dim")
    v_heads = config.number("linear_num_value_heads")
    keys, values = k_dim * config.number("linear_num_key_heads"), v_dim * v_heads
    channels = 2 * keys + values
    linear = Recurrent(
        state_elements=v_heads * k_dim * v_dim + channels * kernel,
        matrix_params=hidden * (2 * keys + 2 * values + 2 * v_heads) + values * hidden,
        other_params=channels * kernel + 2 * v_heads + v_dim,
    )
    kind_of = config.fields["model_type"]
    layers = [
        LayerSpec(full if kind == "full_attention" else linear, _mlp(config, i, kind_of), norm_params=2 * hidden)
        for i, kind in enumerate(types)
    ]
    return build(config, layers, hidden)


def _minimax(config: Config) -> ModelSpec:
    """MiniMax-01: lightning attention keeps a matrix of head size by head size for each head."""
    hidden, count = config.number("hidden_size"), config.number("num_hidden_layers")
    types = config.layer_types(count, ("linear_attention", "full_attention")) or _numbered(config, count)
    full = attention(config)
    inner = full.num_heads * full.head_dim
    linear = Recurrent(full.num_heads * full.head_dim**2, 5 * hidden * inner, inner)
    experts = Experts(config.number("num_local_experts"), config.number("num_experts_per_tok"),
                      config.number("intermediate_size"))  # fmt: skip
    return build(config, [LayerSpec(full if kind == "full_attention" else linear, experts, norm_params=2 * hidden)
                          for kind in types], hidden)  # fmt: skip


def _numbered(config: Config, count: int) -> list[str]:
    """Return the types of `attn_type_list`, 1 for softmax attention, or the alternation of the architecture."""
    listed = config.fields.get("attn_type_list")
    if listed is None:
        return ["linear_attention" if i % 2 else "full_attention" for i in range(count)]
    if not isinstance(listed, list) or len(listed) != count:
        raise InvalidInputError(f"attn_type_list of {config.name} must have a number for each of {count} layers")
    return ["full_attention" if kind == 1 else "linear_attention" for kind in listed]


def _lfm2(config: Config) -> ModelSpec:
    """LFM2: a short convolution over the hidden size in most layers, whose newest inputs are its state."""
    hidden, count = config.number("hidden_size"), config.number("num_hidden_layers")
    chosen = config.fields.get("full_attn_idxs")
    types = config.layer_types(count, ("conv", "short_conv", "linear_attention", "full_attention")) or [
        "full_attention" if chosen is None or i in chosen else "conv" for i in range(count)
    ]
    full = attention(config, extra_params=2 * head_size(config))
    kernel, bias = config.number("conv_L_cache", default=3), config.flag("conv_bias", False)
    conv = Recurrent(hidden * kernel, 4 * hidden * hidden, hidden * kernel + (5 * hidden if bias else 0))
    dense = Mlp(_lfm2_width(config))
    first = config.count("num_dense_layers") if config.fields["model_type"] == "lfm2_moe" else count
    layers: list[LayerSpec] = []
    for i, kind in enumerate(types):
        mlp: FeedForward = dense if i < first else _lfm2_experts(config)
        layers.append(LayerSpec(full if kind == "full_attention" else conv, mlp, norm_params=2 * hidden))
    return build(config, layers, hidden, tie_embeddings=config.flag("tie_word_embeddings", True))


def _lfm2_width(config: Config) -> int:
    width = config.number("block_ff_dim", "intermediate_size")
    if config.fields["model_type"] == "lfm2_moe" or not config.flag("block_auto_adjust_ff_dim", True):
        return width
    step, factor = config.number("block_multiple_of", default=256), config.fields.get("block_ffn_dim_multiplier") or 1.0
    return -(-int(factor * int(2 * width / 3)) // step) * step


def _lfm2_experts(config: Config) -> Experts:
    experts = config.number("num_experts")
    return Experts(experts, config.number("num_experts_per_tok"), config.number("moe_intermediate_size"),
                   router_params=experts if config.flag("use_expert_bias", True) else 0)  # fmt: skip


DELTA_READERS: dict[str, Reader] = {
    "lfm2": _lfm2,
    "lfm2_moe": _lfm2,
    "minimax": _minimax,
    "qwen3_5_moe_text": _qwen3_next,
    "qwen3_5_text": _qwen3_next,
    "qwen3_next": _qwen3_next,
}
