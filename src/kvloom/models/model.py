"""Model: the interface of a model that the engine uses."""

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
    """The outputs of a step over T tokens that are wanted, besides filling the lanes.

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
    """The outputs that `StepWanted` selects.

    greedy [N] the most likely next tokens, -1 where the largest logit is not finite; logits [N, vocab] float32;
    hidden [T, hidden], normalised; queries [L, Q, H, D], rotated and unscaled, valid until the next step; input_norms
    [L, T] float32, 2-norms of the residual stream before each layer; lse [L, Q, H] float32, the log of each softmax's
    denominator, None where the model does not return it.
    """

    greedy: list[int]
    logits: torch.Tensor | None
    hidden: torch.Tensor | None
    queries: torch.Tensor | None
    input_norms: torch.Tensor | None = None
    lse: torch.Tensor | None = None


class Model(Protocol):
    """A decoder-only transformer over lanes.

    `computes_in_torch` means that a step consists of torch's operations, which then need torch's threads.
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
        """Allocate the memory of steps of up to `num_tokens` tokens, so that the first need not wait for it."""

    def step(self, batch: AttentionBatch, cache: KVCache, wanted: StepWanted) -> StepOutput:
        """Process the batch, whose slots exist already; mutates its lanes in `cache`."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [N, vocab] in float32 of normalised hidden states [N, hidden]."""

    def inverse_frequencies(self, layer: int, length_class: int = 0) -> torch.Tensor | None:
        """Return theta [D / 2] of the layer's rope for texts of `length_class`, None without rope."""

    def output_weight(self, layer: int) -> torch.Tensor:
        """Return the projection after attention, W_O [hidden, H * D], in float32."""
