"""Mixtures of experts over packed weights: route, run each chosen expert once, add the results up."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

import kvloom.kernels.cpu._ext as _ext
from kvloom.errors import InvalidInputError
from kvloom.kernels.cpu.elements import ACTIVATION, CLAMPED_GATE, contiguous
from kvloom.kernels.cpu.linear import PackedWeight
from kvloom.kernels.cpu.threads import follow_torch


@dataclass(frozen=True)
class Routing:
    """Which `per_token` experts a token takes, and by what their results are multiplied.

    Scores are the softmax of the router's logits, or their sigmoid. Experts are chosen by score + `selection_bias` [E];
    with `groups` of neighbours, only within the `kept_groups` whose `group_best` best choices sum highest (DeepSeek-V2:
    1, DeepSeek-V3: 2). The multiplier is the score, divided by the sum over the chosen if `normalise`, times `scale`.
    With `scale_input` it multiplies what an expert reads, not its result. `jitter` is that of `ExpertsConfig`.
    """

    per_token: int
    sigmoid: bool = False
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    group_best: int = 1
    selection_bias: torch.Tensor | None = None
    jitter: float = 0.0
    scale_input: bool = False


class Experts:
    """E gated MLPs of which each token takes a few, and perhaps a shared one that every token takes.

    `router` is a float32 `PackedWeight` [E, hidden], or [E + 1, hidden] where the last row is the logit of a sigmoid
    that multiplies the shared expert. `experts` and `shared` are pairs (gate_up, down) of one product. `clamp`, if
    given, is (alpha, limit) of the clamped gate in place of `activation` (see `spec.decoder.ExpertsConfig`).
    Raises `InvalidInputError` for weights that do not fit together.
    """

    def __init__(
        self,
        router: PackedWeight,
        experts: Sequence[tuple[PackedWeight, PackedWeight]],
        routing: Routing,
        *,
        activation: str = "silu",
        clamp: tuple[float, float] | None = None,
        shared: tuple[PackedWeight, PackedWeight] | None = None,
    ) -> None:
        bias = routing.selection_bias
        alpha, limit = clamp if clamp is not None else (0.0, 0.0)
        self.hidden = router.shape[1]
        try:
            self.mixture = _ext.Experts(
                router.packed,
                [(gate_up.packed, down.packed) for gate_up, down in experts],
                None if shared is None else (shared[0].packed, shared[1].packed),
                (routing.per_token, routing.sigmoid, routing.normalise, routing.scale, routing.groups,
                 routing.kept_groups, routing.group_best, routing.jitter, routing.scale_input),
                None if bias is None else np.ascontiguousarray(bias.float().numpy()),
                CLAMPED_GATE if clamp is not None else ACTIVATION[activation], alpha, limit,
            )  # fmt: skip
        except ValueError as error:
            raise InvalidInputError(str(error)) from error

    def add(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Add the mixture of x [T, hidden] to `out` [T, hidden], both float32 and contiguous; returns `out`.

        A row gets the same bits whatever else is in the batch and however many threads run.
        """
        contiguous(x, "x", torch.float32)
        contiguous(out, "out", torch.float32)
        if x.dim() != 2 or x.shape[1] != self.hidden or out.shape != x.shape:
            raise InvalidInputError(
                f"x has shape {tuple(x.shape)} and out {tuple(out.shape)}; expected [T, {self.hidden}] of both"
            )
        follow_torch()
        self.mixture.add(x.data_ptr(), x.shape[0], out.data_ptr())
        return out

    @property
    def read_bytes(self) -> int:
        """Bytes of the distinct experts that each call of `add` read, summed over all calls."""
        return self.mixture.read_bytes

    @property
    def experts_read(self) -> int:
        """Distinct routed experts that each call of `add` read, summed over all calls."""
        return self.mixture.experts_read
