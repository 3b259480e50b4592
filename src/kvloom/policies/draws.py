"""Draws: pseudo-random numbers that depend on seed, layer, lane and position alone."""

import torch


def uniform_draws(positions: torch.Tensor, layer: int, seed: int) -> torch.Tensor:
    """Return a number in [0, 1) for each of positions [G, S], float64: the same in any batch and any chunking.

    An integer hash of (seed, layer, lane, position): the finaliser of splitmix64, kept to 62 bits.
    """
    lanes = torch.arange(positions.shape[0], dtype=torch.int64)[:, None]
    x = positions * 0x9E3779B1 + lanes * 0x85EBCA77 + layer * 0xC2B2AE3D + seed % (1 << 31) * 0x27D4EB2F
    x = x & 0x3FFFFFFFFFFFFFFF
    for shift, factor in ((30, 0x1B03738712FAD5C9), (27, 0x14D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & 0x3FFFFFFFFFFFFFFF
    return (x ^ (x >> 31)).double() / float(1 << 62)
