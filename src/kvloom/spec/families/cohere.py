"""Command R and Command R7B: attention and MLP behind one LayerNorm without bias, in parallel; logits are scaled."""

from dataclasses import replace
from typing import Any

from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import FamilyConfig
from kvloom.spec.families.skeleton import layer_windows, nothing_implied, skeleton


def _parallel(reader: ConfigReader, family: str, windows: list[int | None], **changes: Any) -> DecoderConfig:
    return skeleton(
        reader,
        family,
        windows,
        norm="layer",
        norm_eps=reader.number("layer_norm_eps"),
        parallel_residual=True,
        shared_norm=True,
        logit_scale=reader.number("logit_scale", 1.0),
        **changes,
    )


def _cohere(reader: ConfigReader) -> DecoderConfig:
    reader.refuse_if_set("use_qk_norm")
    return _parallel(reader, "cohere", [None] * reader.integer("num_hidden_layers"))


def _cohere2(reader: ConfigReader) -> DecoderConfig:
    """Every fourth layer attends to all tokens and has no positions; the others have a window."""
    pattern = reader.integer("sliding_window_pattern", 4)
    config = _parallel(reader, "cohere2", layer_windows(reader, lambda i: bool((i + 1) % pattern)))
    layers = (layer if layer.window is not None else replace(layer, rope=None) for layer in config.layers)
    return replace(config, layers=tuple(layers))


_DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
    "bos_token_id": 5,
    "eos_token_id": 255001,
}

COHERE = FamilyConfig(
    name="cohere",
    architectures=("CohereForCausalLM",),
    model_types=("cohere",),
    gguf_architecture=None,
    defaults={**_DEFAULTS, "rope_theta": 500000.0},
    configure=_cohere,
    from_gguf=nothing_implied,
)

COHERE2 = FamilyConfig(
    name="cohere2",
    architectures=("Cohere2ForCausalLM",),
    model_types=("cohere2",),
    gguf_architecture=None,
    defaults={**_DEFAULTS, "rope_theta": 10000.0, "sliding_window": 4096},
    configure=_cohere2,
    from_gguf=nothing_implied,
)
