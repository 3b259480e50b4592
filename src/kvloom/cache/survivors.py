"""Survivors: what the tokens hold that stay in a lane when others leave."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Survivors:
    """New K [n, Dk] and V [n, Dv] of one lane's first n survivors in slot order, and what is added to their logits.

    Survivors that follow keep what they hold.
    `log_count` [n] is ln c for an entry that stands for c tokens, so that its softmax mass is right; None leaves it.
    """

    keys: torch.Tensor
    values: torch.Tensor
    log_count: torch.Tensor | None = None
