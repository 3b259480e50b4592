"""Rotary embedding parameters of a config, in the notation of transformers 5 and the older one."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from kvloom.spec.decoder import RopeConfig
from kvloom.spec.families.config_reader import ConfigReader

Values = dict[str, float]


class RopeReader:
    """Numbers of one rotary embedding; a missing or malformed one is recorded in `reader` and counts as 1."""

    def __init__(self, reader: ConfigReader, params: Mapping[str, Any], kind: str, max_position: int) -> None:
        self.reader, self.params, self.kind, self.max_position = reader, params, kind, max_position

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive number; absent or null is `default`, or a fault when that is None."""
        value = self.params.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self.reader.wrong(f"{key} of the {self.kind} rotary embedding", "a positive number", value)
            return 1.0
        return float(value)

    def original(self) -> float:
        """Return the context length of training: from the config, from its rope entries, else the model's length."""
        beside = self.reader.get("original_max_position_embeddings")
        return float(beside) if isinstance(beside, int) else self.number(_ORIGINAL, float(self.max_position))

    def divisors(self, key: str, count: int) -> tuple[float, ...]:
        """Return a list of `count` positive numbers."""
        values = self.params.get(key)
        good = isinstance(values, list) and len(values) == count
        if not good or any(isinstance(v, bool) or not isinstance(v, int | float) or v <= 0 for v in values or ()):
            what = f"{key} of the {self.kind} rotary embedding"
            self.reader.wrong(what, f"{count} positive numbers", values if values is None else str(values)[:60])
            return (1.0,) * count
        return tuple(float(v) for v in values or ())


_ORIGINAL = "original_max_position_embeddings"


def _default(read: RopeReader) -> Values:
    return {}


def _linear(read: RopeReader) -> Values:
    return {"factor": read.number("factor")}


def _llama3(read: RopeReader) -> Values:
    names = ("factor", "low_freq_factor", "high_freq_factor")
    return {**{name: read.number(name) for name in names}, "original": read.original()}


def _dynamic(read: RopeReader) -> Values:
    return {"factor": read.number("factor"), "original": float(read.max_position)}


def _yarn(read: RopeReader) -> Values:
    """YaRN's attention temperature is 0.1 ln(factor) + 1, or a quotient of two such where both mscales are given."""
    original = read.original()
    factor = read.number("factor", read.max_position / original)

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    amplitude = temperature(1.0)
    if read.params.get("mscale") and read.params.get("mscale_all_dim"):
        amplitude = temperature(read.number("mscale")) / temperature(read.number("mscale_all_dim"))
    return {
        "factor": factor,
        "original": original,
        "beta_fast": read.number("beta_fast", 32.0),
        "beta_slow": read.number("beta_slow", 1.0),
        "truncate": float(bool(read.params.get("truncate", True))),
        "amplitude": read.number("attention_factor", amplitude),
    }


def _longrope(read: RopeReader) -> Values:
    """LongRoPE's amplitude is sqrt(1 + ln(factor) / ln(original)), with the factor of the context's extension."""
    original = read.original()
    factor = read.number("factor", read.max_position / original)
    amplitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return {"original": original, "amplitude": read.number("attention_factor", amplitude)}


ROPE_KINDS: dict[str, Callable[[RopeReader], Values]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "dynamic": _dynamic,
    "longrope": _longrope,
}
"""Supported kinds of rotary embedding, with the function that reads the numbers of each."""

ROPE_ALIASES = {"su": "longrope"}
"""Older names of kinds of rotary embedding."""


def rope_config(
    reader: ConfigReader,
    params: Mapping[str, Any],
    theta: float,
    *,
    head_dim: int = 0,
    partial: bool = False,
    aliases: Mapping[str, str] = ROPE_ALIASES,
) -> RopeConfig:
    """Return the rotary embedding that `params` describe, with base `theta` unless they name their own.

    In families that rotate a part of each head (`partial`, of `head_dim`) `partial_rotary_factor` gives the part; in
    others it is refused, as are unsupported kinds. Missing parameters are faults; both are recorded in `reader`.
    """
    named = params.get("rope_type", params.get("type")) or "default"
    kind = aliases.get(named, named) if isinstance(named, str) else named
    if kind not in ROPE_KINDS:
        reader.refuse(f"rotary embedding of type {named!r} (supported: {', '.join(ROPE_KINDS)})")
        return RopeConfig(theta)
    read = RopeReader(reader, params, kind, reader.integer("max_position_embeddings", 1))
    rotary = _rotary(reader, params, head_dim, partial)
    values = ROPE_KINDS[kind](read)
    divisors: tuple[tuple[float, ...], ...] = ()
    if kind == "longrope":
        count = (rotary or head_dim) // 2
        divisors = (read.divisors("short_factor", count), read.divisors("long_factor", count))
    return RopeConfig(read.number("rope_theta", theta), kind, values, rotary, divisors)


def _rotary(reader: ConfigReader, params: Mapping[str, Any], head_dim: int, partial: bool) -> int | None:
    """Return how many elements of a head are rotated, None for all."""
    part = params.get("partial_rotary_factor", reader.get("partial_rotary_factor"))
    if part in (None, 1, 1.0):
        return None
    if not partial:
        reader.refuse(f"partial_rotary_factor {part!r}: only whole heads are rotated")
        return None
    if isinstance(part, bool) or not isinstance(part, int | float) or not 0 < part < 1:
        reader.wrong("partial_rotary_factor", "a number above 0 and at most 1", part)
        return None
    rotary = int(head_dim * part)
    if rotary % 2 or rotary < 2:
        reader.wrong("partial_rotary_factor", f"an even number of the {head_dim} elements of a head", part)
        return None
    return rotary


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


def longest_position(rope: RopeConfig, max_position: int) -> int:
    """Return the context length of a model of `max_position` with `rope`.

    YaRN and dynamic NTK extend the original context by their factor, and many configs name only the original one.
    """
    if rope.kind in ("yarn", "dynamic"):
        return max(max_position, int(rope.scaling["original"] * rope.scaling["factor"]))
    return max_position
