"""CompiledModel: weights packed once for the CPU kernels, which run a whole step in one call."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from kvloom.attention.batch import AttentionBatch
from kvloom.cache.kvcache import KVCache, Layout
from kvloom.errors import UnsupportedError
from kvloom.kernels import reference
from kvloom.kernels.cpu import Lanes, LayerShape, LayerWeights, PackedWeight, StepDecoder, linear
from kvloom.models.model import StepOutput, StepWanted
from kvloom.models.rope import inverse_frequencies
from kvloom.spec.decoder import DecoderConfig, RopeConfig
from kvloom.spec.packing import products_of

PRODUCT_OF = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Numbers in which a model of that dtype multiplies when it is not quantised."""

BLOCK_SLOTS = 16
"""Blocks must hold a multiple of this many tokens."""


def unsupported(config: DecoderConfig, block_size: int) -> list[str]:
    """Return every reason why the CPU kernels cannot run `config`; [] means that they can."""
    reasons = []
    if config.head_dim % 16 or config.head_dim > 384:
        reasons.append(f"head_dim is {config.head_dim}; the kernels take multiples of 16 up to 384")
    if config.activation not in ("silu", "gelu_tanh"):
        reasons.append(f"activation {config.activation!r} is not one of silu, gelu_tanh")
    reasons += [reason for applies, reason in _mathematics(config) if applies]
    if block_size % BLOCK_SLOTS:
        reasons.append(f"block_size is {block_size}; the kernels take multiples of {BLOCK_SLOTS}")
    return reasons


def _mathematics(config: DecoderConfig) -> list[tuple[bool, str]]:
    """Return pairs of (whether it applies to `config`, why the kernels cannot run it)."""
    ropes = [layer.rope for layer in config.layers if layer.rope is not None]
    uneven = any(rope.amplitude != 1.0 and rope.rotary is not None for rope in ropes)
    return [
        (config.norm != "rms", "it has LayerNorms; the kernels have RMSNorm"),
        (config.embed_norm, "it has a norm after the embedding"),
        (config.parallel_residual, "attention and MLP are parallel"),
        (not config.gated, "the MLP has no gate"),
        (config.mlp_bias, "the MLP has biases"),
        (config.experts is not None, "it has a mixture of experts"),
        (config.learned_positions, "positions are learned"),
        (config.qkv_clip is not None, "q, k and v are clipped"),
        (config.logit_scale != 1.0, "logits are scaled"),
        (any(rope.depends_on_length for rope in ropes), "its rotary embedding depends on the length of a text"),
        (uneven, "heads are rotated in part, with an amplitude"),
    ]


