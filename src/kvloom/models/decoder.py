"""Decoder: the reference decoder, which executes the parts of every model's layers one by one in torch."""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from kvloom.attention.backend import NO_TERMS, AttentionBackend, ScoreTerms
from kvloom.attention.batch import AttentionBatch
from kvloom.cache.kvcache import KVCache
from kvloom.kernels import reference
from kvloom.models.lowering import lower_input, lower_layer, lower_output
from kvloom.models.mlp import ACTIVATIONS, experts, xielu
from kvloom.models.parts import Add, AddExperts, Append, Attend, Heads, Norm, NormSpec, ProductSpec, Up
from kvloom.models.rope import amplitudes, cos_sin, inverse_frequencies
from kvloom.models.whole_sequences import WholeSequences
from kvloom.spec.decoder import DecoderConfig, RopeConfig

QueryObserver = Callable[[int, torch.Tensor], None]
"""Called once a layer with its number and the rotated queries [T, H, D], when K and V of the batch are in the lanes."""

Rotations = list[tuple[torch.Tensor, torch.Tensor]]


class Memory(Protocol):
    """Storage of keys and values: holds those of earlier tokens and takes those of the step."""

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keep k and v [T, G, D] of the step's tokens."""

    def attend(self, layer: int, q: torch.Tensor, scale: float, terms: ScoreTerms) -> torch.Tensor:
        """Return attention [T, H, D] of q [T, H, D] over the kept tokens, the step's own included."""


def warmth(positions: torch.Tensor, period: float, scale: float) -> torch.Tensor:
    """Return what multiplies queries at positions [T] in float32 (`models.parts.Append`)."""
    return 1 + scale * torch.log1p(torch.floor((positions.float() + 1) / period))


