"""Rotary position embedding: cos and sin tables of every kind of rope that a config names (Su et al. 2021)."""

import math

import torch

from kvloom.spec.decoder import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int, length: int = 0) -> torch.Tensor:
    """Return theta_i [D / 2] in float32, radians per position, for texts of the length class `length`.

    The first R / 2 are base ** (-2 i / R) after the scaling of `rope.kind`, the others zero, which rotates by nothing.
    The rows of q and k are ordered so that pairs are (i, i + D / 2) (see `rotated_rows`).
    """
    rotary = rope.rotary or head_dim
    exponent = torch.arange(0, rotary, 2, dtype=torch.int64).float() / rotary
    theta = torch.zeros(head_dim // 2)
    theta[: rotary // 2] = _SCALED[rope.kind](rope, exponent, length)
    return theta


def _default(rope: RopeConfig, exponent: torch.Tensor, length: int) -> torch.Tensor:
    return 1.0 / (rope.base**exponent)


def _linear(rope: RopeConfig, exponent: torch.Tensor, length: int) -> torch.Tensor:
    """Position interpolation (Chen et al. 2023): all wavelengths times `factor`."""
    return _default(rope, exponent, length) / rope.scaling["factor"]


def _llama3(rope: RopeConfig, exponent: torch.Tensor, length: int) -> torch.Tensor:
    """Long wavelengths times `factor`, short ones as they are, those between blended (Llama 3.1)."""
    theta = _default(rope, exponent, length)
    factor, original = rope.scaling["factor"], rope.scaling["original"]
    low, high = rope.scaling["low_freq_factor"], rope.scaling["high_freq_factor"]
    wavelength = 2 * math.pi / theta
    blend = (original / wavelength - low) / (high - low)
    smooth = (1 - blend) * theta / factor + blend * theta
    scaled = torch.where(wavelength > original / low, theta / factor, theta)
    middle = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(middle, smooth, scaled)


def _yarn(rope: RopeConfig, exponent: torch.Tensor, length: int) -> torch.Tensor:
    """NTK by parts (Peng et al. 2023): a ramp over the index between the turns `beta_fast` and `beta_slow`.

    The index at which a pair makes t turns within the original length is R ln(original / (2 pi t)) / (2 ln base).
    """
    rotary = 2 * len(exponent)
    at = [
        rotary * math.log(rope.scaling["original"] / (turns * 2 * math.pi)) / (2 * math.log(rope.base))
        for turns in (rope.scaling["beta_fast"], rope.scaling["beta_slow"])
    ]
    if rope.scaling["truncate"]:
        at = [math.floor(at[0]), math.ceil(at[1])]
    low, high = max(at[0], 0), min(at[1], rotary - 1)
    index = torch.arange(len(exponent), dtype=torch.float32)
    ramp = ((index - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    wavelength = rope.base**exponent
    return 1.0 / (rope.scaling["factor"] * wavelength) * ramp + 1.0 / wavelength * (1 - ramp)


def _dynamic(rope: RopeConfig, exponent: torch.Tensor, length: int) -> torch.Tensor:
    """Dynamic NTK: the base grows with the length, from `original` on; 0 stands for any length up to it."""
    factor, original, rotary = rope.scaling["factor"], rope.scaling["original"], 2 * len(exponent)
    stretch = factor * max(length, original) / original - (factor - 1)
    base = rope.base * stretch ** (rotary / (rotary - 2))
    return 1.0 / torch.as_tensor(base**exponent)


def _longrope(rope: RopeConfig, exponent: torch.Tensor, length: int) -> torch.Tensor:
    """LongRoPE (Ding et al. 2024): searched divisors, one list within the original length and one beyond."""
    divisors = rope.divisors[1 if length > rope.scaling["original"] else 0]
    return 1.0 / (torch.tensor(divisors, dtype=torch.float32) * rope.base**exponent)


_SCALED = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "dynamic": _dynamic,
    "longrope": _longrope,
}


def amplitudes(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Return the factors of cosines and sines [D / 2]: the amplitude where pairs are rotated, one elsewhere."""
    out = torch.ones(head_dim // 2)
    out[: (rope.rotary or head_dim) // 2] = rope.amplitude
    return out


def cos_sin(
    theta: torch.Tensor, positions: torch.Tensor, amplitude: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin [T, D / 2] in float32 of positions [T] int64 times theta [D / 2] or [T, D / 2].

    Both are multiplied by `amplitude` [D / 2] if it is given.
    """
    angles = positions.to(torch.float32)[:, None] * theta
    if amplitude is None:
        return angles.cos(), angles.sin()
    return angles.cos() * amplitude, angles.sin() * amplitude


def rotated_rows(head_dim: int, rotary: int, neighbours: bool) -> list[int]:
    """Return which row of a head as stored belongs in each row of a head whose pairs are (i, i + D / 2).

    Stored heads rotate their first `rotary` rows, in pairs (i, i + rotary / 2) or, with `neighbours`, (2 i, 2 i + 1).
    The rest are paired in order and rotated by nothing, so that there is one rotation over the whole head. Rows of q
    and k are moved in the same way, which changes no product q.k.
    """
    half = rotary // 2
    first = list(range(0, rotary, 2)) if neighbours else list(range(half))
    second = list(range(1, rotary, 2)) if neighbours else list(range(half, rotary))
    middle = rotary + (head_dim - rotary) // 2
    return [*first, *range(rotary, middle), *second, *range(middle, head_dim)]
