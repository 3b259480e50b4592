"""Hybrids of attention and a linear recurrence (gated delta rule): Qwen3-Next."""

from kvloom.spec.architectures.entries import Config, Reader, attention, build
from kvloom.spec.layer import Experts, LayerSpec, Mlp, Recurrent
from kvloom.spec.model import ModelSpec


def _routed(config: Config, layer: int) -> Experts | None:
    """Return the experts of a layer of a Qwen mixture, or None where the layer is dense."""
    step = config.number("decoder_sparse_step", default=1)
    if layer in (config.fields.get("mlp_only_layers") or []) or (layer + 1) % step:
        return None
    shared = config.optional("shared_expert_intermediate_size")
    return Experts(config.number("num_experts", "num_local_experts"), config.number("num_experts_per_tok"),
                   config.number("moe_intermediate_size"), shared or 0, shared_gate=shared is not None)


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
    dense = Mlp(config.number("intermediate_size"))
    layers = [
        LayerSpec(full if kind == "full_attention" else linear, _routed(config, i) or dense, norm_params=2 * hidden)
        for i, kind in enumerate(types)
    ]
    return build(config, layers, hidden)


DELTA_READERS: dict[str, Reader] = {"qwen3_next": _qwen3_next}
