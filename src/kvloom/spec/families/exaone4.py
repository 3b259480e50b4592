"""EXAONE 4: norms after each block only; where most layers have a window, the others have no positions."""

from dataclasses import replace

from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import FamilyConfig
from kvloom.spec.families.skeleton import layer_windows, nothing_implied, skeleton


def _windows(reader: ConfigReader) -> list[int | None]:
    """A pattern is a number N, of which every Nth layer has no window, or letters of local and global layers."""
    if reader.get("sliding_window") is None:
        return [None] * reader.integer("num_hidden_layers")
    pattern = reader.get("sliding_window_pattern")
    if isinstance(pattern, str) and pattern and not set(pattern) - set("LG"):
        last = reader.integer("num_hidden_layers") - 1
        return layer_windows(reader, lambda i: pattern[i % len(pattern)] == "L" and i != last)
    every = reader.integer("sliding_window_pattern")
    return layer_windows(reader, lambda i: bool((i + 1) % every))


def _configure(reader: ConfigReader) -> DecoderConfig:
    windows = _windows(reader)
    config = skeleton(
        reader,
        "exaone4",
        windows,
        attention_bias=False,
        output_bias=False,
        qk_norm=True,
        pre_norm=False,
        sandwich_norm=True,
    )
    if reader.get("sliding_window") is None:
        return config
    layers = (layer if layer.window is not None else replace(layer, rope=None) for layer in config.layers)
    return replace(config, layers=tuple(layers))


EXAONE4 = FamilyConfig(
    name="exaone4",
    architectures=("Exaone4ForCausalLM",),
    model_types=("exaone4",),
    gguf_architecture=None,
    defaults={
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    configure=_configure,
    from_gguf=nothing_implied,
)
