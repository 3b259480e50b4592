"""CompiledModel: weights packed once for the CPU kernels, which run a fused step in one call."""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from kvloom.attention.batch import AttentionBatch
from kvloom.cache.kvcache import KVCache, Layout
from kvloom.errors import UnsupportedError
from kvloom.kernels import reference
from kvloom.kernels.cpu import LayerShape, StepDecoder, linear
from kvloom.models.compiled_weights import CompiledWeights
from kvloom.models.laneview import LaneView
from kvloom.models.lowering import lower_input, lower_layer, lower_output
from kvloom.models.model import StepOutput, StepWanted
from kvloom.models.mxfp4 import Mxfp4Weight
from kvloom.models.parts import Add, AddExperts, Append, Attend, Heads, Norm, Part, Up
from kvloom.models.rope import amplitudes, inverse_frequencies
from kvloom.spec.decoder import DecoderConfig, RopeConfig
from kvloom.spec.kernels import BLOCK_SLOTS, unsupported
from kvloom.spec.packing import products_of

PRODUCT_OF = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Compute dtype of a model of that dtype when it is not quantised."""


class CompiledModel:
    """A decoder with one packed copy of its weights, whose steps are single calls (see `Model`).

    `tensors` are the canonical weights in any order. Each is packed and released as soon as those that it is joined
    with have been read, so that loading needs one product beside the packed model. `quantization` "int8" stores all
    weights in int8 with a scale per row, "int4" those of layers in int4 with a scale and an offset for every 32 inputs
    of a row, and embedding and output layer in int8; "w8a8" is int8 that also quantises activations, with embedding and
    output layer in `dtype`; None changes nothing, and experts in MXFP4 then stay so. A table of learned positions stays
    in `dtype`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        tensors: Iterable[tuple[str, torch.Tensor | Mxfp4Weight]],
        dtype: torch.dtype,
        quantization: str | None = None,
    ) -> None:
        reasons = unsupported(config, BLOCK_SLOTS)
        if reasons:
            raise UnsupportedError("CPU kernels", reasons)
        self.name = "cpu"
        self.layout: Layout = "cpu"
        self.computes_in_torch = False
        self.config = config
        self.device = torch.device("cpu")
        product, output_product = products_of(PRODUCT_OF[dtype], quantization)
        self._weights = CompiledWeights(
            config, tensors, product=product, output_product=output_product, table_product=PRODUCT_OF[dtype]
        )
        first = lower_input(config)
        self._decoder = StepDecoder(
            self._weights.embedding,
            bf16=dtype == torch.bfloat16,
            embedding_scale=float(torch.tensor(first.scale, dtype=dtype)),
            positions=self._weights.positions,
            embedding_norm=self._weights.norm(first.norm),
        )
        self._ropes: list[RopeConfig] = []  # the distinct ones; a model has one or two
        self._frequencies_of = lru_cache(maxsize=4096)(self._own_frequencies)
        self._add_layers()
        last = lower_output(config)
        norm = self._weights.norm(last.norm)
        assert norm is not None
        self._decoder.set_output(self._weights.output, norm, last.scale, last.softcap or 0.0)
        self._view = LaneView()
        self._queries: NDArray[np.float32] = np.empty(0, np.float32)
        self._logits: NDArray[np.float32] = np.empty((0, config.vocab_size), np.float32)

    # ---- loading --------------------------------------------------------------------------------------------------

    def _add_layers(self) -> None:
        config, width = self.config, self.config.head_dim
        offsets = config.kv_spec(BLOCK_SLOTS, "fp32").lane_offset
        for layer in config.layers:
            if layer.rope is not None and layer.rope not in self._ropes:
                self._ropes.append(layer.rope)
                self._decoder.add_rope(inverse_frequencies(layer.rope, width), amplitudes(layer.rope, width))
        for index, layer in enumerate(config.layers):
            shape = LayerShape(config.num_heads, config.num_kv_heads, width, width, offsets[index], layer.window or 0)
            self._decoder.add_layer(shape)
            for part in lower_layer(config, index):
                self._add_part(part)

    def _add_part(self, part: Part) -> None:
        decoder, weights = self._decoder, self._weights
        match part:
            case Norm():
                decoder.add_norm(weights.norm(part.norm))
            case Heads():
                decoder.add_heads(weights.product(part.product))
            case Append():
                decoder.add_append(
                    weights.norm(part.q_norm),
                    weights.norm(part.k_norm),
                    -1 if part.rope is None else self._ropes.index(part.rope),
                    part.clip or 0.0,
                    place="layer" if part.over_heads else "rotated" if part.after_rope else "head",
                    temperature=part.temperature,
                )
            case Attend():
                slopes = torch.tensor(part.slopes) if part.slopes else None
                sinks = weights.vector(part.sinks)
                decoder.add_attend(part.scale, part.softcap or 0.0, sinks, slopes, part.chunk or 0)
            case Up():
                decoder.add_up(weights.product(part.product), part.activation, *weights.curve(part))
            case Add():
                product, norm = weights.product(part.product), weights.norm(part.norm)
                decoder.add_product(product, of_attention=part.of_attention, norm=norm)
            case AddExperts():
                decoder.add_experts(weights.mixture(part), norm=weights.norm(part.norm))

    # ---- running --------------------------------------------------------------------------------------------------

    def prepare(self, num_tokens: int) -> None:
        """Allocate the buffers of steps of up to `num_tokens` tokens now (see `Model`)."""
        self._decoder.prepare(num_tokens)

    def step(self, batch: AttentionBatch, cache: KVCache, wanted: StepWanted) -> StepOutput:
        """Process the batch in one call of the kernels (see `Model`)."""
        config, count = self.config, len(wanted.logit_rows)
        lanes = self._view.of(batch, cache)
        greedy = np.empty(count, np.int32)
        logits = np.empty((count, config.vocab_size), np.float32) if wanted.logits else self._memory_for_logits(count)
        hidden = np.empty((batch.num_tokens, config.hidden_size), np.float32) if wanted.hidden else None
        queries = None
        if wanted.query_rows is not None:
            queries = self._memory_for_queries(len(wanted.query_rows))
        lse, rows = None, wanted.query_rows
        if wanted.lse and rows is not None:
            lse = np.empty((config.num_layers, batch.num_tokens, config.num_heads), np.float32)
        norms = np.empty((config.num_layers, batch.num_tokens), np.float32) if wanted.input_norms else None
        self._decoder.step(
            lanes,
            batch.token_ids,
            batch.positions,
            batch.cu_seqlens_q,
            batch.sequences,
            wanted.logit_rows,
            logits=logits,
            greedy=greedy,
            hidden=hidden,
            query_rows=wanted.query_rows,
            queries=queries,
            lse=lse,
            bias=self._view.bias(batch, cache),
            input_norms=norms,
            frequencies=self._frequencies(batch),
            slot_positions=self._view.positions(batch, cache) if config.slopes else None,
        )
        greedy[~np.isfinite(logits[np.arange(count), greedy])] = -1
        return StepOutput(
            greedy=greedy.tolist(),
            logits=torch.from_numpy(logits) if wanted.logits else None,
            hidden=None if hidden is None else torch.from_numpy(hidden),
            queries=None
            if queries is None
            else torch.from_numpy(queries).view(*queries.shape[:2], config.num_heads, config.head_dim),
            input_norms=None if norms is None else torch.from_numpy(norms),
            lse=None if lse is None or rows is None else torch.from_numpy(lse.take(rows, axis=1)),
        )

    def _memory_for_logits(self, rows: int) -> NDArray[np.float32]:
        """Return memory for logits [rows, vocab] that the caller does not keep; valid until the next step."""
        if len(self._logits) < rows:
            self._logits = np.empty((rows, self.config.vocab_size), np.float32)
        return self._logits[:rows]

    def _memory_for_queries(self, rows: int) -> NDArray[np.float32]:
        """Return [L, rows, H * D] of memory that every step reuses: new pages would cost more than the copy."""
        shape = (self.config.num_layers, rows, self.config.num_heads * self.config.head_dim)
        needed = int(np.prod(shape))
        if self._queries.size < needed:
            self._queries = np.empty(needed, np.float32)
        return self._queries[:needed].reshape(shape)

    def _frequencies(self, batch: AttentionBatch) -> NDArray[np.float32] | None:
        """Return theta [ropes, B, D / 2] of each sequence, None where it depends on no length."""
        if batch.length_class is None or not any(rope.depends_on_length for rope in self._ropes):
            return None
        classes = batch.length_class.tolist()
        return np.stack([[self._frequencies_of(rope, own) for own in classes] for rope in range(len(self._ropes))])

    def _own_frequencies(self, rope: int, length_class: int) -> NDArray[np.float32]:
        theta: NDArray[np.float32] = inverse_frequencies(self._ropes[rope], self.config.head_dim, length_class).numpy()
        return theta

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [N, vocab] float32 of normalised hidden states (see `Model`)."""
        out = torch.empty(len(hidden), self.config.vocab_size)
        linear(hidden.contiguous(), self._weights.output, out=out)
        if self.config.logit_scale != 1.0:
            out *= self.config.logit_scale
        cap = self.config.logit_softcap
        return out if cap is None else reference.softcap(out, cap)

    def inverse_frequencies(self, layer: int, length_class: int = 0) -> torch.Tensor | None:
        """Return theta [D / 2] of the layer's rope for texts of `length_class`, None without rope (see `Model`)."""
        rope = self.config.layers[layer].rope
        return None if rope is None else inverse_frequencies(rope, self.config.head_dim, length_class)

    def output_weight(self, layer: int) -> torch.Tensor:
        """Return W_O [hidden, H * D] in float32, with the values that the kernels multiply (see `Model`)."""
        parts = lower_layer(self.config, layer)
        [o] = [part.product for part in parts if isinstance(part, Add) and part.of_attention]
        packed = self._weights.product(o)
        return torch.stack([packed.row(i) for i in range(packed.shape[0])])

    @property
    def expert_bytes(self) -> int:
        """Bytes of experts that all steps read so far (see `StepDecoder.expert_bytes`)."""
        return self._decoder.expert_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights (see `Model`)."""
        return self._weights.num_bytes
