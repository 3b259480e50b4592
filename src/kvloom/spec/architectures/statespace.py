"""State-space models and their hybrids with attention: Mamba, Mamba-2, Jamba, Falcon-H1, Granite 4, Bamba, Nemotron-H.

A layer keeps a state and the newest inputs of its convolution, as many as its kernel is wide.
"""

from kvloom.errors import InvalidInputError
from kvloom.spec.architectures.entries import Config, Reader, attention, build
from kvloom.spec.layer import Attention, Experts, FeedForward, LayerSpec, Mlp, Recurrent
from kvloom.spec.model import ModelSpec

_NO_MIXER = Recurrent(0, 0, 0)


def _selective(hidden: int, inner: int, state: int, kernel: int, rank: int, bias: bool, norms: int = 0) -> Recurrent:
    """Return a Mamba mixer (arXiv:2312.00752) of `inner` channels with `state` numbers each, `norms` beside it."""
    return Recurrent(
        state_elements=inner * (state + kernel),
        matrix_params=3 * hidden * inner + inner * (rank + 2 * state) + rank * inner,
        other_params=inner * (kernel + 1 + 1 + state + 1) + (2 * inner + hidden if bias else 0) + norms,
    )


def _heads(hidden: int, heads: int, width: int, state: int, groups: int, kernel: int, *, conv_bias: bool = True,
           bias: bool = False, norm: bool = True) -> Recurrent:  # fmt: skip
    """Return a Mamba-2 mixer (arXiv:2405.21060) of `heads` heads with `width` x `state` numbers each."""
    inner = heads * width
    channels = inner + 2 * groups * state
    made = inner + channels + heads
    return Recurrent(
        state_elements=inner * state + channels * kernel,
        matrix_params=hidden * made + inner * hidden,
        other_params=channels * (kernel + conv_bias) + 3 * heads + inner * norm + (made + hidden if bias else 0),
    )


