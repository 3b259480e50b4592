"""Weight: one canonical tensor of a decoder, with its name, shape and form in each file format. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvloom.spec.decoder import DecoderConfig, LayerConfig

if TYPE_CHECKING:
    from torch import Tensor

Transform = Callable[["Tensor", DecoderConfig], "Tensor"]
Shape = Callable[[DecoderConfig], tuple[int, ...]]


def as_stored(weight: Tensor, config: DecoderConfig) -> Tensor:
    """Return the tensor unchanged."""
    return weight


def always(config: DecoderConfig) -> bool:
    """Return True: every model of the family has the weight."""
    return True


def every_layer(layer: LayerConfig) -> bool:
    """Return True: every layer has the weight."""
    return True


@dataclass(frozen=True)
class Weight:
    """One tensor of the decoder, or of each of its layers when the names contain `{i}`.

    `name` is the canonical name and `shape` the canonical shape ([out, in] for matrices, [experts, out, in] for those
    of experts). `hf` and `gguf` are the names in safetensors and GGUF files; `from_hf` and `from_gguf` make the
    canonical values of what is stored, which has `hf_shape` and `gguf_shape` where these are not `shape`: several
    weights may be parts of one stored tensor. A name with `{e}` stands for one stored tensor of each expert; they are
    stacked, each of the canonical shape without its first dimension. Weights of norms (`is_norm`) stay in float32.
    Of a tensor that is stored in MXFP4, `mxfp4_rows` says the first row of the weight and how far apart its rows are.
    `when` says which configs have the weight at all, `on` which layers.
    """

    name: str
    hf: str
    gguf: str
    shape: Shape
    when: Callable[[DecoderConfig], bool] = always
    is_norm: bool = False
    from_hf: Transform = as_stored
    from_gguf: Transform = as_stored
    hf_shape: Shape | None = None
    gguf_shape: Shape | None = None
    mxfp4_rows: tuple[int, int] = (0, 1)
    on: Callable[[LayerConfig], bool] = every_layer

    @property
    def per_layer(self) -> bool:
        """True when each layer has one."""
        return "{i}" in self.name

    def sources(self, config: DecoderConfig, layer: int, gguf: bool) -> tuple[str, ...]:
        """Return the stored names that make up this weight in `layer`: one, or one for each expert."""
        name = (self.gguf if gguf else self.hf).replace("{i}", str(layer))
        if "{e}" not in name:
            return (name,)
        assert config.experts is not None, f"{self.name} is of experts"
        return tuple(name.replace("{e}", str(e)) for e in range(config.experts.count))

    def stored_shape(self, config: DecoderConfig, gguf: bool) -> tuple[int, ...]:
        """Return the shape that each of `sources` has."""
        stored = self.gguf_shape if gguf else self.hf_shape
        shape = self.shape(config) if stored is None else stored(config)
        return shape[1:] if "{e}" in (self.gguf if gguf else self.hf) else shape

    def transform(self, gguf: bool) -> Transform:
        """Return the transform from stored to canonical values."""
        return self.from_gguf if gguf else self.from_hf


def hidden(c: DecoderConfig) -> tuple[int, ...]:
    """Return [hidden]."""
    return (c.hidden_size,)


def vocab(c: DecoderConfig) -> tuple[int, ...]:
    """Return [vocab, hidden]."""
    return (c.vocab_size, c.hidden_size)


def head(c: DecoderConfig) -> tuple[int, ...]:
    """Return [head]."""
    return (c.head_dim,)


def q(c: DecoderConfig) -> tuple[int, ...]:
    """Return [H * head, hidden]."""
    return (c.num_heads * c.head_dim, c.hidden_size)


def kv(c: DecoderConfig) -> tuple[int, ...]:
    """Return [G * head, hidden]."""
    return (c.num_kv_heads * c.head_dim, c.hidden_size)


def qkv(c: DecoderConfig) -> tuple[int, ...]:
    """Return [(H + 2 G) * head, hidden]."""
    return ((c.num_heads + 2 * c.num_kv_heads) * c.head_dim, c.hidden_size)


def o(c: DecoderConfig) -> tuple[int, ...]:
    """Return [hidden, H * head]."""
    return (c.hidden_size, c.num_heads * c.head_dim)


def up(c: DecoderConfig) -> tuple[int, ...]:
    """Return [intermediate, hidden]."""
    return (c.intermediate_size, c.hidden_size)


def gate_up(c: DecoderConfig) -> tuple[int, ...]:
    """Return [2 * intermediate, hidden]."""
    return (2 * c.intermediate_size, c.hidden_size)


def down(c: DecoderConfig) -> tuple[int, ...]:
    """Return [hidden, intermediate]."""
    return (c.hidden_size, c.intermediate_size)


def rows_of(shape: Shape) -> Shape:
    """Return the shape of a bias: the first dimension of `shape`."""
    return lambda c: shape(c)[:1]


def turned(shape: Shape) -> Shape:
    """Return `shape` with its dimensions in the opposite order."""
    return lambda c: shape(c)[::-1]


def untied(c: DecoderConfig) -> bool:
    """Return whether the output matrix is one of its own."""
    return not c.tie_embeddings


def qkv_biased(c: DecoderConfig) -> bool:
    """Return whether q, k and v have biases."""
    return c.attention_bias


def o_biased(c: DecoderConfig) -> bool:
    """Return whether the projection after attention has a bias."""
    return c.output_bias


def mlp_biased(c: DecoderConfig) -> bool:
    """Return whether the MLP has biases."""
    return c.mlp_bias


def is_dense(layer: LayerConfig) -> bool:
    """Return whether the layer has one MLP, not experts."""
    return not layer.routed


def is_routed(layer: LayerConfig) -> bool:
    """Return whether the layer has experts."""
    return layer.routed


def per_layer(name: str, hf: str, gguf: str, shape: Shape, when: Callable[[DecoderConfig], bool] = always) -> Weight:
    """Return a weight of each layer, by its names below the layer's."""
    return Weight(f"layers.{{i}}.{name}", f"model.layers.{{i}}.{hf}", f"blk.{{i}}.{gguf}", shape, when)


