"""Llama 4, text: attention in chunks, layers without positions whose queries grow, experts behind sigmoid scores."""

from dataclasses import replace
from typing import Any

from kvloom.spec.decoder import DecoderConfig, ExpertsConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import FamilyConfig
from kvloom.spec.families.routed import checked
from kvloom.spec.families.skeleton import nothing_implied, skeleton
from kvloom.spec.families.smollm3 import rotates


def _chunks(reader: ConfigReader, turned: list[bool]) -> list[int | None]:
    """Return the tokens of a chunk of each layer, None where a layer sees all: by `layer_types` or as they rotate."""
    kinds = ("full_attention", "chunked_attention")
    size = None if reader.get("attention_chunk_size") is None else reader.integer("attention_chunk_size")
    types: Any = reader.get("layer_types")
    if types is None:
        types = [kinds[turns and size is not None] for turns in turned]
    if not isinstance(types, list) or len(types) != len(turned):
        reader.wrong("layer_types", f"a list of {len(turned)} names", types)
        return [None] * len(turned)
    for unknown in sorted({str(kind) for kind in types} - set(kinds)):
        reader.refuse(f"layers of type {unknown!r}")
    if size is None and kinds[1] in types:
        reader.wrong("attention_chunk_size", "a positive integer", None)
    return [size if kind == kinds[1] else None for kind in types]


def _routed(reader: ConfigReader, count: int) -> list[bool]:
    """Return for each layer whether it has experts: those of `moe_layers`, else the last of every so many."""
    step, given = reader.integer("interleave_moe_layer_step"), reader.get("moe_layers")
    if given is None:
        return [(i + 1) % step == 0 for i in range(count)]
    if not isinstance(given, list):
        reader.wrong("moe_layers", "a list of layers", given)
        return [True] * count
    return [i in given for i in range(count)]


def _configure(reader: ConfigReader) -> DecoderConfig:
    turned = rotates(reader)
    chunks = _chunks(reader, turned)
    width = reader.integer("intermediate_size")
    experts = ExpertsConfig(
        reader.integer("num_local_experts"),
        reader.integer("num_experts_per_tok"),
        width,
        normalise=False,
        sigmoid=True,
        shared_size=width,
        scale_input=True,
    )
    tuned = bool(reader.get("attn_temperature_tuning"))
    config = skeleton(
        reader,
        "llama4",
        chunks,
        intermediate_size=reader.integer("intermediate_size_mlp"),
        mlp_bias=False,
        qk_norm=reader.flag("use_qk_norm"),
        qk_norm_kind="unit",
        temperature=(reader.number("floor_scale"), reader.number("attn_scale")) if tuned else None,
        experts=checked(reader, experts),
    )
    layers = (
        replace(layer, rope=layer.rope if turns else None, routed=routed, chunked=layer.window is not None)
        for layer, turns, routed in zip(config.layers, turned, _routed(reader, len(chunks)), strict=True)
    )
    return replace(config, layers=tuple(layers))


LLAMA4 = FamilyConfig(
    name="llama4",
    architectures=("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
    model_types=("llama4_text", "llama4"),
    gguf_architecture=None,
    defaults={
        "vocab_size": 202048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    configure=_configure,
    from_gguf=nothing_implied,
)