class LaneMemory:
    """The lanes of a cache, through an attention backend."""

    def __init__(self, batch: AttentionBatch, cache: KVCache, backend: AttentionBackend) -> None:
        self._batch, self._cache, self._backend = batch, cache, backend

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k and v into the lanes of `layer` (see `Memory`)."""
        self._backend.append(layer, k, v, self._batch, self._cache)

    def attend(self, layer: int, q: torch.Tensor, scale: float, terms: ScoreTerms) -> torch.Tensor:
        """Return attention over the lanes of `layer` (see `Memory`)."""
        given = () if terms is NO_TERMS else (terms,)
        return self._backend.attend(layer, q, scale, self._batch, self._cache, *given)


class Decoder:
    """Computes logits from weights. K and V are stored in the cache by the attention backend and nowhere else."""

    def __init__(self, config: DecoderConfig, weights: Mapping[str, torch.Tensor]) -> None:
        """Take the canonical `weights` of `config`: matrices [out, in], norm weights [D] in float32."""
        self.config = config
        self.weights = weights
        self.embed = weights["embed"]
        self.dtype = self.embed.dtype
        self.device = self.embed.device
        self.lm_head = weights.get("lm_head", self.embed)
        self._input, self._output = lower_input(config), lower_output(config)
        self._head_bias = weights["lm_head_bias"] if self._output.biased else None
        self._layers = [lower_layer(config, index) for index in range(config.num_layers)]
        # Gemma rounds sqrt(hidden) to the dtype of its embeddings before multiplying.
        self.embedding_scale = float(torch.tensor(self._input.scale, dtype=self.dtype))
        self._ropes: list[RopeConfig] = []  # the distinct ones; a model has one or two
        for layer in config.layers:
            if layer.rope is not None and layer.rope not in self._ropes:
                self._ropes.append(layer.rope)
        self._amplitude = [amplitudes(rope, config.head_dim).to(self.device) for rope in self._ropes]
        attends = [part for parts in self._layers for part in parts if isinstance(part, Attend)]
        self._terms = {part: self._terms_of(part) for part in attends}

    def _terms_of(self, part: Attend) -> ScoreTerms:
        slopes = torch.tensor(part.slopes, device=self.device) if part.slopes else None
        sinks = None if part.sinks is None else self.weights[part.sinks]
        if part.softcap is None and slopes is None and sinks is None and part.chunk is None:
            return NO_TERMS
        return ScoreTerms(part.softcap, slopes, sinks, part.chunk)

    def inverse_frequencies(self, layer: int, length_class: int = 0) -> torch.Tensor | None:
        """Return theta [D / 2] of the layer's rope for texts of `length_class`, None without rope."""
        rope = self.config.layers[layer].rope
        return None if rope is None else inverse_frequencies(rope, self.config.head_dim, length_class).to(self.device)

    def output_weight(self, layer: int) -> torch.Tensor:
        """Return the projection after attention, W_O [hidden, H * D], in float32."""
        return self.weights[f"layers.{layer}.o"].float()

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights, tied ones once."""
        return sum(w.numel() * w.element_size() for w in self.weights.values())

    @torch.inference_mode()
    def forward(
        self,
        batch: AttentionBatch,
        cache: KVCache,
        backend: AttentionBackend,
        observer: QueryObserver | None = None,
        input_observer: QueryObserver | None = None,
    ) -> torch.Tensor:
        """Return the final hidden states [T, hidden], normalised, of the batch; mutates its lanes in `cache`.

        `input_observer` is called with the input [T, hidden] of each layer.
        """
        ids = torch.from_numpy(batch.token_ids).to(self.device, torch.int64)
        positions = torch.from_numpy(batch.positions).to(self.device, torch.int64)
        rotations = self._rotations(positions, batch)
        memory = LaneMemory(batch, cache, backend)
        return self.hidden_states(ids, positions, rotations, memory, observer, input_observer)

    def hidden_states(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        rotations: Rotations,
        memory: Memory,
        observer: QueryObserver | None = None,
        input_observer: QueryObserver | None = None,
    ) -> torch.Tensor:
        """Return the final hidden states [T, hidden], normalised, of tokens ids [T] at positions [T], both int64."""
        x = self._embedded(ids, positions)
        for layer in range(self.config.num_layers):
            if input_observer is not None:
                input_observer(layer, x)
            x = self._layer(layer, x, positions, rotations, memory, observer)
        return self._norm(x, self._output.norm)

    def sequence_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits [B, T, vocab] in float32 of sequences ids [B, T] int64 from their start, without any cache.

        Gradients flow to every weight that requires one. Rotary embeddings are those of short texts.
        """
        count, length = ids.shape
        positions = torch.arange(length, device=self.device).repeat(count)
        memory = WholeSequences(count, tuple(layer.window for layer in self.config.layers))
        hidden = self.hidden_states(ids.flatten(), positions, self._rotations(positions), memory)
        return self._logits(hidden).view(count, length, -1)

    def _layer(
        self,
        layer: int,
        x: torch.Tensor,
        positions: torch.Tensor,
        rotations: Rotations,
        memory: Memory,
        observer: QueryObserver | None,
    ) -> torch.Tensor:
        """Return the output [T, hidden] of a layer; x is its input."""
        config = self.config
        normal = attended = inner = q = k = v = x  # each is computed by the part before the one that reads it
        for part in self._layers[layer]:
            match part:
                case Norm():
                    normal = self._norm(x, part.norm)
                case Heads():
                    q, k, v = self._products(normal, part.product)
                    q = q.view(-1, config.num_heads, config.head_dim)
                    k, v = (t.view(-1, config.num_kv_heads, config.head_dim) for t in (k, v))
                case Append():
                    if part.clip is not None:
                        q, k, v = (t.clamp(-part.clip, part.clip) for t in (q, k, v))
                    if part.over_heads:
                        norms = ((q, part.q_norm), (k, part.k_norm))
                        q, k = (self._norm(heads.flatten(1), norm).view_as(heads) for heads, norm in norms)
                    elif not part.after_rope:
                        q, k = self._norm(q, part.q_norm), self._norm(k, part.k_norm)
                    if part.rope is not None:
                        turn = rotations[self._ropes.index(part.rope)]
                        q, k = (reference.apply_rope(t, *turn) for t in (q, k))
                    if part.after_rope:
                        q, k = self._norm(q, part.q_norm), self._norm(k, part.k_norm)
                    if part.temperature is not None:
                        q = q * warmth(positions, *part.temperature)[:, None, None].to(q.dtype)
                    memory.append(layer, k, v)
                    if observer is not None:
                        observer(layer, q)
                case Attend():
                    attended = memory.attend(layer, q, part.scale, self._terms[part]).flatten(1)
                case Up():
                    first, *rest = self._products(normal, part.product)
                    if part.curve:
                        inner = xielu(first, *(self.weights[name] for name in part.curve))
                    else:
                        inner = ACTIVATIONS[part.activation](first)
                    inner = inner * rest[0] if rest else inner
                case Add():
                    [out] = self._products(attended if part.of_attention else inner, part.product)
                    x = x + self._norm(out, part.norm)
                case AddExperts():
                    x = x + self._norm(experts(normal, self.weights, part.at, config), part.norm)
        return x

    def _embedded(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the input [T, hidden] of the first layer."""
        x = F.embedding(ids, self.embed)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        if self._input.learned:
            x = x + F.embedding(positions, self.weights["positions"])
        return self._norm(x, self._input.norm)

    def _rotations(self, positions: torch.Tensor, batch: AttentionBatch | None = None) -> Rotations:
        """Return cosines and sines [T, D / 2] of every rope, for the length class of each sequence."""
        found: Rotations = []
        for rope, amplitude in zip(self._ropes, self._amplitude, strict=True):
            if rope.depends_on_length and batch is not None and batch.length_class is not None:
                thetas = [inverse_frequencies(rope, self.config.head_dim, int(n)) for n in batch.length_class]
                counts = torch.from_numpy(np.diff(batch.cu_seqlens_q).astype(np.int64))
                theta = torch.stack(thetas).repeat_interleave(counts, dim=0)
            else:
                theta = inverse_frequencies(rope, self.config.head_dim)
            found.append(cos_sin(theta.to(self.device), positions, amplitude if rope.amplitude != 1.0 else None))
        return found

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [N, vocab] in float32 of normalised hidden states [N, hidden]."""
        return self._logits(hidden)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, self.lm_head, self._head_bias).float()
        if self._output.scale != 1.0:
            logits = logits * self._output.scale
        cap = self._output.softcap
        return logits if cap is None else reference.softcap(logits, cap)

    def _norm(self, x: torch.Tensor, norm: NormSpec | None) -> torch.Tensor:
        """Return the norm of x [..., D] over its last dimension, x itself where there is none."""
        if norm is None:
            return x
        weight = None if norm.weight is None else self.weights[norm.weight]
        if not norm.centred or weight is None:
            return reference.rms_norm(x, weight, norm.eps)
        bias = self.weights[f"{norm.weight}_bias"] if norm.biased else None
        return reference.layer_norm(x, weight, bias, norm.eps)

    def _products(self, x: torch.Tensor, product: ProductSpec) -> list[torch.Tensor]:
        """Return x [T, in] times each matrix of the product."""
        return [
            F.linear(x, self.weights[name], self.weights[f"{name}_bias"] if product.biased else None)
            for name in product.weights
        ]