def norm(name: str, hf: str, gguf: str, shape: Shape = hidden) -> Weight:
    """Return the weight of an RMSNorm in each layer; `shape` is [hidden] unless said otherwise."""
    return replace(per_layer(name, hf, gguf, shape), is_norm=True)


def head_norm(name: str, hf: str, gguf: str) -> Weight:
    """Return the weight of an RMSNorm over each head, [head_dim], in each layer."""
    return norm(name, hf, gguf, head)


def renamed(weights: Iterable[Weight], **old_to_new: Weight) -> tuple[Weight, ...]:
    """Return `weights` in which those whose last name is a key of `old_to_new` are replaced by its value."""
    return tuple(old_to_new.get(weight.name.rpartition(".")[2], weight) for weight in weights)


FINAL_NORM = Weight("final_norm", "model.norm.weight", "output_norm.weight", hidden, is_norm=True)

EMBEDDINGS: tuple[Weight, ...] = (
    Weight("embed", "model.embed_tokens.weight", "token_embd.weight", vocab),
    Weight("lm_head", "lm_head.weight", "output.weight", vocab, untied),
)
"""Input and output matrix as most families name them."""

ATTENTION: tuple[Weight, ...] = (
    per_layer("q", "self_attn.q_proj.weight", "attn_q.weight", q),
    per_layer("k", "self_attn.k_proj.weight", "attn_k.weight", kv),
    per_layer("v", "self_attn.v_proj.weight", "attn_v.weight", kv),
    per_layer("o", "self_attn.o_proj.weight", "attn_output.weight", o),
    per_layer("q_bias", "self_attn.q_proj.bias", "attn_q.bias", rows_of(q), qkv_biased),
    per_layer("k_bias", "self_attn.k_proj.bias", "attn_k.bias", rows_of(kv), qkv_biased),
    per_layer("v_bias", "self_attn.v_proj.bias", "attn_v.bias", rows_of(kv), qkv_biased),
    per_layer("o_bias", "self_attn.o_proj.bias", "attn_output.bias", hidden, o_biased),
)
"""Projections of attention as most families name them."""

GATED_MLP: tuple[Weight, ...] = (
    per_layer("gate", "mlp.gate_proj.weight", "ffn_gate.weight", up),
    per_layer("up", "mlp.up_proj.weight", "ffn_up.weight", up),
    per_layer("down", "mlp.down_proj.weight", "ffn_down.weight", down),
    per_layer("gate_bias", "mlp.gate_proj.bias", "ffn_gate.bias", rows_of(up), mlp_biased),
    per_layer("up_bias", "mlp.up_proj.bias", "ffn_up.bias", rows_of(up), mlp_biased),
    per_layer("down_bias", "mlp.down_proj.bias", "ffn_down.bias", hidden, mlp_biased),
)
"""The gated MLP as most families name it."""

PRE_NORMS: tuple[Weight, ...] = (
    norm("attn_norm", "input_layernorm.weight", "attn_norm.weight"),
    norm("mlp_norm", "post_attention_layernorm.weight", "ffn_norm.weight"),
    FINAL_NORM,
)
"""Norms before attention, before the MLP and before the output, as most families name them."""

HEAD_NORMS: tuple[Weight, ...] = (
    head_norm("q_norm", "self_attn.q_norm.weight", "attn_q_norm.weight"),
    head_norm("k_norm", "self_attn.k_norm.weight", "attn_k_norm.weight"),
)
"""Norms of each head of q and k."""

PROJECTIONS: tuple[Weight, ...] = (*EMBEDDINGS, *ATTENTION, *GATED_MLP)
"""Embeddings, attention and gated MLP: what the decoder-only families of the hub name alike."""
