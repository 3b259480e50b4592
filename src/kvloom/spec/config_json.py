"""config.json -> ModelSpec. Unknown entries that change the shape are refused, never guessed."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvloom.errors import CheckpointError, InvalidInputError, UnsupportedError
from kvloom.registry import near_copy
from kvloom.spec.architectures import ARCHITECTURES
from kvloom.spec.architectures.entries import Config
from kvloom.spec.families import FAMILY_CONFIGS, family_of_type
from kvloom.spec.model import DTYPE_BYTES, ModelSpec, WeightFormat
from kvloom.spec.shape import model_spec
from kvloom.spec.text_config import text_config

_QUANTISED = {
    "mxfp4": WeightFormat("mxfp4", 4.25, "experts"),
    "fp8": WeightFormat("fp8", 8 + 32 / (128 * 128), "layers"),
}
"""Storage of pre-quantised checkpoints: mxfp4 has a scale byte per 32 weights, block fp8 one float per 128 x 128."""

_DESCRIBE = (
    "or describe its decoder in place of the model: --layers N --heads N, with --kv-heads, --head-dim, --hidden, "
    "--intermediate and --vocab, --window and --global-every, --kv-rank and --rope-dim, --experts, --recurrent-every"
)


def spec_from_config(config: Mapping[str, Any], name: str, source: str = "") -> ModelSpec:
    """Return the shape that a parsed config.json describes, from the config of its family, else from a reader.

    Raises `UnsupportedError` for an architecture that is not understood, `CheckpointError` and `InvalidInputError` for
    values that are malformed or contradict each other.
    """
    family = config.get("model_type")
    if not isinstance(family, str):
        raise InvalidInputError(f"the config of {name} names no model_type; is it the config.json of a language model?")
    notes: list[str] = []
    inner = text_config(config, notes)
    stored = inner.get("dtype") or inner.get("torch_dtype")
    if stored is None:
        notes.append("the config names no dtype; bfloat16 assumed")
    dtype = str(stored or "bfloat16").removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise InvalidInputError(f"the config of {name} has dtype {dtype!r}; known: {', '.join(DTYPE_BYTES)}")
    spec = _shape(inner, name, dtype)
    if inner is not config:
        runs = family_of_type(family) is not None
        spec = replace(spec, family=family)
        if not runs:
            spec = replace(spec, decoder=None, refused=())
    return replace(spec, source=source, weight_format=_weight_format(inner, name), notes=(*spec.notes, *notes))


def _shape(config: Mapping[str, Any], name: str, dtype: str) -> ModelSpec:
    """Return the shape by the family's config, or by a reader where no family that runs has this `model_type`."""
    family = str(config["model_type"])
    known = family_of_type(family)
    if known is not None:
        decoder, refused = known.shape(config)
        return model_spec(decoder, name, dtype, family=family, refused=refused)
    if family not in ARCHITECTURES:
        raise UnsupportedError(f"cannot plan {name}", [_why_unknown(family, config), _DESCRIBE])
    return replace(ARCHITECTURES.get(family)(Config(config, name)), dtype=dtype)


def understood() -> list[str]:
    """Return every `model_type` that can be planned, those that run first."""
    running = [model_type for _, family in FAMILY_CONFIGS.items() for model_type in family.model_types]
    return [*running, *ARCHITECTURES]


def read_config(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; raises `CheckpointError` when it is not one."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); expected the config.json of a model") from error
    if not isinstance(config, dict):
        kind = type(config).__name__
        raise CheckpointError(f"{path} holds a {kind}, not an object; expected the config.json of a model")
    return config


def _why_unknown(family: str, config: Mapping[str, Any]) -> str:
    known = understood()
    if "vision_config" in config or "image_size" in config or "patch_size" in config:
        return f"architecture {family!r} is a vision model; a plan needs a language model with a decoder"
    if config.get("is_encoder_decoder"):
        return f"architecture {family!r} has an encoder; only decoder-only models are planned"
    return f"architecture {family!r} is not understood{near_copy(family, known)}; understood: {', '.join(known)}"


def _weight_format(config: Mapping[str, Any], name: str) -> WeightFormat | None:
    quantised = config.get("quantization_config")
    if not isinstance(quantised, Mapping):
        return None
    method = str(quantised.get("quant_method"))
    if method in _QUANTISED:
        return _QUANTISED[method]
    bits = quantised.get("bits", quantised.get("w_bit"))
    group = quantised.get("group_size", quantised.get("q_group_size", 128))
    if method in ("gptq", "awq") and isinstance(bits, int) and isinstance(group, int) and group > 0:
        return WeightFormat(f"{method}-{bits}", bits + (16 + bits) / group, "layers")
    raise UnsupportedError(
        f"cannot plan the weights of {name}",
        [f"quantisation {method!r} is not understood{near_copy(method, [*_QUANTISED, 'gptq', 'awq'])}; "
         "give the unquantised model or a folder with its safetensors files"],
    )
