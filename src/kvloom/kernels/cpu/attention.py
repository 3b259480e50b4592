"""Append to lanes and attend over them, for packed batches of prefill chunks and decodes."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import kvloom.kernels.cpu._ext as _ext
from kvloom.errors import InvalidInputError
from kvloom.kernels.cpu.elements import STORE_ELEMENT, contiguous, element_of, pointer, token_stride
from kvloom.kernels.cpu.threads import follow_torch

Ints = NDArray[np.int32]


class LayerShape(NamedTuple):
    """Heads and lanes of one layer; `window` 0 means all. Query head h reads lane `lane_offset + h // (H / G)`."""

    num_heads: int
    num_kv_heads: int
    k_width: int
    v_width: int
    lane_offset: int
    window: int = 0


class Lanes:
    """The lane table for the kernels. Keeps the arrays alive and reads them at every call, so they may change.

    arena [bytes] uint8; table [num_seqs, num_lanes, num_columns] int32 addresses in granules of 128 bytes;
    begin, end [num_seqs, num_lanes] int32: visible slots of each lane, new tokens included. All C-contiguous.
    `block_size` is a multiple of 16. `store` names the store of all blocks unless `set_segments` says more.
    """

    def __init__(
        self, arena: torch.Tensor, table: Ints, begin: Ints, end: Ints, block_size: int, store: str
    ) -> None:
        contiguous(arena, "arena", torch.uint8)
        try:
            self.view = _ext.Lanes(
                arena.data_ptr(), arena.numel(), table, begin, end, block_size, STORE_ELEMENT.get(store)
            )
        except ValueError as error:
            raise InvalidInputError(str(error)) from error
        self.arena = arena
        self.shape = table.shape
        self.store = store
        self._end = end

    def set_segments(self, start: Ints, stores: Ints, last_column: Ints, names: Sequence[str]) -> None:
        """Set the stores of the lanes' columns, until this is called again.

        Segments start[lane] .. start[lane + 1] - 1 of the flattened [num_seqs, num_lanes] follow each other; each ends
        before its `last_column` and has the store `names[stores[segment]]`. "" is the store of the lanes, which is also
        that of all columns after the segments.
        """
        codes = np.array([STORE_ELEMENT.get(name or self.store) for name in names], np.int32)
        self.view.set_segments(start, codes[stores], last_column)

    def longest(self, seq_rows: Ints, members: NDArray[np.integer]) -> int:
        """Return the largest `end` among some lanes of `seq_rows`."""
        return int(self._end[seq_rows[:, None], members].max(initial=0))


def append(
    lanes: Lanes,
    shape: LayerShape,
    cu_seqlens: Ints,
    seq_rows: Ints,
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cos_sin: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Norm, rotate and store: slot end - n + i of each lane gets token i of its sequence's n new ones.

    q [T, H, Dk] and k [T, G, Dk] are normed (`q_norm`, `k_norm` [Dk] float32) and rotated in place, half-split, by
    `cos_sin` [T, 2 R] float32 (R cosines, then R sines; the first 2 R of the width turn); v [T, G, Dv]. Mutates the
    arena.
    """
    element = element_of(k, "k")
    if v.dtype != k.dtype or (q is not None and q.dtype != k.dtype):
        raise InvalidInputError(f"q, k and v must have one dtype; k is {k.dtype}, v is {v.dtype}")
    _expect_tokens(cu_seqlens, k, shape.num_kv_heads, shape.k_width, "k")
    _expect_tokens(cu_seqlens, v, shape.num_kv_heads, shape.v_width, "v")
    if q is not None:
        _expect_tokens(cu_seqlens, q, shape.num_heads, shape.k_width, "q")
    rotary = 0
    if cos_sin is not None:
        rotary = contiguous(cos_sin, "cos_sin", torch.float32).shape[1]
        if cos_sin.shape[0] != k.shape[0] or rotary % 2 or rotary > shape.k_width:
            expected = f"[{k.shape[0]}, <= {shape.k_width}]"
            raise InvalidInputError(f"cos_sin has shape {tuple(cos_sin.shape)}; expected {expected}")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None and contiguous(norm, name, torch.float32).shape != (shape.k_width,):
            raise InvalidInputError(f"{name} has shape {tuple(norm.shape)}; expected ({shape.k_width},)")
    _call(
        _ext.append, lanes.view, cu_seqlens, seq_rows, tuple(shape), element, pointer(q),
        token_stride(q, "q") if q is not None else 0, k.data_ptr(), token_stride(k, "k"), v.data_ptr(),
        token_stride(v, "v"), pointer(cos_sin), rotary, pointer(q_norm), pointer(k_norm), eps,
    )  # fmt: skip


