"""Layouts of stored weights: fused, transposed, or rotated in other pairs; each transform undoes one layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from kvloom.models.families.weight import Transform, Weight
from kvloom.spec.decoder import DecoderConfig

if TYPE_CHECKING:
    from torch import Tensor

_HEADS: dict[str, Callable[[DecoderConfig], int]] = {
    "q": lambda c: c.num_heads,
    "q_bias": lambda c: c.num_heads,
    "k": lambda c: c.num_kv_heads,
    "k_bias": lambda c: c.num_kv_heads,
    "q_norm": lambda c: 1,
    "q_norm_bias": lambda c: 1,
    "k_norm": lambda c: 1,
    "k_norm_bias": lambda c: 1,
}


def last_name(weight: Weight) -> str:
    """Return the canonical name without its layer."""
    return weight.name.rpartition(".")[2]


def paired(weight: Weight, neighbours: bool = False, after: Transform | None = None) -> Weight:
    """Return the weight with rows of q and k moved so that pairs are (i, i + D / 2) over the whole head.

    As stored in safetensors, heads rotate their first `config.rotary` rows in halves, or in `neighbours`; see
    `rope.rotated_rows`. Weights without rotated rows are returned as they are. `after` runs first, on what is stored.
    """
    heads = _HEADS.get(last_name(weight))

    def moved(stored: Tensor, config: DecoderConfig) -> Tensor:
        values = stored if after is None else after(stored, config)
        if heads is None or (config.rotary == config.head_dim and not neighbours):
            return values
        from kvloom.models.rope import rotated_rows

        rows = rotated_rows(config.head_dim, config.rotary, neighbours)
        return values.reshape(heads(config), config.head_dim, -1)[:, rows].reshape(values.shape)

    return replace(weight, from_hf=moved)


def contiguous_part(name: str) -> Transform:
    """Return a transform that takes q, k or v (or its bias) from rows [all q | all k | all v]."""

    def part(stored: Tensor, config: DecoderConfig) -> Tensor:
        wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        start, count = {"q": (0, wide), "k": (wide, narrow), "v": (wide + narrow, narrow)}[name[0]]
        return stored[start : start + count]

    return part


def grouped_part(name: str) -> Transform:
    """Return a transform that takes q, k or v (or its bias) from rows ordered by KV head: [its q heads | k | v]."""

    def part(stored: Tensor, config: DecoderConfig) -> Tensor:
        group = config.num_heads // config.num_kv_heads
        heads = stored.reshape(config.num_kv_heads, group + 2, config.head_dim, *stored.shape[1:])
        chosen = {"q": heads[:, :group], "k": heads[:, group : group + 1], "v": heads[:, group + 1 :]}[name[0]]
        return chosen.reshape(-1, *stored.shape[1:])

    return part


def transposed(stored: Tensor, config: DecoderConfig) -> Tensor:
    """Return a matrix that is stored as [in, out]."""
    return stored.t()


def first_half(stored: Tensor, config: DecoderConfig) -> Tensor:
    """Return the first half of the rows: the gate of a fused [gate | up]."""
    return stored[: len(stored) // 2]


def second_half(stored: Tensor, config: DecoderConfig) -> Tensor:
    """Return the second half of the rows: the up part of a fused [gate | up]."""
    return stored[len(stored) // 2 :]
