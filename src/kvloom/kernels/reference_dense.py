"""Definitions of the dense operations of a layer, and of attention's extras: slow, obvious, in torch, float32."""

import torch
import torch.nn.functional as F


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes [N, K] in [-127, 127] and float32 scales [N] of x [N, K]: symmetric, a scale per row."""
    peak = x.float().abs().amax(dim=1)
    inverse = torch.where(peak > 0, torch.full_like(peak, 127.0) / peak, 0.0)  # one rounding, no reciprocal
    return torch.round(x.float() * inverse[:, None]).clamp(-127, 127).to(torch.int8), peak / 127.0


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [T, K] times weight [N, K] transposed, plus bias [N], in float32."""
    return F.linear(x.float(), weight.float(), bias)


def gate(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Return activation(gate) * up: SwiGLU (Shazeer 2020) for "silu", GeGLU with GELU by tanh for "gelu_tanh"."""
    active = F.silu(gate.float()) if activation == "silu" else F.gelu(gate.float(), approximate="tanh")
    return active * up.float()


def scored_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    softcap: float = 0.0,
    slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out [n, H, Dv], log of the denominator [n, H]) of the n newest of S tokens: q [n, H, D], k, v [G, S, .].

    Scores are scale * q.k, capped to softcap * tanh(score / softcap), plus slopes [H] * (slot - own slot) (ALiBi, Press
    et al. 2021), plus bias [G, S] (the log of how many tokens a merged slot stands for); sinks [H] join the
    denominator.
    """
    n, heads, _ = q.shape
    group, slots = heads // k.shape[0], k.shape[1]
    scores = torch.einsum("nhd,hsd->hns", q.float(), k.float().repeat_interleave(group, 0)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    own = torch.arange(slots - n, slots)[:, None]
    slot = torch.arange(slots)[None, :]
    if slopes is not None:
        scores = scores + slopes[:, None, None] * (slot - own)
    if bias is not None:
        scores = scores + bias.repeat_interleave(group, 0)[:, None, :]
    scores = scores.masked_fill(slot > own, float("-inf"))
    parts = scores if sinks is None else torch.cat((scores, sinks[:, None, None].expand(heads, n, 1)), dim=-1)
    lse = torch.logsumexp(parts, dim=-1)
    out = torch.einsum("hns,hsd->nhd", torch.exp(scores - lse[..., None]), v.float().repeat_interleave(group, 0))
    return out, lse.T
