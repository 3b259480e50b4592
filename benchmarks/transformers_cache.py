"""Forward passes of transformers with a cache, whose argument has another name since 5.24."""

import inspect
from typing import Any

import torch


def continued(
    model: torch.nn.Module, ids: torch.Tensor, cache: object | None = None, **options: Any
) -> tuple[torch.Tensor, object]:
    """Return logits of ids [B, T] after the tokens in `cache` (None: none), and the cache that holds ids as well.

    `options` go to the model's forward; `logits_to_keep` bounds the rows of logits that are computed.
    """
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    out = model(ids, **{name: cache}, use_cache=True, **options)
    return out.logits, out[name]
