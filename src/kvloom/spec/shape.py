"""The shape of a model that runs, from its DecoderConfig, so that a plan counts what the decoder computes."""

from typing import Any

from kvloom.spec.decoder import DecoderConfig, LayerConfig
from kvloom.spec.layer import Attention, Experts, FeedForward, LayerSpec, Mlp
from kvloom.spec.model import ModelSpec


def model_spec(config: DecoderConfig, name: str, dtype: str, **facts: Any) -> ModelSpec:
    """Return the shape of the model called `name` that `config` describes, with weights in `dtype`.

    `facts` are further entries of `ModelSpec`: where the config was read, how its weights are stored.
    """
    hidden = config.hidden_size
    norm = hidden * (2 if config.norm == "layer" and config.norm_bias else 1)
    positions = config.max_position * hidden if config.learned_positions else 0
    entries: dict[str, Any] = {
        "name": name,
        "family": config.family,
        "hidden_size": hidden,
        "vocab_size": config.vocab_size,
        "layers": tuple(_layer(config, layer, norm) for layer in config.layers),
        "tie_embeddings": config.tie_embeddings,
        "max_position": config.max_position,
        "dtype": dtype,
        "other_params": norm * (2 if config.embed_norm else 1) + positions,
        "table_params": positions,
        "head_bias": config.head_bias,
        "decoder": config,
    }
    return ModelSpec(**{**entries, **facts})


def _layer(config: DecoderConfig, layer: LayerConfig, norm: int) -> LayerSpec:
    """Return one layer; `norm` are the weights of one norm over the residual stream."""
    attention = Attention(
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        qkv_bias=config.attention_bias,
        out_bias=config.output_bias,
        extra_params=_qk_norm(config, layer) + (config.num_heads if config.sinks else 0),
    )
    vectors = _num_norms(config) * norm + (4 if config.activation == "xielu" else 0)
    return LayerSpec(attention, _mlp(config, layer), layer.window, norm_params=vectors)


def _qk_norm(config: DecoderConfig, layer: LayerConfig) -> int:
    """Return the weights of the norms of q and k."""
    if not config.qk_norm or config.qk_norm_kind == "unit":
        return 0
    heads = config.num_heads + config.num_kv_heads if config.qk_norm_kind == "layer" else 2
    return heads * config.head_dim * (2 if config.norm == "layer" and config.norm_bias else 1)


def _num_norms(config: DecoderConfig) -> int:
    before = 0 if not config.pre_norm else 1 if config.shared_norm else 2
    return before + (2 if config.sandwich_norm else 0)


def _mlp(config: DecoderConfig, layer: LayerConfig) -> FeedForward:
    matrices = 3 if config.gated else 2
    if not layer.routed:
        return Mlp(config.intermediate_size, matrices, up_bias=config.mlp_bias, down_bias=config.mlp_bias)
    experts = config.experts
    assert experts is not None, "a routed layer has experts"
    return Experts(
        experts.count,
        experts.per_token,
        experts.intermediate_size,
        experts.shared_size,
        matrices=matrices,
        bias=experts.bias,
        router_params=experts.count * (experts.bias + experts.selection_bias),
        shared_gate=experts.shared_gate,
    )
