"""SmolLM3: Llama where every fourth layer has no position encoding."""

from dataclasses import replace

from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import FamilyConfig
from kvloom.spec.families.skeleton import layer_windows, nothing_implied, skeleton


def rotates(reader: ConfigReader) -> list[bool]:
    """Return for each layer whether it has a rotary embedding: 1 in `no_rope_layers` means that it has one."""
    count = reader.integer("num_hidden_layers")
    given = reader.get("no_rope_layers") or None
    if given is None:
        interval = reader.integer("no_rope_layer_interval")
        return [(i + 1) % interval != 0 for i in range(count)]
    if not isinstance(given, list) or len(given) != count or any(entry not in (0, 1) for entry in given):
        reader.wrong("no_rope_layers", f"a list of {count} zeros and ones", given)
        return [True] * count
    return [bool(entry) for entry in given]


def _configure(reader: ConfigReader) -> DecoderConfig:
    turned = rotates(reader)
    windowed = reader.flag("use_sliding_window") and reader.get("sliding_window") is not None
    config = skeleton(reader, "smollm3", layer_windows(reader, lambda i: windowed and not turned[i]))
    pairs = zip(config.layers, turned, strict=True)
    return replace(config, layers=tuple(layer if yes else replace(layer, rope=None) for layer, yes in pairs))


SMOLLM3 = FamilyConfig(
    name="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    model_types=("smollm3",),
    gguf_architecture="smollm3",
    defaults={
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 2e6,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    configure=_configure,
    from_gguf=nothing_implied,
)
