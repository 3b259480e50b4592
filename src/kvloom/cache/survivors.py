"""Survivors: the new content of tokens that are kept in a lane at an eviction."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Survivors:
    """New K [n, Dk] and V [n, Dv] of one lane's first n survivors in slot order, and what is added to their logits.

    Later survivors keep their content.
    `log_count` [n] is ln c for an entry merged from c tokens, so that its softmax mass is right; None leaves it.
    """

    keys: torch.Tensor
    values: torch.Tensor
    log_count: torch.Tensor | None = None
