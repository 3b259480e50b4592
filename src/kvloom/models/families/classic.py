"""What the older families share: LayerNorm, a plain MLP, one matrix for q, k and v, and entries by other names."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from kvloom.models.families.config_reader import ConfigReader
from kvloom.models.families.layout import contiguous_part, grouped_part, last_name, paired
from kvloom.models.families.skeleton import ACTIVATIONS
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
from kvloom.spec.decoder import DecoderConfig, LayerConfig

Condition = Callable[[DecoderConfig], bool]


def classic(reader: ConfigReader, family: str, layers: Sequence[LayerConfig], **entries: Any) -> DecoderConfig:
    """Return a config with LayerNorms and a plain MLP; `entries` are those that `DecoderConfig` has no default for."""
    width = entries["hidden_size"] // entries["num_heads"]
    if entries["hidden_size"] % entries["num_heads"]:
        reader.wrong("the hidden size", f"a multiple of {entries['num_heads']} heads", entries["hidden_size"])
    common: dict[str, Any] = {
        "family": family,
        "vocab_size": reader.integer("vocab_size"),
        "head_dim": width,
        "layers": tuple(layers),
        "query_scale": width**-0.5,
        "tie_embeddings": reader.flag("tie_word_embeddings"),
        "norm": "layer",
        "norm_bias": True,
        "gated": False,
        "eos_token_ids": reader.token_ids("eos_token_id"),
        "bos_token_id": next(iter(reader.token_ids("bos_token_id")), None),
    }
    return DecoderConfig(**{**common, **entries})


def activation(reader: ConfigReader, key: str) -> str:
    """Return the activation that the entry `key` names."""
    return reader.choice(key, ACTIVATIONS)


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Return ALiBi's slopes (Press et al. 2022): 2 ** (-8 h / P) of the largest power of two P within the heads.

    Further heads take every other slope of 2 P heads, from the first on.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    more = [2.0 ** (-4.0 * (i + 1) / power) for i in range(0, 2 * (num_heads - power), 2)]
    return (*slopes, *more)


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