def _step_rank(config: Config, key: str) -> int:
    """Return the rank of the step sizes, "auto" a sixteenth of the hidden size."""
    if config.fields.get(key) in (None, "auto"):
        return -(-config.number("hidden_size") // 16)
    return config.number(key)


def _mamba(config: Config) -> ModelSpec:
    hidden, count = config.number("hidden_size"), config.number("num_hidden_layers")
    inner = config.number("intermediate_size", default=config.number("expand", default=2) * hidden)
    state, kernel = config.number("state_size", default=16), config.number("conv_kernel", default=4)
    rank = _step_rank(config, "time_step_rank")
    mixer = _selective(hidden, inner, state, kernel, rank, config.flag("use_bias", False))
    layers = [LayerSpec(mixer, None, norm_params=hidden) for _ in range(count)]
    return build(config, layers, hidden, tie_embeddings=config.flag("tie_word_embeddings", True))


def _mamba2(config: Config) -> ModelSpec:
    hidden = config.number("hidden_size")
    mixer = _heads(
        hidden, config.number("num_heads"), config.number("head_dim"), config.number("state_size"),
        config.number("n_groups"), config.number("conv_kernel", default=4),
        conv_bias=config.flag("use_conv_bias", True), bias=config.flag("use_bias", False),
    )  # fmt: skip
    return build(config, [LayerSpec(mixer, None, norm_params=hidden)] * config.number("num_hidden_layers"), hidden)


def _hybrid_heads(config: Config, norm: bool = True, bias: str = "mamba_proj_bias") -> Recurrent:
    """Return the Mamba-2 mixer of the entries `mamba_*`."""
    hidden, heads = config.number("hidden_size"), config.number("mamba_n_heads")
    width = config.fields.get("mamba_d_head")
    if width in (None, "auto"):
        inner = config.number("mamba_d_ssm", default=config.number("mamba_expand", default=2) * hidden)
        width = inner // heads
    else:
        width = config.number("mamba_d_head")
    return _heads(
        hidden, heads, width, config.number("mamba_d_state"), config.number("mamba_n_groups", default=1),
        config.number("mamba_d_conv", default=4), conv_bias=config.flag("mamba_conv_bias", True),
        bias=config.flag(bias, False), norm=norm,
    )  # fmt: skip


def _falcon_h1(config: Config) -> ModelSpec:
    hidden, bias = config.number("hidden_size"), config.flag("mlp_bias", False)
    mixer = attention(config, qkv_bias=config.flag("attention_bias", False))
    state = _hybrid_heads(config, norm=config.flag("mamba_rms_norm", False))
    mlp = Mlp(config.number("intermediate_size"), up_bias=bias, down_bias=bias)
    layer = LayerSpec(mixer, mlp, norm_params=2 * hidden, beside=state)
    return build(config, [layer] * config.number("num_hidden_layers"), hidden)


def _mixers(mixer: Attention, state: Recurrent, attends: list[bool]) -> list[Attention | Recurrent]:
    return [mixer if yes else state for yes in attends]


def _attending(config: Config) -> list[bool]:
    """Return which layers attend, by their names."""
    count, attends = config.number("num_hidden_layers"), ("full_attention", "attention")
    types = config.layer_types(count, (*attends, "linear_attention", "mamba"), "layer_types", "layers_block_type")
    return [kind in attends for kind in types or ["mamba"] * count]


def _granite_hybrid(config: Config) -> ModelSpec:
    hidden, bias = config.number("hidden_size"), config.flag("attention_bias", False)
    shared, count = config.number("shared_intermediate_size"), config.count("num_local_experts")
    mlp: FeedForward = Mlp(shared)
    if count:
        mlp = Experts(count, config.number("num_experts_per_tok"), config.number("intermediate_size"), shared)
    mixers = _mixers(attention(config, qkv_bias=bias, out_bias=bias), _hybrid_heads(config), _attending(config))
    return build(config, [LayerSpec(mixer, mlp, norm_params=2 * hidden) for mixer in mixers], hidden)


def _bamba(config: Config) -> ModelSpec:
    hidden, bias = config.number("hidden_size"), config.flag("attention_bias", False)
    chosen = config.fields.get("attn_layer_indices") or []
    attends = [i in chosen for i in range(config.number("num_hidden_layers"))]
    mixers = _mixers(attention(config, qkv_bias=bias, out_bias=bias), _hybrid_heads(config), attends)
    mlp = Mlp(config.number("intermediate_size"))
    return build(config, [LayerSpec(mixer, mlp, norm_params=2 * hidden) for mixer in mixers], hidden)


def _jamba(config: Config) -> ModelSpec:
    """Jamba: attention in every `attn_layer_period`-th layer, experts in every `expert_layer_period`-th."""
    hidden, state = config.number("hidden_size"), config.number("mamba_d_state")
    rank = _step_rank(config, "mamba_dt_rank")
    inner = config.number("mamba_expand", default=2) * hidden
    mamba = _selective(hidden, inner, state, config.number("mamba_d_conv", default=4), rank,
                       config.flag("mamba_proj_bias", False), norms=rank + 2 * state)  # fmt: skip
    mixer, dense, count = attention(config), Mlp(config.number("intermediate_size")), config.number("num_experts")
    routed = Experts(count, config.number("num_experts_per_tok"), config.number("intermediate_size"))
    layers: list[LayerSpec] = []
    for i in range(config.number("num_hidden_layers")):
        attends = i % config.number("attn_layer_period") == config.count("attn_layer_offset")
        routes = count > 1 and i % config.number("expert_layer_period") == config.count("expert_layer_offset")
        layers.append(LayerSpec(mixer if attends else mamba, routed if routes else dense, norm_params=2 * hidden))
    return build(config, layers, hidden)


def _nemotron_h(config: Config) -> ModelSpec:
    """Nemotron-H: each block is attention, Mamba-2, an MLP or experts alone, by `hybrid_override_pattern` or names."""
    if config.fields.get("moe_latent_size") is not None:
        raise InvalidInputError(f"moe_latent_size of {config.name} is not understood; it must be null")
    hidden, names = config.number("hidden_size"), {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
    types = config.fields.get("layers_block_type") or config.fields.get("hybrid_override_pattern")
    bias, narrow = config.flag("mlp_bias", False), config.number("moe_intermediate_size", default=1)
    mixer = attention(config, qkv_bias=(with_bias := config.flag("attention_bias", False)), out_bias=with_bias)
    mamba = _heads(
        hidden, config.number("mamba_num_heads"), config.number("mamba_head_dim"), config.number("ssm_state_size"),
        config.number("n_groups", "mamba_n_groups"), config.number("conv_kernel", default=4),
        conv_bias=config.flag("use_conv_bias", True), bias=config.flag("mamba_proj_bias", False),
    )  # fmt: skip
    mlp = Mlp(config.number("intermediate_size"), 2, up_bias=bias, down_bias=bias)
    blocks = {
        "mamba": LayerSpec(mamba, None, norm_params=hidden),
        "attention": LayerSpec(mixer, None, norm_params=hidden),
        "mlp": LayerSpec(_NO_MIXER, mlp, norm_params=hidden),
    }
    if config.count("n_routed_experts"):
        experts = config.number("n_routed_experts")
        shared = config.number("moe_shared_expert_intermediate_size", default=narrow)
        routed = Experts(experts, config.number("num_experts_per_tok"), narrow, shared, 2, router_params=experts)
        blocks["moe"] = LayerSpec(_NO_MIXER, routed, norm_params=hidden)
    blocks |= {"linear_attention": blocks["mamba"], "full_attention": blocks["attention"]}
    found = [names.get(kind, kind) for kind in types or []]
    unknown = sorted({str(kind) for kind in found} - set(blocks))
    if unknown or not found:
        what = f"has the unknown {', '.join(unknown)}" if unknown else "is missing"
        raise InvalidInputError(f"layers_block_type of {config.name} {what}; known: {', '.join(blocks)}")
    return build(config, [blocks[kind] for kind in found], hidden)


STATE_READERS: dict[str, Reader] = {
    "bamba": _bamba,
    "falcon_h1": _falcon_h1,
    "falcon_mamba": _mamba,
    "granitemoehybrid": _granite_hybrid,
    "jamba": _jamba,
    "mamba": _mamba,
    "mamba2": _mamba2,
    "nemotron_h": _nemotron_h,
}
