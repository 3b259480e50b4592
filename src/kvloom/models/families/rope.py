"""Rotary embedding parameters of a config, in the notation of transformers 5 and the older one."""

from collections.abc import Mapping
from typing import Any

from kvloom.models.config import RopeConfig
from kvloom.models.families.config_reader import ConfigReader

ROPE_SCALING: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Supported kinds of rotary embedding, with the parameters that each one needs."""


def rope_config(reader: ConfigReader, params: Mapping[str, Any], theta: float) -> RopeConfig:
    """Return the rotary embedding that `params` describe, with base `theta` unless they name their own.

    Unsupported kinds and partial rotation are refused, missing parameters are faults, both through `reader`.
    """
    kind = params.get("rope_type", params.get("type")) or "default"
    if kind not in ROPE_SCALING:
        reader.refuse(f"rotary embedding of type {kind!r} (supported: {', '.join(ROPE_SCALING)})")
        return RopeConfig(theta)
    part = params.get("partial_rotary_factor", reader.get("partial_rotary_factor"))
    if part not in (None, 1, 1.0):
        reader.refuse(f"partial_rotary_factor {part!r}: only whole heads are rotated")
    values = {"rope_theta": params.get("rope_theta", theta), **{key: params.get(key) for key in ROPE_SCALING[kind]}}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            reader.wrong(f"{key} of the {kind} rotary embedding", "a positive number", value)
            return RopeConfig(theta)
    base = float(values.pop("rope_theta"))
    return RopeConfig(base, kind, {key: float(value) for key, value in values.items()})


def rope_params(reader: ConfigReader, layer_type: str | None = None) -> dict[str, Any]:
    """Return the rope entries of a config: `rope_parameters` (of one layer type, if given), else `rope_scaling`."""
    new = reader.get("rope_parameters")
    if layer_type is not None and isinstance(new, dict):
        if new and not any(isinstance(entry, dict) for entry in new.values()):
            reader.wrong("rope_parameters", "an object for each type of layer", new)
        new = new.get(layer_type)
    found = new if new is not None else reader.get("rope_scaling")
    if found is None:
        return {}
    if not isinstance(found, dict):
        reader.wrong("rope_parameters", "an object", found)
        return {}
    return found
