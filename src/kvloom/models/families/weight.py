"""Weight: one canonical tensor of a decoder, with its name, shape and form in each file format. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvloom.models.config import DecoderConfig

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


@dataclass(frozen=True)
class Weight:
    """One tensor of the decoder, or of each of its layers when the names contain `{i}`.

    `name` is the canonical name; `hf` and `gguf` are the names in safetensors and GGUF files, both of shape `shape`
    ([out, in] for matrices), which `from_hf` and `from_gguf` turn into the canonical values without changing the
    shape. Weights of norms (`is_norm`) stay in float32. `when` says which configs have the weight at all.
    """

    name: str
    hf: str
    gguf: str
    shape: Shape
    when: Callable[[DecoderConfig], bool] = always
    is_norm: bool = False
    from_hf: Transform = as_stored
    from_gguf: Transform = as_stored

    @property
    def per_layer(self) -> bool:
        """True when each layer has one."""
        return "{i}" in self.name


def _hidden(c: DecoderConfig) -> tuple[int, ...]:
    return (c.hidden_size,)


def _vocab(c: DecoderConfig) -> tuple[int, ...]:
    return (c.vocab_size, c.hidden_size)


def _head(c: DecoderConfig) -> tuple[int, ...]:
    return (c.head_dim,)


def _q(c: DecoderConfig) -> tuple[int, ...]:
    return (c.num_heads * c.head_dim, c.hidden_size)


def _kv(c: DecoderConfig) -> tuple[int, ...]:
    return (c.num_kv_heads * c.head_dim, c.hidden_size)


def _o(c: DecoderConfig) -> tuple[int, ...]:
    return (c.hidden_size, c.num_heads * c.head_dim)


def _q_bias(c: DecoderConfig) -> tuple[int, ...]:
    return (c.num_heads * c.head_dim,)


def _kv_bias(c: DecoderConfig) -> tuple[int, ...]:
    return (c.num_kv_heads * c.head_dim,)


def _up(c: DecoderConfig) -> tuple[int, ...]:
    return (c.intermediate_size, c.hidden_size)


def _down(c: DecoderConfig) -> tuple[int, ...]:
    return (c.hidden_size, c.intermediate_size)


def _untied(c: DecoderConfig) -> bool:
    return not c.tie_embeddings


def _qkv_biased(c: DecoderConfig) -> bool:
    return c.attention_bias


def _o_biased(c: DecoderConfig) -> bool:
    return c.output_bias


def _layer(name: str, hf: str, gguf: str, shape: Shape, when: Callable[[DecoderConfig], bool] = always) -> Weight:
    return Weight(f"layers.{{i}}.{name}", f"model.layers.{{i}}.{hf}", f"blk.{{i}}.{gguf}", shape, when)


def norm(name: str, hf: str, gguf: str, shape: Shape = _hidden) -> Weight:
    """Return the weight of an RMSNorm in each layer; `shape` is [hidden] unless said otherwise."""
    return replace(_layer(name, hf, gguf, shape), is_norm=True)


def head_norm(name: str, hf: str, gguf: str) -> Weight:
    """Return the weight of an RMSNorm over each head, [head_dim], in each layer."""
    return norm(name, hf, gguf, _head)


FINAL_NORM = Weight("final_norm", "model.norm.weight", "output_norm.weight", _hidden, is_norm=True)

PROJECTIONS: tuple[Weight, ...] = (
    Weight("embed", "model.embed_tokens.weight", "token_embd.weight", _vocab),
    Weight("lm_head", "lm_head.weight", "output.weight", _vocab, _untied),
    _layer("q", "self_attn.q_proj.weight", "attn_q.weight", _q),
    _layer("k", "self_attn.k_proj.weight", "attn_k.weight", _kv),
    _layer("v", "self_attn.v_proj.weight", "attn_v.weight", _kv),
    _layer("o", "self_attn.o_proj.weight", "attn_output.weight", _o),
    _layer("q_bias", "self_attn.q_proj.bias", "attn_q.bias", _q_bias, _qkv_biased),
    _layer("k_bias", "self_attn.k_proj.bias", "attn_k.bias", _kv_bias, _qkv_biased),
    _layer("v_bias", "self_attn.v_proj.bias", "attn_v.bias", _kv_bias, _qkv_biased),
    _layer("o_bias", "self_attn.o_proj.bias", "attn_output.bias", _hidden, _o_biased),
    _layer("gate", "mlp.gate_proj.weight", "ffn_gate.weight", _up),
    _layer("up", "mlp.up_proj.weight", "ffn_up.weight", _up),
    _layer("down", "mlp.down_proj.weight", "ffn_down.weight", _down),
)
"""Embeddings, attention and gated MLP: what the decoder-only families of the hub name alike."""
