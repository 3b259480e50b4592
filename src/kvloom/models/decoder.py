"""Decoder: one transformer decoder for all families; the differences are data in `DecoderConfig`."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F

from kvloom.attention.backend import NO_TERMS, AttentionBackend, ScoreTerms
from kvloom.attention.batch import AttentionBatch
from kvloom.cache.kvcache import KVCache
from kvloom.kernels import reference
from kvloom.models.mlp import experts, mlp
from kvloom.models.rope import amplitudes, cos_sin, inverse_frequencies
from kvloom.spec.decoder import DecoderConfig, RopeConfig

QueryObserver = Callable[[int, torch.Tensor], None]
"""Called once a layer with its number and the rotated queries [T, H, D], when K and V of the batch are in the lanes."""

Rotations = list[tuple[torch.Tensor, torch.Tensor]]


class Decoder:
    """Weights in, logits out. K and V go to the cache through the attention backend and live nowhere else."""

    def __init__(self, config: DecoderConfig, weights: Mapping[str, torch.Tensor]) -> None:
        """Take the canonical `weights` of `config`: matrices [out, in], norm weights [D] in float32."""
        self.config = config
        self.weights = weights
        self.embed = weights["embed"]
        self.dtype = self.embed.dtype
        self.device = self.embed.device
        self.lm_head = weights.get("lm_head", self.embed)
        # Gemma rounds sqrt(hidden) to the dtype of its embeddings before multiplying.
        self.embedding_scale = float(torch.tensor(config.embedding_scale, dtype=self.dtype))
        self._ropes: list[RopeConfig] = []  # the distinct ones; a model has one or two
        for layer in config.layers:
            if layer.rope is not None and layer.rope not in self._ropes:
                self._ropes.append(layer.rope)
        self._rope_of = [self._ropes.index(layer.rope) if layer.rope is not None else None for layer in config.layers]
        self._amplitude = [amplitudes(rope, config.head_dim).to(self.device) for rope in self._ropes]
        self._terms = [self._terms_of(layer) for layer in range(config.num_layers)]

    def _terms_of(self, layer: int) -> ScoreTerms:
        config, sinks = self.config, self.weights.get(f"layers.{layer}.sinks")
        slopes = torch.tensor(config.slopes, device=self.device) if config.slopes else None
        if config.score_softcap is None and slopes is None and sinks is None:
            return NO_TERMS
        return ScoreTerms(config.score_softcap, slopes, sinks)

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

        `input_observer` is shown the input [T, hidden] of each layer.
        """
        config = self.config
        positions = torch.from_numpy(batch.positions).to(self.device, torch.int64)
        x = self._embedded(batch, positions)
        rotations = self._rotations(batch, positions)
        for layer in range(config.num_layers):
            if input_observer is not None:
                input_observer(layer, x)
            normal = self._norm(x, f"layers.{layer}.attn_norm")
            out = self._attention(layer, normal, rotations, batch, cache, backend, observer)
            if config.parallel_residual:
                if not config.shared_norm:
                    normal = self._norm(x, f"layers.{layer}.mlp_norm")
                x = x + out + self._mlp(layer, normal)
            else:
                x = x + out
                x = x + self._mlp(layer, self._norm(x, f"layers.{layer}.mlp_norm"))
        return self._norm(x, "final_norm")

    def _embedded(self, batch: AttentionBatch, positions: torch.Tensor) -> torch.Tensor:
        """Return the input [T, hidden] of the first layer."""
        x = F.embedding(torch.from_numpy(batch.token_ids).to(self.device, torch.int64), self.embed)
        if self.config.embedding_scale != 1.0:
            x = x * self.embedding_scale
        if self.config.learned_positions:
            x = x + F.embedding(positions, self.weights["positions"])
        return self._norm(x, "embed_norm") if self.config.embed_norm else x

    def _rotations(self, batch: AttentionBatch, positions: torch.Tensor) -> Rotations:
        """Return cosines and sines [T, D / 2] of every rope; each sequence is rotated by what its length asks for."""
        found: Rotations = []
        for rope, amplitude in zip(self._ropes, self._amplitude, strict=True):
            if rope.depends_on_length and batch.length_class is not None:
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
        logits = F.linear(hidden, self.lm_head).float()
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else reference.softcap(logits, cap)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if self.config.norm == "rms":
            return reference.rms_norm(x, self.weights[name], self.config.norm_eps)
        return reference.layer_norm(x, self.weights[name], self.weights.get(f"{name}_bias"), self.config.norm_eps)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[name], self.weights.get(f"{name}_bias"))

    def _attention(
        self,
        layer: int,
        normal: torch.Tensor,
        rotations: Rotations,
        batch: AttentionBatch,
        cache: KVCache,
        backend: AttentionBackend,
        observer: QueryObserver | None,
    ) -> torch.Tensor:
        """Return what attention adds to the residual [T, hidden], from its normalised input; mutates the lanes."""
        config, at = self.config, f"layers.{layer}."
        q, k, v = (self._linear(normal, at + name) for name in "qkv")
        if config.qkv_clip is not None:
            q, k, v = (t.clamp(-config.qkv_clip, config.qkv_clip) for t in (q, k, v))
        q = q.view(-1, config.num_heads, config.head_dim)
        k, v = (t.view(-1, config.num_kv_heads, config.head_dim) for t in (k, v))
        if config.qk_norm:
            q, k = self._norm(q, at + "q_norm"), self._norm(k, at + "k_norm")
        rope = self._rope_of[layer]
        if rope is not None:
            q, k = (reference.apply_rope(t, *rotations[rope]) for t in (q, k))
        backend.append(layer, k, v, batch, cache)
        if observer is not None:
            observer(layer, q)
        terms = self._terms[layer]
        given = () if terms is NO_TERMS else (terms,)
        out = backend.attend(layer, q, config.query_scale, batch, cache, *given)
        out = self._linear(out.flatten(1), at + "o")
        return self._norm(out, at + "post_attn_norm") if config.sandwich_norm else out

    def _mlp(self, layer: int, normal: torch.Tensor) -> torch.Tensor:
        """Return what the MLP adds to the residual [T, hidden], from its normalised input."""
        at = f"layers.{layer}."
        out = (experts if self.config.layers[layer].routed else mlp)(normal, self.weights, at, self.config)
        return self._norm(out, at + "post_mlp_norm") if self.config.sandwich_norm else out