class CompiledModel:
    """A decoder whose weights exist once, packed, and whose steps are single calls (see `Model`).

    `tensors` are the canonical weights in any order, not kept: each is packed and let go as soon as its layer is
    complete, so that loading needs one layer beside the packed model. `quantization` "int8" stores all weights in int8
    with a scale per row, "int4" those of layers in int4 with a scale and an offset for every 32 inputs of a row, and
    embedding and output layer in int8; "w8a8" is int8 that also quantises activations, with embedding and output layer
    in `dtype`; None changes nothing.
    """

    def __init__(
        self,
        config: DecoderConfig,
        tensors: Iterable[tuple[str, torch.Tensor]],
        dtype: torch.dtype,
        quantization: str | None = None,
    ) -> None:
        reasons = unsupported(config, BLOCK_SLOTS)
        if reasons:
            raise UnsupportedError("CPU kernels", reasons)
        self.name = "cpu"
        self.layout: Layout = "cpu"
        self.shows_layer_inputs = False
        self.config = config
        self.device = torch.device("cpu")
        self._product, self._output_product = products_of(PRODUCT_OF[dtype], quantization)
        self._packed: dict[str, PackedWeight] = {}
        self._vectors: dict[str, torch.Tensor] = {}
        self._pack_all(tensors)
        self._output = self._packed.get("lm_head", self._packed["embed"])
        self._decoder = StepDecoder(
            self._packed["embed"],
            self._output,
            self._vectors["final_norm"],
            config.norm_eps,
            bf16=dtype == torch.bfloat16,
            embedding_scale=float(torch.tensor(config.embedding_scale, dtype=dtype)),
            logit_softcap=config.logit_softcap or 0.0,
        )
        self._theta: list[torch.Tensor] = []
        self._rope_of: list[int] = []
        self._add_layers()
        self._lanes: Lanes | None = None
        self._end: NDArray[np.int32] = np.zeros((0, 0), np.int32)
        self._seen_table: NDArray[np.int32] | None = None
        self._seen_segments = 0  # their version
        self._queries: NDArray[np.float32] = np.empty(0, np.float32)

    # ---- loading --------------------------------------------------------------------------------------------------

    def _pack_all(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Pack every weight; vectors of norms and sinks are kept as they are."""
        pending: dict[str, torch.Tensor] = {}
        before = ""
        for name, tensor in tensors:
            if name in ("embed", "lm_head"):
                self._packed[name] = PackedWeight(tensor.contiguous(), self._output_product)
                continue
            if name.endswith(("norm", "sinks")):
                self._vectors[name] = tensor.clone()
                continue
            layer = name.rpartition(".")[0] + "."
            if layer != before:
                self._pack_layer(before, pending)
                before = layer
            pending[name] = tensor
        for index in range(self.config.num_layers):
            self._pack_layer(f"layers.{index}.", pending)
        assert not pending, f"unknown weights: {sorted(pending)}"

    def _pack_layer(self, at: str, pending: dict[str, torch.Tensor]) -> None:
        """Pack the products of one layer if all their parts are pending; removes them from `pending`."""
        config = self.config
        parts: dict[str, tuple[str, ...]] = {
            "qkv": ("q", "k", "v"),
            "o": ("o",),
            "gate_up": ("gate", "up"),
            "down": ("down",),
        }
        biases = {"qkv": config.attention_bias, "o": config.output_bias}
        needed = [n for names in parts.values() for n in names]
        needed += [f"{n}_bias" for product, there in biases.items() if there for n in parts[product]]
        if any(at + name not in pending for name in needed):
            return
        for product, names in parts.items():
            matrices = [pending.pop(at + n) for n in names]
            weight = torch.cat(matrices) if len(matrices) > 1 else matrices[0].contiguous()
            bias = torch.cat([pending.pop(f"{at}{n}_bias").float() for n in names]) if biases.get(product) else None
            self._packed[at + product] = PackedWeight(weight, self._product, gated=product == "gate_up", bias=bias)

    def _add_layers(self) -> None:
        config = self.config
        ropes: list[RopeConfig] = []  # the distinct ones; a model has one or two
        offsets = config.kv_spec(BLOCK_SLOTS, "fp32").lane_offset
        heads, lanes, width = config.num_heads, config.num_kv_heads, config.head_dim
        for index, layer in enumerate(config.layers):
            at = f"layers.{index}."
            rope = -1
            if layer.rope is not None:
                if layer.rope not in ropes:
                    ropes.append(layer.rope)
                    self._theta.append(inverse_frequencies(layer.rope, width))
                    self._decoder.add_rope(self._theta[-1], layer.rope.amplitude)
                rope = ropes.index(layer.rope)
            self._rope_of.append(rope)
            self._decoder.add_layer(
                LayerWeights(
                    shape=LayerShape(heads, lanes, width, width, offsets[index], layer.window or 0),
                    qkv=self._packed[at + "qkv"],
                    o=self._packed[at + "o"],
                    gate_up=self._packed[at + "gate_up"],
                    down=self._packed[at + "down"],
                    attention_norm=self._vectors[at + "attn_norm"],
                    mlp_norm=self._vectors[at + "mlp_norm"],
                    post_attention_norm=self._vectors.get(at + "post_attn_norm"),
                    post_mlp_norm=self._vectors.get(at + "post_mlp_norm"),
                    q_norm=self._vectors.get(at + "q_norm"),
                    k_norm=self._vectors.get(at + "k_norm"),
                    sinks=self._vectors.get(at + "sinks"),
                    slopes=torch.tensor(config.slopes) if config.slopes else None,
                    rope=rope,
                    softcap=config.score_softcap or 0.0,
                    scale=config.query_scale,
                    activation=config.activation,
                )
            )

    # ---- running --------------------------------------------------------------------------------------------------

    def prepare(self, num_tokens: int) -> None:
        """Make the buffers of steps of up to `num_tokens` tokens now (see `Model`)."""
        self._decoder.prepare(num_tokens)

    def step(self, batch: AttentionBatch, cache: KVCache, wanted: StepWanted) -> StepOutput:
        """Process the batch in one call of the kernels (see `Model`)."""
        config, count = self.config, len(wanted.logit_rows)
        lanes = self._view(batch, cache)
        greedy = np.empty(count, np.int32)
        logits = np.empty((count, config.vocab_size), np.float32) if wanted.logits else None
        hidden = np.empty((batch.num_tokens, config.hidden_size), np.float32) if wanted.hidden else None
        queries = None
        if wanted.query_rows is not None:
            queries = self._memory_for_queries(len(wanted.query_rows))
        lse, rows = None, wanted.query_rows
        if wanted.lse and rows is not None:
            lse = np.empty((config.num_layers, batch.num_tokens, config.num_heads), np.float32)
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
            bias=self._bias(batch, cache),
        )
        return StepOutput(
            greedy=greedy.tolist(),
            logits=None if logits is None else torch.from_numpy(logits),
            hidden=None if hidden is None else torch.from_numpy(hidden),
            queries=None
            if queries is None
            else torch.from_numpy(queries).view(*queries.shape[:2], config.num_heads, config.head_dim),
            lse=None if lse is None or rows is None else torch.from_numpy(lse.take(rows, axis=1)),
        )

    def _memory_for_queries(self, rows: int) -> NDArray[np.float32]:
        """Return [L, rows, H * D] of memory that every step uses again: fresh pages would cost more than the copy."""
        shape = (self.config.num_layers, rows, self.config.num_heads * self.config.head_dim)
        needed = int(np.prod(shape))
        if self._queries.size < needed:
            self._queries = np.empty(needed, np.float32)
        return self._queries[:needed].reshape(shape)

    def _view(self, batch: AttentionBatch, cache: KVCache) -> Lanes:
        """Return the kernels' view of the lane table, which is made again only when the table itself was."""
        table = cache.lanes.table
        if self._lanes is None or self._seen_table is not table:
            self._end = np.zeros(table.shape[:2], np.int32)
            self._lanes = Lanes(
                cache.memory.bytes, table, cache.lanes.begin, self._end, cache.spec.block_size, cache.spec.store
            )
            self._seen_table, self._seen_segments = table, 0
        if cache.lanes.segments.version != self._seen_segments:
            self._lanes.set_segments(*cache.lanes.segments.arrays(), cache.lanes.segments.store_names)
            self._seen_segments = cache.lanes.segments.version
        rows = batch.sequences
        self._end[rows] = cache.lanes.begin[rows] + cache.lanes.held[rows]
        if self.config.slopes and any(int(row) in cache.lanes.positions for row in rows):
            raise UnsupportedError(
                "CPU kernels", ["ALiBi counts distances in slots there, and these lanes have lost tokens"]
            )
        return self._lanes

    def _bias(self, batch: AttentionBatch, cache: KVCache) -> NDArray[np.float32] | None:
        """Return what is added to scores [sequences, lanes, slots] where tokens were merged, None for nothing."""
        merged = [int(row) for row in batch.sequences if int(row) in cache.lanes.log_counts]
        if not merged:
            return None
        bias = np.zeros((*cache.lanes.table.shape[:2], cache.lanes.table.shape[2] * cache.spec.block_size), np.float32)
        for row in merged:
            values = cache.lanes.log_counts[row]
            width = min(values.shape[1], bias.shape[2])
            bias[row, :, :width] = values[:, :width]
        return bias

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [N, vocab] float32 of normalised hidden states (see `Model`)."""
        out = torch.empty(len(hidden), self.config.vocab_size)
        linear(hidden.contiguous(), self._output, out=out)
        cap = self.config.logit_softcap
        return out if cap is None else reference.softcap(out, cap)

    def inverse_frequencies(self, layer: int, length_class: int = 0) -> torch.Tensor | None:
        """Return theta [D / 2] of the layer's rope, which is of one length class here (see `Model`)."""
        rope = self._rope_of[layer]
        return None if rope < 0 else self._theta[rope]

    def output_weight(self, layer: int) -> torch.Tensor:
        """Return W_O [hidden, H * D] in float32 as the kernels see it (see `Model`)."""
        packed = self._packed[f"layers.{layer}.o"]
        return torch.stack([packed.row(i) for i in range(packed.shape[0])])

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights (see `Model`)."""
        norms = sum(w.numel() * w.element_size() for w in self._vectors.values())
        return norms + sum(packed.num_bytes for packed in self._packed.values())
