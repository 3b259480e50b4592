"""Decoders of plain softmax attention: dense ones, and mixtures of experts that differ in a few entries."""

from collections.abc import Sequence
from typing import Any

from kvloom.errors import InvalidInputError
from kvloom.spec.architectures.entries import (
    Config,
    Reader,
    attention,
    build,
    feed_forwards,
    head_size,
    routed_experts,
    windows,
)  # fmt: skip
from kvloom.spec.layer import Experts, FeedForward, LayerSpec, Mlp
from kvloom.spec.model import ModelSpec


def _decoder(config: Config, mlps: Sequence[FeedForward], norm: int | None = None, **facts: Any) -> ModelSpec:
    """Return layers of the same attention with two norms of `norm` weights; `facts` are those of `attention`."""
    hidden = config.number("hidden_size")
    norm = hidden if norm is None else norm
    mixer, spans = attention(config, **facts), windows(config, len(mlps))
    layers = [LayerSpec(mixer, mlp, window, norm_params=2 * norm) for mlp, window in zip(mlps, spans, strict=True)]
    return build(config, layers, hidden, other_params=norm)


def _same(config: Config, mlp: FeedForward) -> list[FeedForward]:
    return [mlp] * config.number("num_hidden_layers")


def _ministral(config: Config) -> ModelSpec:
    return _decoder(config, _same(config, Mlp(config.number("intermediate_size"))))


def _olmo(config: Config) -> ModelSpec:
    """OLMo 1: its norms have no weights."""
    bias = config.flag("attention_bias", False)
    mlps = _same(config, Mlp(config.number("intermediate_size")))
    return _decoder(config, mlps, norm=0, qkv_bias=bias, out_bias=bias)


def _arcee(config: Config) -> ModelSpec:
    bias, inner = config.flag("attention_bias", False), config.number("intermediate_size")
    mlp = Mlp(inner, 2, up_bias=config.flag("mlp_bias", False), down_bias=config.flag("mlp_bias", False))
    return _decoder(config, _same(config, mlp), qkv_bias=bias, out_bias=bias)


def _stablelm(config: Config) -> ModelSpec:
    if config.flag("qk_layernorm", False) or config.flag("use_parallel_residual", False):
        raise InvalidInputError(f"{config.name} has norms of q and k or a parallel residual, which are not understood")
    mlps = _same(config, Mlp(config.number("intermediate_size")))
    return _decoder(config, mlps, norm=2 * config.number("hidden_size"), qkv_bias=config.flag("use_qkv_bias", False))


def _opt(config: Config) -> ModelSpec:
    """OPT: learned positions with 2 rows more, LayerNorms, and an embedding that may be narrower."""
    hidden, bias = config.number("hidden_size"), config.flag("enable_bias", True)
    width = config.number("word_embed_proj_dim", default=hidden)
    norm = 2 * hidden if config.flag("layer_norm_elementwise_affine", True) else 0
    mixer = attention(config, num_kv_heads=config.number("num_attention_heads"), qkv_bias=bias, out_bias=bias)
    mlp = Mlp(config.number("ffn_dim"), 2, up_bias=bias, down_bias=bias)
    table = (config.number("max_position_embeddings") + 2) * hidden
    last = config.flag("do_layer_norm_before", True) and not config.flag("_remove_final_layer_norm", False)
    projections = 0 if width == hidden else 2 * width * hidden
    layers = [LayerSpec(mixer, mlp, norm_params=2 * norm)] * config.number("num_hidden_layers")
    return build(config, layers, hidden, tie_embeddings=config.flag("tie_word_embeddings", True), table_params=table,
                 embedding_width=width, other_params=table + projections + (norm if last else 0))  # fmt: skip


def _gptj(config: Config) -> ModelSpec:
    """GPT-J: attention and MLP read one LayerNorm, and the output head has a bias."""
    hidden, heads = config.number("n_embd", "hidden_size"), config.number("n_head", "num_attention_heads")
    named = Config({**config.fields, "hidden_size": hidden, "num_attention_heads": heads}, config.name)
    mlp = Mlp(config.number("n_inner", default=4 * hidden), 2, up_bias=True, down_bias=True)
    layers = [LayerSpec(attention(named), mlp, norm_params=2 * hidden)] * config.number("n_layer", "num_hidden_layers")
    return build(config, layers, hidden, other_params=2 * hidden, head_bias=True)


