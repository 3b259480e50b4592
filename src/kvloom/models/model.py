"""Model: what the engine needs of a model, however it is computed."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvloom.attention.batch import AttentionBatch
from kvloom.cache.kvcache import KVCache, Layout
from kvloom.spec.decoder import DecoderConfig

Rows = NDArray[np.int32]
"""Indices of tokens in a batch."""


@dataclass(frozen=True)
class StepWanted:
    """What to hand back from a step over T tokens, besides filling the lanes.

    logit_rows   tokens whose next token is chosen; N of them
    logits       their logits are wanted, not only the best token
    hidden       all final hidden states are wanted
    query_rows   tokens whose rotated queries are wanted in every layer; Q of them
    lse          the log-sum-exps of those rows are wanted, from models that have them
    input_norms  the norm of every token's input to every layer is wanted
    """

    logit_rows: Rows
    logits: bool = True
    hidden: bool = False
    query_rows: Rows | None = None
    lse: bool = False
    input_norms: bool = False


@dataclass(frozen=True)
class StepOutput:
    """What `StepWanted` asked for.

    greedy [N] the most likely next tokens, -1 where the largest logit is not finite; logits [N, vocab] float32;
    hidden [T, hidden], normalised; queries [L, Q, H, D], rotated and unscaled, good until the next step; input_norms
    [L, T] float32, 2-norms of the residual stream before each layer; lse [L, Q, H] float32, the log of each softmax's
    denominator, None where the model does not hand it out.
    """

    greedy: list[int]
    logits: torch.Tensor | None
    hidden: torch.Tensor | None
    queries: torch.Tensor | None
    input_norms: torch.Tensor | None = None
    lse: torch.Tensor | None = None


class Model(Protocol):
    """A decoder-only transformer over lanes.

    `computes_in_torch` says that the work of a step is torch's operations, which then need torch's threads.
    """

    name: str
    layout: Layout
    config: DecoderConfig
    device: torch.device
    computes_in_torch: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights, tied ones once."""

    def prepare(self, num_tokens: int) -> None:
        """Make what steps of up to `num_tokens` tokens are worked out in, so that the first need not wait for it."""

    def step(self, batch: AttentionBatch, cache: KVCache, wanted: StepWanted) -> StepOutput:
        """Process the batch, whose slots exist already; mutates its lanes in `cache`."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [N, vocab] in float32 of normalised hidden states [N, hidden]."""

    def inverse_frequencies(self, layer: int, length_class: int = 0) -> torch.Tensor | None:
        """Return theta [D / 2] of the layer's rope for texts of `length_class`, None without rope."""

    def output_weight(self, layer: int) -> torch.Tensor:
        """Return the projection after attention, W_O [hidden, H * D], in float32."""
