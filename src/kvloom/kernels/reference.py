"""The definition of every operation, in torch, slow and simple. Each faster kernel is compared with its definition.

Letters: T packed tokens, n new tokens of one sequence, S slots, H query heads, G KV heads, r = H / G, D width.
"""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Return x [..., D] / rms(x) * weight [D] or without, computed in float32 (Zhang and Sennrich 2019)."""
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normal if weight is None else normal * weight.float()).to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Return (x - mean) / deviation * weight + bias over the last dimension, computed in float32 (Ba et al. 2016)."""
    wide = x.float() - x.float().mean(-1, keepdim=True)
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()
    return (normal if bias is None else normal + bias.float()).to(x.dtype)


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Return cap tanh(x / cap): close to x where x is small, and never beyond the cap (Gemma 2)."""
    return cap * torch.tanh(x / cap)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, heads, D] by cos, sin [T, D / 2]; pairs are (i, i + D / 2), the half-split layout."""
    first, second = x.float().chunk(2, dim=-1)
    c, s = cos[:, None, :], sin[:, None, :]
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x.dtype)


def visible_slots(n: int, slots: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return [n, S] bool: the slots to which the n newest tokens attend, where token i is in slot S - n + i.

    Causal: j <= S - n + i. Window: the query itself and the window - 1 slots before it.
    """
    query = torch.arange(slots - n, slots, device=device)[:, None]
    slot = torch.arange(slots, device=device)[None, :]
    seen = slot <= query
    if window is not None:
        seen &= slot > query - window
    return seen


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    held: torch.Tensor,
    scale: float,
    window: int | None = None,
    log_count: torch.Tensor | None = None,
    cap: float | None = None,
    slopes: torch.Tensor | None = None,
    distance: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    first: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the n newest tokens of one sequence over its lanes of one layer.

    q [n, H, D], k [G, S, D], v [G, S, Dv]; lane g holds its `held[g]` tokens in slots S - held[g] .. S - 1, in
    chronological order, the newest n included. Returns out [n, H, Dv] in the dtype of q and the log-sum-exp of the
    scaled scores [n, H] in float32. Query head h reads lane h // r. `log_count` [G, S] is added to the scaled scores:
    ln c of a merged entry that stands for c tokens. `cap` bounds the scaled scores (`softcap`), before that. `slopes`
    [H] times the distance from query to key are subtracted (ALiBi, Press et al. 2022); `distance` [G, n, S] is in
    tokens, None where slots are as far apart as their tokens. `sinks` [H] are scores that only join the denominator.
    Query i sees no slot before `first[i]`.
    Arithmetic is float32 or wider.
    """
    n, heads, width = q.shape
    lanes, slots, _ = k.shape
    seen = visible_slots(n, slots, window, q.device)[None] & (
        torch.arange(slots, device=q.device)[None, None, :] >= slots - held[:, None, None]
    )  # [G, n, S]
    if first is not None:
        seen = seen & (torch.arange(slots, device=q.device) >= first[:, None])
    group = heads // lanes
    query = q.float().view(n, lanes, group, width).permute(1, 2, 0, 3).reshape(lanes, group * n, width)
    scores = torch.bmm(query, k.float().transpose(1, 2)) * scale
    scores = scores.view(lanes, group, n, slots)
    if cap is not None:
        scores = softcap(scores, cap)
    if slopes is not None:
        if distance is None:
            query_slot = torch.arange(slots - n, slots, device=q.device)[:, None]
            distance = (query_slot - torch.arange(slots, device=q.device))[None]
        scores = scores - slopes.float().view(lanes, group, 1, 1) * distance[:, None]
    if log_count is not None:
        scores = scores + log_count[:, None, None, :]
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float().view(lanes, group, 1))
    weights = torch.exp(scores - lse[..., None]).view(lanes, group * n, slots)
    out = torch.bmm(weights, v.float()).view(lanes, group, n, -1)
    return out.permute(2, 0, 1, 3).reshape(n, heads, -1).to(q.dtype), lse.permute(2, 0, 1).reshape(n, heads)


def attention_weights(
    q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor, scale: float, log_count: torch.Tensor | None = None
) -> torch.Tensor:
    """Return softmax weights [H, n, S] in float32 of q [n, H, D] over k [G, S, D] where seen [G, n, S] is True.

    Rows in which nothing is seen are zero. `log_count` [G, S] is added to the scaled scores, as in `attention`.
    """
    heads, lanes = q.shape[1], k.shape[0]
    query = q.float().transpose(0, 1).reshape(lanes, heads // lanes, *q.shape[::2])
    scores = torch.einsum("grnd,gsd->grns", query, k.float()) * scale
    if log_count is not None:
        scores = scores + log_count[:, None, None, :]
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    weights = torch.exp(scores - torch.where(torch.isinf(lse), torch.zeros_like(lse), lse))
    return weights.flatten(0, 1)


def key_mass(q: torch.Tensor, k: torch.Tensor, held: torch.Tensor, scale: float, tile: int = 256) -> torch.Tensor:
    """Return for each key the softmax weight summed over the n newest queries, mean over the group: [G, S] float32.

    Shapes and alignment as in `attention`. A_ij = exp(s_ij - lse_i), so the sum over i needs the log-sum-exp of every
    row but never the n x n matrix: queries pass in tiles.
    """
    n, slots = q.shape[0], k.shape[1]
    mass = torch.zeros(k.shape[0], slots, dtype=torch.float32, device=q.device)
    first_held = slots - held[:, None, None]
    for start in range(0, n, tile):
        rows = q[start : start + tile]
        query = torch.arange(slots - n + start, slots - n + start + len(rows), device=q.device)
        slot = torch.arange(slots, device=q.device)
        seen = (slot[None, None, :] <= query[None, :, None]) & (slot[None, None, :] >= first_held)
        weights = attention_weights(rows, k, seen, scale)
        mass += weights.view(k.shape[0], -1, len(rows), slots).sum(2).mean(1)
    return mass
