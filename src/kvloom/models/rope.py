"""Rotary position embedding: cos and sin tables of every kind of rope that a config names (Su et al. 2021)."""

import math

import torch

from kvloom.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Return theta_i [D / 2] in float32, base ** (-2 i / D), after the scaling of `rope.kind`.

    "linear" divides by `factor` (position interpolation); "llama3" divides the long wavelengths by `factor`, keeps
    the short ones and blends between (Llama 3.1).
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    theta = 1.0 / (rope.base**exponent)
    if rope.kind == "linear":
        return theta / rope.scaling["factor"]
    if rope.kind == "llama3":
        factor = rope.scaling["factor"]
        low, high = rope.scaling["low_freq_factor"], rope.scaling["high_freq_factor"]
        original = rope.scaling["original_max_position_embeddings"]
        wavelength = 2 * math.pi / theta
        blend = (original / wavelength - low) / (high - low)
        smooth = (1 - blend) * theta / factor + blend * theta
        scaled = torch.where(wavelength > original / low, theta / factor, theta)
        middle = (wavelength <= original / low) & (wavelength >= original / high)
        return torch.where(middle, smooth, scaled)
    return theta


def cos_sin(theta: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin [T, D / 2] in float32 of positions [T] int64 times theta [D / 2]."""
    angles = positions.to(torch.float32)[:, None] * theta[None, :]
    return angles.cos(), angles.sin()
