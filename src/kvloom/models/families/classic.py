"""Weights that the older families share: LayerNorms, a plain MLP, one matrix for q, k and v."""

from collections.abc import Callable
from dataclasses import replace

from kvloom.models.families.layout import contiguous_part, grouped_part, last_name, paired
from kvloom.models.families.weight import (
    Shape,
    Transform,
    Weight,
    always,
    down,
    hidden,
    kv,
    mlp_biased,
    o,
    o_biased,
    q,
    qkv,
    qkv_biased,
    rows_of,
    turned,
    untied,
    up,
    vocab,
)
from kvloom.spec.decoder import DecoderConfig

Condition = Callable[[DecoderConfig], bool]


def norm_biased(c: DecoderConfig) -> bool:
    """Return whether LayerNorms have biases."""
    return c.norm_bias


_GGUF_NORMS = {
    "embed_norm": "token_embd_norm",
    "layers.{i}.attn_norm": "blk.{i}.attn_norm",
    "layers.{i}.mlp_norm": "blk.{i}.ffn_norm",
    "final_norm": "output_norm",
}


def layer_norm(name: str, hf: str, when: Condition = always, gguf: str | None = None) -> tuple[Weight, Weight]:
    """Return weight and bias of a LayerNorm, of each layer when the names contain `{i}`."""
    gguf = gguf or _GGUF_NORMS[name]

    def biased(c: DecoderConfig) -> bool:
        return when(c) and norm_biased(c)

    return (
        Weight(name, f"{hf}.weight", f"{gguf}.weight", hidden, when, is_norm=True),
        Weight(f"{name}_bias", f"{hf}.bias", f"{gguf}.bias", hidden, biased, is_norm=True),
    )


def embeddings(embed: str, head: str = "lm_head.weight") -> tuple[Weight, Weight]:
    """Return input and output matrix."""
    return Weight("embed", embed, "token_embd.weight", vocab), Weight("lm_head", head, "output.weight", vocab, untied)


def fused_attention(hf: str, output: str, *, grouped: bool, turn: bool = False) -> tuple[Weight, ...]:
    """Return q, k, v and o with biases; the first three lie in one matrix `hf`, KV head by KV head if `grouped`.

    With `turn` the matrices are stored as [in, out]. In GGUF files all of q come first, then k, then v, as [out, in].
    """
    found: list[Weight] = []
    for name, shape in (("q", q), ("k", kv), ("v", kv)):
        part = (grouped_part if grouped else contiguous_part)(name)
        matrix = Weight(f"layers.{{i}}.{name}", f"{hf}.weight", "blk.{i}.attn_qkv.weight", shape)
        stored: Transform = _after_turning(part) if turn else part
        found.append(_part_of_all(matrix, stored, turned(qkv) if turn else qkv, qkv))
        bias = Weight(f"layers.{{i}}.{name}_bias", f"{hf}.bias", "blk.{i}.attn_qkv.bias", rows_of(shape), qkv_biased)
        found.append(_part_of_all(bias, part, rows_of(qkv), rows_of(qkv)))
    found += projection("o", output, o, o_biased, turn)
    return tuple(found)


def _part_of_all(weight: Weight, part: Transform, hf_shape: Shape, gguf_shape: Shape) -> Weight:
    """Return the weight as `part` of what safetensors hold in `hf_shape` and GGUF files in `gguf_shape`."""
    from_gguf = paired(weight, after=contiguous_part(last_name(weight))).from_hf
    weight = replace(weight, hf_shape=hf_shape, gguf_shape=gguf_shape, from_gguf=from_gguf)
    return paired(weight, after=part)


def _after_turning(part: Transform) -> Transform:
    return lambda stored, config: part(stored.t(), config)


def _head_biased(c: DecoderConfig) -> bool:
    return c.head_bias


HEAD_BIAS = Weight("lm_head_bias", "lm_head.bias", "output.bias", rows_of(vocab), _head_biased)
"""The bias of the output matrix."""

_GGUF_PROJECTIONS = {"o": "attn_output", "up": "ffn_up", "down": "ffn_down"}


def projection(name: str, hf: str, shape: Shape, when: Condition, turn: bool = False) -> tuple[Weight, Weight]:
    """Return a matrix and its bias; with `turn` the matrix is stored as [in, out]."""
    gguf = f"blk.{{i}}.{_GGUF_PROJECTIONS[name]}"
    matrix = Weight(f"layers.{{i}}.{name}", f"{hf}.weight", f"{gguf}.weight", shape)
    if turn:
        matrix = replace(matrix, hf_shape=turned(shape), from_hf=lambda stored, config: stored.t())
    return matrix, Weight(f"layers.{{i}}.{name}_bias", f"{hf}.bias", f"{gguf}.bias", rows_of(shape), when)


def plain_mlp(up_hf: str, down_hf: str, turn: bool = False) -> tuple[Weight, ...]:
    """Return the two matrices of a plain MLP and their biases."""
    return (*projection("up", up_hf, up, mlp_biased, turn), *projection("down", down_hf, down, mlp_biased, turn))
