"""Codecs: how one side of a store, K or V, turns the vectors of tokens into codes and scales, and back.

A token is encoded by itself, so blocks may be filled in any order and survivors of an eviction keep their codes.
"""

from typing import Protocol

import torch

from kvloom.spec.store import Side


class Codec(Protocol):
    """Codes of `dtype`, one per element; with `scaled` a float32 scale per token."""

    dtype: torch.dtype
    scaled: bool

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return codes [N, D] and scales [N] (None without) of the rows of x [N, D]."""

    def decode(self, codes: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        """Return the vectors [N, P, D] of codes [N, P, D] and scales [N, P]."""


class NativeCodec:
    """Every bit as the model computes it, in its dtype."""

    scaled = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return x [N, D] (see `Codec`)."""
        return x.to(self.dtype), None

    def decode(self, codes: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        """Return the codes (see `Codec`)."""
        return codes


class Int8Codec:
    """Symmetric 8-bit codes: scale = amax / 127, code = round(x / scale), so that |error| <= scale / 2.

    Where a 127th of the largest element is not a normal float32, the scale is the smallest normal one. A vector of
    zeros has scale 0 and decodes to zeros.
    """

    dtype = torch.int8
    scaled = True

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return int8 codes [N, D] and float32 scales [N] (see `Codec`)."""
        values = x.float()
        scale, stored = _scales(values.abs().amax(dim=1), 127.0)
        codes = torch.round(values / scale[:, None]).clamp_(-127, 127).to(torch.int8)
        return codes, stored

    def decode(self, codes: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        """Return codes times scales (see `Codec`)."""
        assert scales is not None
        return codes.float() * scales[..., None]


class E4m3Codec:
    """FP8 e4m3 codes (`torch.float8_e4m3fn`): scale = amax / 448, code = x / scale, to nearest even, saturating.

    |error| <= max(|x| / 16, scale / 1024). Scales of small vectors are those of `Int8Codec`.
    """

    dtype = torch.uint8
    scaled = True

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes [N, D] and float32 scales [N] (see `Codec`)."""
        values = x.float()
        peak = values.abs().amax(dim=1)
        scale, stored = _scales(peak, _E4M3_MAX)
        inverse = torch.where(scale > _TINY, _E4M3_MAX / peak, 1 / _TINY)
        codes = (values * inverse[:, None]).clamp_(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8), stored

    def decode(self, codes: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        """Return the values of codes times scales (see `Codec`)."""
        assert scales is not None
        return codes.view(torch.float8_e4m3fn).float() * scales[..., None]


_E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
_TINY = torch.finfo(torch.float32).tiny
_CODECS: dict[str, type[Codec]] = {"int8": Int8Codec, "e4m3": E4m3Codec}


def _scales(peak: torch.Tensor, top: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales [N] that make `top` of the largest |elements| [N], and as stored: 0 for a vector of zeros."""
    scale = (peak / top).clamp_min(_TINY)
    return scale, torch.where(peak > 0, scale, 0.0)


def codec_of(side: Side, dtype: torch.dtype) -> Codec:
    """Return the codec of one side of a runtime store, in a model that computes in `dtype`."""
    if side.code:
        return _CODECS[side.code]()
    assert side == Side(8 * dtype.itemsize), "a side is encoded by a codec or is as wide as the model's dtype"
    return NativeCodec(dtype)
