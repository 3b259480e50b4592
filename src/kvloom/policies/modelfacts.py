"""ModelFacts: facts about a model and its tokenizer that policies use."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvloom.policies.tokenkinds import TokenKinds


@dataclass(frozen=True)
class ModelFacts:
    """Query heads, query scale, rope per layer (theta [D / 2] or None) and output projections W_O [hidden, H * D].

    `max_position` is the context length of the model. Two come from the tokenizer, None without
    one: `token_kinds()`, and `replay_instruction(hint)`, the token ids that ask to repeat the text (from the tokens
    `hint` on; [] for its start).
    """

    num_query_heads: int
    query_scale: float
    inverse_frequencies: Sequence[torch.Tensor | None]
    output_weight: Callable[[int], torch.Tensor]
    max_position: int = 1 << 31
    token_kinds: Callable[[], TokenKinds] | None = None
    replay_instruction: Callable[[Sequence[int]], list[int]] | None = None
