"""Definitions of the dense operations of a layer and of attention's further terms, in torch and float32."""

import torch
import torch.nn.functional as F


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes [N, K] in [-127, 127] and float32 scales [N] of x [N, K]: symmetric, a scale per row."""
    peak = x.float().abs().amax(dim=1)
    inverse = torch.where(peak > 0, torch.full_like(peak, 127.0) / peak, 0.0)  # one rounding, no reciprocal
    return torch.round(x.float() * inverse[:, None]).clamp(-127, 127).to(torch.int8), peak / 127.0


GROUP = 32
"""Inputs that share a scale and an offset in `quantize_groups`."""


def quantize_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return int8 codes [N, K] in [-8, 7], scales and offsets [N, ceil(K / 32)], halves in float32, of x [N, K].

    x is scale * code + offset in every 32 columns (the last group may have fewer). The range of a group, lowest to
    highest, is cut into 15, 14, .., 8 steps and x is rounded to them; for each of these eight ways scale and offset are
    fitted by least squares, and the way of least squared error is chosen, the first of equals. Blocks of 32 with scale
    and minimum are those of GGUF's Q4_1. Values of Q4_0, Q4_1 and Q4_K are kept up to the rounding of scales. Fitting
    scales to codes by least squares is Lloyd's (1957) second step. Sums run from first to last.
    """
    parts = [_quantize_groups(x[:, : x.shape[1] // GROUP * GROUP].reshape(len(x), -1, GROUP).float())]
    if x.shape[1] % GROUP:
        parts.append(_quantize_groups(x[:, None, x.shape[1] // GROUP * GROUP :].float()))
    codes = torch.cat([part[0].flatten(1) for part in parts], 1).to(torch.int8)
    return codes, torch.cat([part[1] for part in parts], 1), torch.cat([part[2] for part in parts], 1)


def _quantize_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes [N, G, n] in float32, scales and offsets [N, G] of x [N, G, n]."""
    low, steps = x.amin(-1, keepdim=True), torch.arange(15.0, 7.0, -1.0)
    width = x.amax(-1, keepdim=True) - low
    inverse = torch.where(width > 0, steps / width, 0.0)  # [N, G, 8]
    codes = torch.round((x - low)[..., None] * inverse[:, :, None]) - 8  # [N, G, n, 8]
    n = x.shape[2]
    mean, code_mean = _sum(x) / n, _sum(codes) / n
    from_mean = codes - code_mean[:, :, None]
    square, product = _sum(from_mean * from_mean), _sum(from_mean * (x - mean[..., None])[..., None])
    scale = torch.where(square > 0, product / square, 0.0)
    offset = (mean[..., None] - scale * code_mean).half().float()
    scale = scale.half().float()
    left = (scale[:, :, None] * codes + offset[:, :, None]) - x[..., None]
    best = _sum(left * left).argmin(-1, keepdim=True)
    chosen = codes.gather(3, best[:, :, None].expand(-1, -1, n, 1)).squeeze(3)
    return chosen, scale.gather(2, best).squeeze(2), offset.gather(2, best).squeeze(2)


def _sum(x: torch.Tensor) -> torch.Tensor:
    """Return x [N, G, n, ...] summed over n from the first to the last."""
    total = torch.zeros_like(x[:, :, 0])
    for i in range(x.shape[2]):
        total = total + x[:, :, i]
    return total


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [T, K] times weight [N, K] transposed, plus bias [N], in float32."""
    return F.linear(x.float(), weight.float(), bias)


def gate(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Return activation(gate) * up: SwiGLU (Shazeer 2020) for "silu", GeGLU for "gelu" and, by tanh, "gelu_tanh".

    "relu2" is max(gate, 0) squared.
    """
    if activation == "silu":
        return F.silu(gate.float()) * up.float()
    if activation == "relu2":
        return F.relu(gate.float()).square() * up.float()
    return F.gelu(gate.float(), approximate="tanh" if activation == "gelu_tanh" else "none") * up.float()


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
