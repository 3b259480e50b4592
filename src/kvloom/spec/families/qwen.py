"""Qwen2, Qwen2.5 and Qwen3: biases on q, k and v in the former, norms of q and k in the latter, optional windows."""

from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import FamilyConfig
from kvloom.spec.families.skeleton import layer_windows, nothing_implied, skeleton


def _windows(reader: ConfigReader) -> list[int | None]:
    """Windows begin at layer `max_window_layers`, and only if `use_sliding_window`."""
    if not reader.flag("use_sliding_window"):
        return [None] * reader.integer("num_hidden_layers")
    first = reader.get("max_window_layers")
    if isinstance(first, bool) or not isinstance(first, int):
        reader.wrong("max_window_layers", "a number of layers", first)
        first = 0
    return layer_windows(reader, lambda i: i >= first and reader.get("sliding_window") is not None)


def _qwen2(reader: ConfigReader) -> DecoderConfig:
    return skeleton(reader, "qwen2", _windows(reader), attention_bias=True, output_bias=False)


def _qwen3(reader: ConfigReader) -> DecoderConfig:
    return skeleton(reader, "qwen3", _windows(reader), qk_norm=True)


_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


QWEN2 = FamilyConfig(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    gguf_architecture="qwen2",
    defaults=_DEFAULTS,
    configure=_qwen2,
    from_gguf=nothing_implied,
)


QWEN3 = FamilyConfig(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    gguf_architecture="qwen3",
    defaults={**_DEFAULTS, "head_dim": 128},
    configure=_qwen3,
    from_gguf=nothing_implied,
)
