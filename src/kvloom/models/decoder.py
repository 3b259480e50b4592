"""Decoder: one transformer decoder for all families; the differences are data in `DecoderConfig`."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from kvloom.attention.backend import AttentionBackend
from kvloom.attention.batch import AttentionBatch
from kvloom.cache.kvcache import KVCache
from kvloom.kernels import reference
from kvloom.models.config import DecoderConfig, RopeConfig
from kvloom.models.rope import cos_sin, inverse_frequencies

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
        ropes: list[RopeConfig] = []  # the distinct ones; a model has one or two
        for layer in config.layers:
            if layer.rope is not None and layer.rope not in ropes:
                ropes.append(layer.rope)
        self._theta = [inverse_frequencies(rope, config.head_dim).to(self.device) for rope in ropes]
        self._rope_of = [ropes.index(layer.rope) if layer.rope is not None else None for layer in config.layers]

    def inverse_frequencies(self, layer: int) -> torch.Tensor | None:
        """Return theta [D / 2] of the layer's rope, None without rope."""
        rope = self._rope_of[layer]
        return None if rope is None else self._theta[rope]

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
        token_ids = torch.from_numpy(batch.token_ids).to(self.device, torch.int64)
        positions = torch.from_numpy(batch.positions).to(self.device, torch.int64)
        x = F.embedding(token_ids, self.embed)
        if config.embedding_scale != 1.0:
            x = x * self.embedding_scale
        rotations = [cos_sin(theta, positions) for theta in self._theta]
        for layer in range(config.num_layers):
            if input_observer is not None:
                input_observer(layer, x)
            x = self._attention(layer, x, rotations, batch, cache, backend, observer)
            x = self._mlp(layer, x)
        return self._norm(x, "final_norm")

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [N, vocab] in float32 of normalised hidden states [N, hidden]."""
        return F.linear(hidden, self.lm_head).float()

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return reference.rms_norm(x, self.weights[name], self.config.norm_eps)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[name], self.weights.get(f"{name}_bias"))

    def _attention(
        self,
        layer: int,
        x: torch.Tensor,
        rotations: Rotations,
        batch: AttentionBatch,
        cache: KVCache,
        backend: AttentionBackend,
        observer: QueryObserver | None,
    ) -> torch.Tensor:
        config, at = self.config, f"layers.{layer}."
        normal = self._norm(x, at + "attn_norm")
        q = self._linear(normal, at + "q").view(-1, config.num_heads, config.head_dim)
        k = self._linear(normal, at + "k").view(-1, config.num_kv_heads, config.head_dim)
        v = self._linear(normal, at + "v").view(-1, config.num_kv_heads, config.head_dim)
        if config.qk_norm:
            q, k = self._norm(q, at + "q_norm"), self._norm(k, at + "k_norm")
        rope = self._rope_of[layer]
        if rope is not None:
            q, k = (reference.apply_rope(t, *rotations[rope]) for t in (q, k))
        backend.append(layer, k, v, batch, cache)
        if observer is not None:
            observer(layer, q)
        out = backend.attend(layer, q, config.query_scale, batch, cache)
        out = self._linear(out.flatten(1), at + "o")
        if config.sandwich_norm:
            out = self._norm(out, at + "post_attn_norm")
        return x + out

    def _mlp(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        at = f"layers.{layer}."
        normal = self._norm(x, at + "mlp_norm")
        gate = self._linear(normal, at + "gate")
        gate = F.silu(gate) if self.config.activation == "silu" else F.gelu(gate, approximate="tanh")
        out = self._linear(gate * self._linear(normal, at + "up"), at + "down")
        if self.config.sandwich_norm:
            out = self._norm(out, at + "post_mlp_norm")
        return x + out
