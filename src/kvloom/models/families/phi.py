"""Weights of Phi-1, Phi-1.5 and Phi-2: heads rotated in part, a bias of the output matrix."""

from dataclasses import replace

from kvloom.models.families.classic import HEAD_BIAS, layer_norm, plain_mlp, projection
from kvloom.models.families.family import Family
from kvloom.models.families.layout import paired
from kvloom.models.families.weight import ATTENTION, EMBEDDINGS, head, o, o_biased
from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families import phi as configs

_AT = "model.layers.{i}."


def _normed(c: DecoderConfig) -> bool:
    return c.qk_norm


_HEAD_NORMS = (
    replace(weight, shape=head)
    for name in "qk"
    for weight in layer_norm(
        f"layers.{{i}}.{name}_norm", f"{_AT}self_attn.{name}_layernorm", _normed, f"blk.{{i}}.attn_{name}_norm"
    )
)

PHI = Family(
    config=configs.PHI,
    weights=(
        *EMBEDDINGS,
        HEAD_BIAS,
        *map(paired, ATTENTION[:3]),
        *map(paired, ATTENTION[4:7]),
        *projection("o", _AT + "self_attn.dense", o, o_biased),
        *map(paired, _HEAD_NORMS),
        *plain_mlp(_AT + "mlp.fc1", _AT + "mlp.fc2"),
        *layer_norm("layers.{i}.attn_norm", _AT + "input_layernorm"),
        *layer_norm("final_norm", "model.final_layernorm"),
    ),
)
