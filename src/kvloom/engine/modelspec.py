"""ModelSpec of a model that was loaded: what the planner's formulas need to know of it. Torch-free."""

from kvloom.spec.decoder import DecoderConfig, LayerConfig
from kvloom.spec.layer import Attention, Experts, LayerSpec, Mlp
from kvloom.spec.model import ModelSpec


def model_spec(config: DecoderConfig, name: str, dtype: str, weight_bytes: int) -> ModelSpec:
    """Return the shape of a loaded model whose weights take `weight_bytes`, whatever they are stored in.

    Vectors (norms, biases) are in `weight_bytes` alone.
    """
    return ModelSpec(
        name=name,
        family=config.family,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        layers=tuple(_layer(config, layer) for layer in config.layers),
        tie_embeddings=config.tie_embeddings,
        max_position=config.max_position,
        dtype=dtype,
        weight_bytes=weight_bytes,
        source="the loaded model",
    )


def _layer(config: DecoderConfig, layer: LayerConfig) -> LayerSpec:
    matrices = 3 if config.gated else 2
    mlp: Mlp | Experts = Mlp(config.intermediate_size, matrices)
    if layer.routed:
        assert config.experts is not None
        experts = config.experts
        mlp = Experts(experts.count, experts.per_token, experts.intermediate_size, matrices=matrices)
    attention = Attention(config.num_heads, config.num_kv_heads, config.head_dim)
    return LayerSpec(attention, mlp, layer.window)