def attention(
    lanes: Lanes,
    shape: LayerShape,
    cu_seqlens: Ints,
    seq_rows: Ints,
    q: torch.Tensor,
    scale: float,
    *,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    low_precision: bool | None = None,
) -> torch.Tensor:
    """Return attention [T, H, Dv] of q [T, H, Dk] over the lanes, whose newest slots hold the batch's own tokens.

    Query i of n sees slots [max(begin, end - n + i + 1 - window), end - n + i + 1). Scores are scale * q.k, then
    softcap * tanh(. / softcap), plus `slopes` [H] * (slot - own slot), plus `bias` [num_seqs, num_lanes, slots]
    float32; `sinks` [H] join the denominator. `lse` [T, H] float32 receives the log of the denominator.
    `low_precision` (default: q is bfloat16, which holds every element or code of the store exactly) multiplies bf16
    queries and probabilities, summing in float32. A sequence's result depends on neither the batch nor the number of
    threads.
    """
    _expect_tokens(cu_seqlens, q, shape.num_heads, shape.k_width, "q")
    exact = _ext.exact_in_bf16(STORE_ELEMENT.get(lanes.store))
    if low_precision is None:
        low_precision = q.dtype == torch.bfloat16 and exact
    elif low_precision and not exact:
        raise InvalidInputError(f"bf16 products need blocks of elements that bf16 holds exactly, not {lanes.store}")
    if out is None:
        out = q.new_empty(q.shape[0], shape.num_heads, shape.v_width)
    _expect_tokens(cu_seqlens, out, shape.num_heads, shape.v_width, "out")
    for name, vector in (("sinks", sinks), ("slopes", slopes)):
        if vector is not None and contiguous(vector, name, torch.float32).shape != (shape.num_heads,):
            raise InvalidInputError(f"{name} has shape {tuple(vector.shape)}; expected ({shape.num_heads},)")
    if lse is not None and contiguous(lse, "lse", torch.float32).shape != (q.shape[0], shape.num_heads):
        raise InvalidInputError(f"lse has shape {tuple(lse.shape)}; expected {(q.shape[0], shape.num_heads)}")
    if bias is not None and contiguous(bias, "bias", torch.float32).shape[:2] != lanes.shape[:2]:
        raise InvalidInputError(f"bias has shape {tuple(bias.shape)}; expected [*{lanes.shape[:2]}, slots]")
    _call(
        _ext.attention, lanes.view, cu_seqlens, seq_rows, tuple(shape), low_precision, scale, softcap, pointer(sinks),
        pointer(slopes), element_of(q, "q"), q.data_ptr(), token_stride(q, "q"), element_of(out, "out"), out.data_ptr(),
        token_stride(out, "out"), pointer(lse), pointer(bias), bias.stride(0) if bias is not None else 0,
        bias.stride(1) if bias is not None else 0,
    )  # fmt: skip
    return out


def key_mass(
    lanes: Lanes,
    shape: LayerShape,
    cu_seqlens: Ints,
    seq_rows: Ints,
    q: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    *,
    softcap: float = 0.0,
    low_precision: bool = False,
) -> torch.Tensor:
    """Return sum over queries i and heads of the group of exp(score_ij - lse_i): [B, G, slots] float32.

    q [T, H, Dk] are rotated queries of each sequence's newest tokens, lse [T, H] float32 as `attention` wrote it.
    The last dimension counts the lane's own slots, up to the longest lane; slots that no query attends to are 0.
    """
    _expect_tokens(cu_seqlens, q, shape.num_heads, shape.k_width, "q")
    if contiguous(lse, "lse", torch.float32).shape != (q.shape[0], shape.num_heads):
        raise InvalidInputError(f"lse has shape {tuple(lse.shape)}; expected {(q.shape[0], shape.num_heads)}")
    return key_mass_of_layers(
        lanes, {0: shape}, cu_seqlens, seq_rows, q[None], lse[None], scale, softcap=softcap, low_precision=low_precision
    )[0]


def key_mass_of_layers(
    lanes: Lanes,
    shapes: Mapping[int, LayerShape],
    cu_seqlens: Ints,
    seq_rows: Ints,
    q: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    *,
    softcap: float = 0.0,
    low_precision: bool = False,
) -> torch.Tensor:
    """Return `key_mass` of several layers at once, [len(shapes), B, G, slots] in the order of `shapes`.

    q [L, T, H, Dk] and lse [L, T, H] are those of all layers, `shapes` are keyed by index in L and equal but for
    `lane_offset` and `window`.
    """
    first = next(iter(shapes.values()))
    if any(shape[:4] != first[:4] for shape in shapes.values()) or not set(shapes) <= set(range(len(q))):
        raise InvalidInputError(f"key mass at once takes layers 0 to {len(q) - 1} of equal heads and widths")
    _expect_tokens(cu_seqlens, q[0], first.num_heads, first.k_width, "q")
    if contiguous(lse[0], "lse", torch.float32).shape != q.shape[1:3] or len(lse) != len(q):
        raise InvalidInputError(f"lse has shape {tuple(lse.shape)}; expected {tuple(q.shape[:3])}")
    groups = first.num_kv_heads
    members = np.concatenate([np.arange(shape.lane_offset, shape.lane_offset + groups) for shape in shapes.values()])
    slots = lanes.longest(seq_rows, members)
    mass = torch.from_numpy(np.zeros((len(shapes), len(seq_rows), groups, slots), np.float32))
    element, stride = element_of(q, "q"), token_stride(q[0], "q")
    q_at, q_step = q.data_ptr(), q.stride(0) * q.element_size()
    lse_at, lse_step = lse.data_ptr(), lse.stride(0) * 4
    mass_at, mass_step = mass.data_ptr(), mass.stride(0) * 4
    for place, (layer, shape) in enumerate(shapes.items()):
        _call(
            _ext.key_mass, lanes.view, cu_seqlens, seq_rows, tuple(shape), low_precision, scale, softcap, element,
            q_at + layer * q_step, stride, lse_at + layer * lse_step, mass_at + place * mass_step, slots,
        )  # fmt: skip
    return mass


def _expect_tokens(cu_seqlens: Ints, x: torch.Tensor, heads: int, width: int, name: str) -> None:
    if x.shape != (int(cu_seqlens[-1]), heads, width):
        raise InvalidInputError(f"{name} has shape {tuple(x.shape)}; expected {(int(cu_seqlens[-1]), heads, width)}")


def _call(function: Callable[..., None], *arguments: object) -> None:
    follow_torch()
    try:
        function(*arguments)
    except ValueError as error:
        raise InvalidInputError(str(error)) from error
