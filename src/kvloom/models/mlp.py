"""Activations, and the mixture of experts of a decoder layer."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from kvloom.spec.decoder import DecoderConfig, ExpertsConfig

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}
"""Activations by the name that a `DecoderConfig` has for them."""


def xielu(
    x: torch.Tensor, above: torch.Tensor, below: torch.Tensor, slope: torch.Tensor, eps: torch.Tensor
) -> torch.Tensor:
    """Return xIELU (Huang and Schlag, arXiv:2411.13010) of x, given alpha_p, alpha_n - beta, beta and eps, one each.

    What goes into exp is at most eps, a negative number near 0.
    """
    positive = above * x * x + slope * x
    negative = (below + slope) * (torch.expm1(torch.minimum(x, eps)) - x) + slope * x
    return torch.where(x > 0, positive, negative).to(x.dtype)


Weights = Mapping[str, torch.Tensor]


def experts(x: torch.Tensor, weights: Weights, at: str, config: DecoderConfig) -> torch.Tensor:
    """Return the mixture of experts [T, hidden] of x [T, hidden]; each expert runs once, on the tokens that chose it.

    Sums over a token's experts run in the order of their number, the shared one last, independent of the batch.
    """
    chosen = config.experts
    assert chosen is not None
    out = torch.zeros_like(x)
    share, index = route(x, weights, at, chosen)
    for expert in sorted(set(index.flatten().tolist())):
        token, place = torch.where(index == expert)
        by = share[token, place, None]
        if chosen.scale_input:
            result = _expert((x[token] * by).to(x.dtype), weights, at, expert, config, chosen)
        else:
            result = _expert(x[token], weights, at, expert, config, chosen) * by
        out.index_add_(0, token, result.to(out.dtype))
    return out + _shared(x, weights, at, config) if chosen.shared_size else out


def route(x: torch.Tensor, weights: Weights, at: str, chosen: ExpertsConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return shares [T, k] float32 and numbers [T, k] of the k experts that each token x [T, hidden] takes."""
    logits = F.linear(x, weights[at + "router"], weights.get(at + "router_bias")).float()
    if chosen.jitter:
        return _route_sparsely(logits, chosen)
    score = torch.sigmoid(logits) if chosen.sigmoid else torch.softmax(logits, dim=-1)
    choice = score + weights[at + "router_selection_bias"].float() if chosen.selection_bias else score
    if chosen.kept_groups < chosen.groups:
        grouped = choice.view(len(choice), chosen.groups, -1)  # [T, groups, members]
        best = grouped.topk(chosen.group_best, dim=-1).values.sum(-1)
        lost = torch.ones_like(best, dtype=torch.bool).scatter(-1, best.topk(chosen.kept_groups, dim=-1).indices, False)
        choice = grouped.masked_fill(lost[..., None], -torch.inf).flatten(-2)
    index = choice.topk(chosen.per_token, dim=-1).indices
    share = score.gather(-1, index)
    if chosen.normalise:
        share = share / (share.sum(-1, keepdim=True) + 1e-20)
    return share * chosen.scale, index


def _route_sparsely(logits: torch.Tensor, chosen: ExpertsConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `route` of logits [T, E] as SparseMixer-v2 decides when it does not train (arXiv:2409.12136)."""
    left, shares, numbers = logits, [], []
    for _ in range(chosen.per_token):
        peak, number = left.max(dim=-1, keepdim=True)
        far = (peak - logits) / torch.maximum(logits.abs(), peak) > 2 * chosen.jitter
        shares.append(torch.softmax(left.masked_fill(far, -torch.inf), dim=-1).gather(-1, number))
        numbers.append(number)
        left = left.scatter(-1, number, -torch.inf)
    return torch.cat(shares, dim=-1) * chosen.scale, torch.cat(numbers, dim=-1)


def _shared(x: torch.Tensor, weights: Weights, at: str, config: DecoderConfig) -> torch.Tensor:
    act = ACTIVATIONS[config.activation]
    inner = act(F.linear(x, weights[at + "shared_gate"])) * F.linear(x, weights[at + "shared_up"])
    result = F.linear(inner, weights[at + "shared_down"])
    logit = weights.get(at + "shared_router")  # [1, hidden]
    return result if logit is None else result * torch.sigmoid(F.linear(x, logit))


def _expert(
    x: torch.Tensor, weights: Weights, at: str, expert: int, config: DecoderConfig, chosen: ExpertsConfig
) -> torch.Tensor:
    def part(name: str, value: torch.Tensor) -> torch.Tensor:
        bias = weights.get(f"{at}experts_{name}_bias")
        return F.linear(value, weights[f"{at}experts_{name}"][expert], None if bias is None else bias[expert])

    gate, up = part("gate", x), part("up", x)
    if chosen.clamp is None:
        return part("down", ACTIVATIONS[config.activation](gate) * up)
    alpha, limit = chosen.clamp
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return part("down", (up + 1) * gate * torch.sigmoid(alpha * gate))
