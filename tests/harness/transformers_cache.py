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


def cached_logits(model: torch.nn.Module, tokens: list[int], start: int, hidden: slice) -> torch.Tensor:
    """Return logits [n - start, V] of tokens[start:], which come one by one and do not see those in `hidden`.

    The tokens before them, all at once, do. Positions stay what they are.
    """
    with torch.no_grad():
        _, cache = continued(model, torch.tensor([tokens[:start]]))
        mask, rows = torch.ones(1, len(tokens), dtype=torch.int64), []
        mask[:, hidden] = 0
        positioned = "position_ids" in inspect.signature(model.forward).parameters
        for at in range(start, len(tokens)):
            places = {"position_ids": torch.tensor([[at]])} if positioned else {}
            ids = torch.tensor([tokens[at : at + 1]])
            logits, cache = continued(model, ids, cache, attention_mask=mask[:, : at + 1], **places)
            rows.append(logits[0].float())
    return torch.cat(rows)
