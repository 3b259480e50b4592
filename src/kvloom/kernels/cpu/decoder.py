"""StepDecoder: a whole decoder step, token ids in and logits out, in one call of the extension."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

import kvloom.kernels.cpu._ext as _ext
from kvloom.errors import InvalidInputError
from kvloom.kernels.cpu.attention import Lanes, LayerShape
from kvloom.kernels.cpu.elements import ACTIVATION
from kvloom.kernels.cpu.linear import PackedWeight
from kvloom.kernels.cpu.threads import follow_torch

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Norm vectors are float32 [hidden] ([k_width] for q and k), ready to multiply.

    qkv [(H + G) Dk + G Dv, hidden]; o [hidden, H Dv]; gate_up gated [2 I, hidden]; down [hidden, I]. `rope` is an index
    that `add_rope` returned, -1 for none; `activation` is "silu" or "gelu_tanh".
    """

    shape: LayerShape
    qkv: PackedWeight
    o: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight
    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    post_attention_norm: torch.Tensor | None = None
    post_mlp_norm: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    rope: int = -1
    scale: float = 1.0
    softcap: float = 0.0
    activation: str = "silu"


class StepDecoder:
    """Embedding, layers and output product over packed weights; steps packed batches of prefill chunks and decodes.

    The residual stream and all sums are float32. `bf16` lets attention multiply in bf16 over bf16 and int8 blocks.
    `embedding` and `output` [vocab, hidden] may be the same object. Not to be stepped by two threads at once.
    """

    def __init__(
        self,
        embedding: PackedWeight,
        output: PackedWeight,
        final_norm: torch.Tensor,
        eps: float,
        *,
        bf16: bool,
        embedding_scale: float = 1.0,
        logit_softcap: float = 0.0,
    ) -> None:
        self.vocab, self.hidden = embedding.shape
        self._decoder = _ext.Decoder(
            self.hidden, self.vocab, eps, embedding_scale, logit_softcap, bf16, embedding.packed, output.packed,
            _floats(final_norm),
        )  # fmt: skip

    def add_rope(self, inverse_frequencies: torch.Tensor, amplitude: float = 1.0) -> int:
        """Add a rotary embedding, theta [R] float32 in radians per position; returns its index."""
        return self._decoder.add_rope(_floats(inverse_frequencies), amplitude)

    def add_layer(self, layer: LayerWeights) -> None:
        """Add the next layer; raises InvalidInputError where a shape does not fit."""
        optional = {
            name: None if vector is None else _floats(vector)
            for name, vector in (
                ("post_attention_norm", layer.post_attention_norm),
                ("post_mlp_norm", layer.post_mlp_norm),
                ("q_norm", layer.q_norm),
                ("k_norm", layer.k_norm),
                ("sinks", layer.sinks),
                ("slopes", layer.slopes),
            )
        }
        try:
            self._decoder.add_layer(
                tuple(layer.shape), layer.qkv.packed, layer.o.packed, layer.gate_up.packed, layer.down.packed,
                _floats(layer.attention_norm), _floats(layer.mlp_norm), rope=layer.rope, scale=layer.scale,
                softcap=layer.softcap, activation=ACTIVATION[layer.activation], **optional,
            )  # fmt: skip
        except ValueError as error:
            raise InvalidInputError(str(error)) from error

    def prepare(self, num_tokens: int) -> None:
        """Make the buffers of steps of up to `num_tokens` tokens, and their pages, ahead of the first one."""
        follow_torch()
        self._decoder.prepare(num_tokens)

    def step(
        self,
        lanes: Lanes,
        ids: Ints,
        positions: Ints,
        cu_seqlens: Ints,
        seq_rows: Ints,
        logit_rows: Ints,
        *,
        logits: NDArray[np.float32] | None = None,
        greedy: Ints | None = None,
        hidden: NDArray[np.float32] | None = None,
        query_rows: Ints | None = None,
        queries: NDArray[np.float32] | None = None,
        lse: NDArray[np.float32] | None = None,
        bias: NDArray[np.float32] | None = None,
    ) -> None:
        """Process ids [T] at positions [T] of B sequences (cu_seqlens [B + 1], rows seq_rows [B] of the lane table).

        The lanes' `end` already counts the new tokens; their K and V are written. For the tokens logit_rows [R]:
        `logits` [R, vocab] and `greedy` [R] (first arg max) are filled if given; `hidden` [T, hidden] receives the
        normed final states; `queries` [L, Q, H Dk] the rotated, unscaled queries of tokens query_rows [Q]; `lse`
        [L, T, H] the log-sum-exp of every row. `bias` [num_seqs, num_lanes, slots] is added to scores.
        Raises InvalidInputError if ids, rows or lane bounds do not fit.
        """
        follow_torch()
        try:
            self._decoder.step(
                lanes.view, ids, positions, cu_seqlens, seq_rows, logit_rows, logits, greedy, hidden, query_rows,
                queries, lse, bias,
            )  # fmt: skip
        except ValueError as error:
            raise InvalidInputError(str(error)) from error


def _floats(x: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = x.detach().to(torch.float32).contiguous().numpy()
    return array
