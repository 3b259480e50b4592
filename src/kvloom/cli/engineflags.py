"""Flags of the engine: the model's precision and length, and the memory of its KV cache. Names as in vLLM."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import click

from kvloom.cli.command import Flag
from kvloom.cli.values import ByteCount, JsonObject, Text, TokenCount
from kvloom.engine.config import BACKENDS, DTYPES, KV_CACHE_DTYPES, MAX_KV_BYTES_BY_DEFAULT, EngineConfig
from kvloom.spec.packing import QUANTIZATIONS
from kvloom.units import format_bytes

DEFAULT_MODEL = "smollm2"
"""Catalogue name of the default model."""

MODEL_FLAG = Flag(
    ["--model"],
    section="Model and memory",
    metavar="MODEL",
    default=DEFAULT_MODEL,
    help="Same as MODEL: a Hugging Face id, a folder with safetensors, a .gguf file or a catalogue name.",
)

_DEFAULTS = {field.name: field.default for field in fields(EngineConfig)}


def _flag(name: str, help: str, *aliases: str, **attributes: Any) -> Flag:
    """Return the flag of one field of `EngineConfig`, with the field's default unless `attributes` has another."""
    field = name.removeprefix("--").split("/")[0].replace("-", "_")
    attributes.setdefault("default", _DEFAULTS[field])
    return Flag([name, *aliases], section="Model and memory", help=help, **attributes)


ENGINE_FLAGS = [
    Flag(
        ["--tokenizer"],
        section="Model and memory",
        metavar="MODEL",
        help="Tokenizer of this model instead, in any form that MODEL has.",
    ),
    Flag(
        ["--hf-overrides"],
        section="Model and memory",
        type=JsonObject(),
        metavar="JSON",
        help="Entries that replace those of the model's config.json, e.g. another rope_scaling.",
    ),
    _flag(
        "--dtype",
        "Of weights, activations and KV cache; auto is bfloat16 where the CPU computes in it, else float32.",
        type=click.Choice(DTYPES),
    ),
    _flag(
        "--max-model-len",
        "Longest prompt plus answer; 4k is 4000, 4K is 4096. auto: the model's context length, if the memory holds it.",
        "--context-length",
        type=TokenCount(),
        metavar="TOKENS",
        default="auto",
    ),
    _flag(
        "--kv-cache-memory-bytes",
        "Memory of the KV cache, e.g. 512MiB or 2GB. Without it: what --max-num-seqs sequences can use, "
        f"within half the free memory and {format_bytes(MAX_KV_BYTES_BY_DEFAULT)}.",
        type=ByteCount(),
        metavar="BYTES",
    ),
    _flag("--block-size", "Tokens of one KV head in a block of the cache.", type=int, metavar="TOKENS"),
    _flag(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        "Reuse the KV of a prompt's beginning that was computed before.",
    ),
    _flag("--max-num-seqs", "Most sequences that run at once.", type=int),
    _flag(
        "--max-num-batched-tokens",
        "Most tokens in one step; longer prompts are computed in chunks of it.",
        type=TokenCount(),
        metavar="TOKENS",
    ),
    _flag(
        "--kv-policy",
        "Eviction policy of requests that name none, e.g. 'snapkv(budget=1024)+adaptive'; full evicts nothing.",
        type=Text(),
        metavar="POLICY",
    ),
    _flag(
        "--kv-cache-dtype",
        "Store of complete blocks of K and V: auto keeps --dtype; int8 and fp8_e4m3 (fp8) have 8 bits and a scale for "
        "each token and head.",
        type=click.Choice(KV_CACHE_DTYPES),
    ),
    _flag(
        "--backend",
        "cpu: compiled kernels; eager: torch's operations; auto: cpu where it can run the model.",
        type=click.Choice(BACKENDS),
    ),
    _flag(
        "--quantization",
        "Weights in 8 bits (int8), in 4 (int4), or weights and activations in 8 (w8a8). Without it: in --dtype.",
        type=click.Choice(QUANTIZATIONS),
    ),
    _flag(
        "--threads",
        "Threads that compute the model. Without it: OMP_NUM_THREADS, or as many as there are cores to use.",
        type=int,
    ),
]
"""Flags of the arguments of `LLM` other than the model."""


def engine_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `LLM` among `values`; flags that were not given are left to its defaults."""
    names = {str(flag.name) for flag in ENGINE_FLAGS}
    return {name: value for name, value in values.items() if name in names and value is not None}
