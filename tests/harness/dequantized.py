"""Weights as `--quantization` leaves them, by the definition of each format."""

import torch

from kvloom.kernels import reference_dense


def dequantized(name: str, weight: torch.Tensor, quantization: str = "int8") -> torch.Tensor:
    """Return what `weight` is after it was quantised; norms, biases, routers and tables of positions stay."""
    if weight.dim() < 2 or "router" in name or name.endswith("_bias") or name == "positions":
        return weight
    rows = weight.flatten(0, -2)
    if quantization == "int8" or name in ("embed", "lm_head"):
        codes, scale = reference_dense.quantize_rows(rows)
        return (codes.float() * scale[:, None]).view_as(weight)
    codes, scale, offset = reference_dense.quantize_groups(rows)
    scale, offset = (each.repeat_interleave(32, 1)[:, : weight.shape[-1]] for each in (scale, offset))
    return (codes.float() * scale + offset).view_as(weight)