def _glm4_moe(config: Config) -> ModelSpec:
    norms = 2 * head_size(config) if config.flag("use_qk_norm", False) else 0
    mlps = feed_forwards(config, Mlp(config.number("intermediate_size")), routed_experts(config))
    return _decoder(config, mlps, qkv_bias=config.flag("attention_bias", False), extra_params=norms)


def _exaone_moe(config: Config) -> ModelSpec:
    experts, narrow = config.number("num_experts"), config.number("moe_intermediate_size")
    shared = narrow * config.count("num_shared_experts")
    routed = Experts(experts, config.number("num_experts_per_tok"), narrow, shared, router_params=experts)
    mlps = feed_forwards(config, Mlp(config.number("intermediate_size")), routed)
    return _decoder(config, mlps, extra_params=2 * head_size(config))


def _minimax_m2(config: Config) -> ModelSpec:
    """MiniMax-M2: norms over all heads of q and of k at once."""
    experts = config.number("num_local_experts")
    routed = Experts(experts, config.number("num_experts_per_tok"), config.number("intermediate_size"),
                     router_params=experts)  # fmt: skip
    heads = config.number("num_attention_heads") + config.number("num_key_value_heads")
    return _decoder(config, _same(config, routed), extra_params=heads * head_size(config))


def _ernie_moe(config: Config) -> ModelSpec:
    """ERNIE 4.5: experts in every `moe_layer_interval`-th layer from a first to a last one."""
    experts, narrow = config.number("moe_num_experts"), config.number("moe_intermediate_size")
    bias, count = config.flag("use_bias", False), config.number("num_hidden_layers")
    routed = Experts(experts, config.number("moe_k"), narrow, narrow * config.count("moe_num_shared_experts"),
                     router_params=experts)  # fmt: skip
    dense = Mlp(config.number("intermediate_size"), up_bias=bias, down_bias=bias)
    first, step = config.count("moe_layer_start_index"), config.number("moe_layer_interval", default=1)
    last = config.fields.get("moe_layer_end_index")
    end = count - 1 if last in (None, -1) else config.count("moe_layer_end_index")
    mlps = [routed if first <= i <= end and (i + 1) % step == 0 else dense for i in range(count)]
    return _decoder(config, mlps, qkv_bias=bias, out_bias=bias)


def _hunyuan_moe(config: Config) -> ModelSpec:
    """Hunyuan: one shared expert of the width of a routed one; counts may be lists of one number a layer."""
    inner = config.number("intermediate_size")
    experts = Experts(_alike(config, "num_experts"), _alike(config, "moe_topk"), inner, inner)
    return _decoder(config, _same(config, experts), extra_params=2 * head_size(config))


def _alike(config: Config, key: str) -> int:
    """Return the number `key`, which a list may repeat for every layer."""
    value = config.fields.get(key)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise InvalidInputError(f"{key} of {config.name} is {value!r}; it must be one number for all layers")
        return Config({key: value[0]}, config.name).number(key)
    return config.number(key)


def _granite_shared(config: Config) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    routed = Experts(config.number("num_local_experts"), config.number("num_experts_per_tok"),
                     config.number("intermediate_size"), config.count("shared_intermediate_size"))  # fmt: skip
    return _decoder(config, _same(config, routed), qkv_bias=bias, out_bias=bias)


SOFTMAX_READERS: dict[str, Reader] = {
    "arcee": _arcee,
    "ernie4_5_moe": _ernie_moe,
    "exaone_moe": _exaone_moe,
    "glm4_moe": _glm4_moe,
    "gptj": _gptj,
    "granitemoeshared": _granite_shared,
    "hunyuan_v1_moe": _hunyuan_moe,
    "minimax_m2": _minimax_m2,
    "ministral": _ministral,
    "ministral3": _ministral,
    "olmo": _olmo,
    "opt": _opt,
    "stablelm": _stablelm,
}
