"""StepDecoder: a fused step, from token ids to logits, in one call of the extension."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import kvloom.kernels.cpu._ext as _ext
from kvloom.errors import InvalidInputError
from kvloom.kernels.cpu.attention import Lanes, LayerShape
from kvloom.kernels.cpu.elements import ACTIVATION, XIELU
from kvloom.kernels.cpu.experts import Experts
from kvloom.kernels.cpu.linear import PackedWeight
from kvloom.kernels.cpu.threads import follow_torch

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class NormWeights:
    """A norm: `weight` [D] float32, RMSNorm or, if `centred`, LayerNorm with a `bias` [D] or None."""

    weight: torch.Tensor
    eps: float
    centred: bool = False
    bias: torch.Tensor | None = None


class StepDecoder:
    """Embedding, layers and output product over packed weights; steps packed batches of prefill chunks and decodes.

    Layers are built of fused parts, in the order in which a step is to execute them: `add_layer`, then its parts. The
    residual stream and all sums are float32. `bf16` lets attention multiply in bf16 over bf16 and int8 blocks.
    `embedding` [vocab, hidden] is multiplied by `embedding_scale`; a row of `positions` [P, hidden] is added to it, and
    `embedding_norm` normalises it, where these are given. Not to be stepped by two threads at once.
    """

    def __init__(
        self,
        embedding: PackedWeight,
        *,
        bf16: bool,
        embedding_scale: float = 1.0,
        positions: PackedWeight | None = None,
        embedding_norm: NormWeights | None = None,
    ) -> None:
        self.vocab, self.hidden = embedding.shape
        self._decoder = _ext.Decoder(
            self.hidden, self.vocab, bf16, embedding.packed, embedding_scale,
            None if positions is None else positions.packed, _norm(embedding_norm),
        )  # fmt: skip

    def set_output(self, output: PackedWeight, norm: NormWeights, scale: float = 1.0, softcap: float = 0.0) -> None:
        """Set the output product [vocab, hidden] (the embedding or another), the norm before it, scale and softcap."""
        self._build(self._decoder.set_output, output.packed, _norm(norm), scale, softcap)

    def add_rope(self, inverse_frequencies: torch.Tensor, amplitudes: torch.Tensor) -> int:
        """Add a rotary embedding: theta [R] radians per position, and the factor of its cosines and sines [R]."""
        index: int = self._build(self._decoder.add_rope, _floats(inverse_frequencies), _floats(amplitudes))
        return index

    def add_layer(self, shape: LayerShape) -> None:
        """Begin the next layer; raises InvalidInputError if the last one has a part that nothing reads."""
        self._build(self._decoder.add_layer, tuple(shape))

    def add_norm(self, norm: NormWeights | None) -> None:
        """Normalise the residual stream for the product of the next part; without a norm, pass it on."""
        self._build(self._decoder.add_norm, _norm(norm))

    def add_heads(self, product: PackedWeight) -> None:
        """Compute q, k and v: product [(H + G) Dk + G Dv, hidden]."""
        self._build(self._decoder.add_heads, product.packed)

    def add_append(
        self,
        q_norm: NormWeights | None = None,
        k_norm: NormWeights | None = None,
        rope: int = -1,
        clip: float = 0.0,
        *,
        place: str = "head",
        temperature: tuple[float, float] | None = None,
    ) -> None:
        """Bound q, k, v by `clip` (0: not), norm heads [Dk], rotate by `rope` (-1: not), write k and v to the lanes.

        `place` is "head", "rotated" for norms after the rotation, or "layer" for norms of all heads at once
        ([H Dk], [G Dk]). Queries at position p are multiplied by 1 + s ln(1 + floor((p + 1) / P)) for a `temperature`
        (P, s).
        """
        places = ("head", "rotated", "layer")
        self._build(
            self._decoder.add_append, _norm(q_norm), _norm(k_norm), rope, clip, places.index(place),
            temperature or (0.0, 0.0),
        )  # fmt: skip

    def add_attend(
        self,
        scale: float,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        slopes: torch.Tensor | None = None,
        chunk: int = 0,
    ) -> None:
        """Attend over the lanes: scores times `scale`, capped by `softcap` (0: not), sinks [H] and ALiBi slopes [H].

        With a `chunk`, which is then the window of the layer, tokens attend to their own chunk of so many positions.
        """
        vectors = (None if vector is None else _floats(vector) for vector in (sinks, slopes))
        self._build(self._decoder.add_attend, *vectors, scale, softcap, chunk)

    def add_up(
        self, product: PackedWeight, activation: str, curve: tuple[float, float, float] = (0.0, 0.0, 0.0)
    ) -> None:
        """Compute the inside of an MLP: activation(gate) * up of a gated product [2 I, hidden], else activation(up).

        "xielu" has a `curve` (alpha_p, alpha_n, beta) and no gate.
        """
        code = XIELU if activation == "xielu" else ACTIVATION[activation]
        self._build(self._decoder.add_up, product.packed, code, curve)

    def add_product(self, product: PackedWeight, *, of_attention: bool, norm: NormWeights | None = None) -> None:
        """Add to the residual stream: product [hidden, H Dv] of attention's output, or [hidden, I] of the inside."""
        self._build(self._decoder.add_product, product.packed, of_attention, _norm(norm))

    def add_experts(self, experts: Experts, *, norm: NormWeights | None = None) -> None:
        """Add to the residual stream the mixture of the norm before it, through `norm` if there is one."""
        self._build(self._decoder.add_experts, experts.mixture, _norm(norm))

    @property
    def expert_bytes(self) -> int:
        """Bytes of experts that all steps read: of each layer and stretch the distinct ones that its tokens chose."""
        return self._decoder.expert_bytes

    @staticmethod
    def _build(call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except ValueError as error:
            raise InvalidInputError(str(error)) from error

    def prepare(self, num_tokens: int) -> None:
        """Allocate the buffers of steps of up to `num_tokens` tokens, and their pages, before the first step."""
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
        input_norms: NDArray[np.float32] | None = None,
        frequencies: NDArray[np.float32] | None = None,
        slot_positions: NDArray[np.int64] | None = None,
    ) -> None:
        """Process ids [T] at positions [T] of B sequences (cu_seqlens [B + 1], rows seq_rows [B] of the lane table).

        The lanes' `end` already counts the new tokens; their K and V are written. For the tokens logit_rows [R]:
        `logits` [R, vocab] and `greedy` [R] (first arg max) are filled if given; `hidden` [T, hidden] receives the
        normed final states; `queries` [L, Q, H Dk] the rotated, unscaled queries of tokens query_rows [Q]; `lse`
        [L, T, H] the log-sum-exp of every row; `input_norms` [L, T] the 2-norm of the stream before each layer.
        `bias` [num_seqs, num_lanes, slots] is added to scores. `frequencies` [ropes, B, R] replace those of the ropes.
        `slot_positions` [num_seqs, 2] are, by row of the lane table, the address of int32 positions [lanes, S] of the
        tokens in the slots and S, or zeros where slots are as far apart as their tokens: for ALiBi.
        Raises InvalidInputError if ids, rows or lane bounds do not fit.
        """
        follow_torch()
        try:
            self._decoder.step(
                lanes.view, ids, positions, cu_seqlens, seq_rows, logit_rows, logits, greedy, hidden, query_rows,
                queries, lse, bias, input_norms, frequencies, slot_positions,
            )  # fmt: skip
        except ValueError as error:
            raise InvalidInputError(str(error)) from error


def _floats(x: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = x.detach().to(torch.float32).contiguous().numpy()
    return array


def _norm(norm: NormWeights | None) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, bool, float] | None:
    if norm is None:
        return None
    return _floats(norm.weight), None if norm.bias is None else _floats(norm.bias), norm.centred, norm.eps
