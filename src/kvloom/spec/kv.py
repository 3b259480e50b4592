"""KVSpec: the lanes of a model and the bytes of their blocks, for planner and allocator alike.

A *lane* is one KV head of one layer of one request; a *block* stores `block_size` tokens of one lane.
"""

from dataclasses import dataclass
from functools import cached_property

from kvloom.errors import InvalidInputError
from kvloom.spec.search import largest
from kvloom.spec.store import SLAB_BYTES, STORES

ATTENTION = "attention"
"""Role of the lanes that attention reads, and from which policies evict."""


@dataclass(frozen=True)
class LayerKV:
    """The lanes of one layer: their number, their widths in elements, and their sliding window.

    `window` counts the query itself (query i sees keys j with 0 <= i - j < window); None means all.
    `source` names an earlier layer whose lanes this layer reads instead of having its own (YOCO, Gemma 3n).
    A layer without lanes (a recurrent one) has `num_lanes` 0. `role` says what reads the lanes, and `beside` are sets
    of other roles that the layer owns as well (the keys of an indexer beside its latent).
    """

    num_lanes: int
    k_width: int
    v_width: int
    window: int | None = None
    source: int | None = None
    role: str = ATTENTION
    beside: tuple["LayerKV", ...] = ()


@dataclass(frozen=True)
class LaneSet:
    """Lanes `first .. first + num_lanes - 1`: those of one role that one layer owns, equal in all properties."""

    layer: int
    role: str
    first: int
    num_lanes: int
    k_width: int
    v_width: int
    window: int | None


@dataclass(frozen=True)
class LaneGroup:
    """Lanes of one role that hold the same span of tokens in blocks of the same size.

    Their blocks are allocated and freed together.
    """

    layers: tuple[int, ...]
    lanes: tuple[int, ...]
    window: int | None
    block_bytes: int
    role: str = ATTENTION


@dataclass(frozen=True)
class KVSpec:
    """All lanes of a model, in the native store of its dtype, with `block_size` tokens a block.

    Lanes are numbered layer by layer: layer l owns `lane_offset[l] .. lane_offset[l] + num_lanes - 1`, and those of the
    sets beside them follow.
    """

    layers: tuple[LayerKV, ...]
    block_size: int
    store: str

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise InvalidInputError(f"block_size is {self.block_size}; it must be at least 1 token")
        for index, layer in enumerate(self.layers):
            if layer.source is not None and not 0 <= layer.source < index:
                raise InvalidInputError(f"layer {index} reads the lanes of layer {layer.source}, which is not earlier")
            roles = [layer.role, *(other.role for other in layer.beside)]
            if len(set(roles)) != len(roles) or any(o.beside or o.source is not None for o in layer.beside):
                raise InvalidInputError(f"layer {index} has sets {roles}; each has a role of its own and nothing else")
            size = max(self._block_bytes(lanes) for lanes in (layer, *layer.beside))
            if size > SLAB_BYTES:
                raise InvalidInputError(
                    f"a block of {self.block_size} tokens of layer {index} needs {size} bytes; "
                    f"a slab has {SLAB_BYTES}. Use a smaller block size"
                )

    def layer_block_bytes(self, layer: int, store: str | None = None) -> int:
        """Return the bytes of one block of one lane of `layer`, in `store` or the native one."""
        return self._block_bytes(self.layers[layer], store)

    def lane_block_bytes(self, lane: int, store: str | None = None) -> int:
        """Return the bytes of one block of `lane`, in `store` or the native one."""
        return self._block_bytes(self.lane_set[lane], store)

    def _block_bytes(self, lanes: LayerKV | LaneSet, store: str | None = None) -> int:
        return STORES.get(store or self.store).block_bytes(self.block_size, lanes.k_width, lanes.v_width)

    @cached_property
    def sets(self) -> tuple[LaneSet, ...]:
        """All lane sets, in the order of their lanes: a layer's own, unless it has none, then those beside it."""
        found: list[LaneSet] = []
        total = 0
        for index, layer in enumerate(self.layers):
            own = [layer] if layer.source is None and layer.num_lanes else []
            for kv in (*own, *layer.beside):
                found.append(LaneSet(index, kv.role, total, kv.num_lanes, kv.k_width, kv.v_width, kv.window))
                total += kv.num_lanes
        return tuple(found)

    @cached_property
    def lane_set(self) -> tuple[LaneSet, ...]:
        """The set of each lane."""
        return tuple(lanes for lanes in self.sets for _ in range(lanes.num_lanes))

    @cached_property
    def lane_token_bytes(self) -> tuple[int, ...]:
        """Bytes of one token of each lane, in the native store."""
        return tuple(self.lane_block_bytes(lane) // self.block_size for lane in range(self.num_lanes))

    @cached_property
    def lane_offset(self) -> tuple[int, ...]:
        """First lane of each layer; a layer with a `source` repeats the offset of its source."""
        offsets: list[int] = []
        total = 0
        for layer in self.layers:
            if layer.source is not None:
                offsets.append(offsets[layer.source])
            else:
                offsets.append(total)
                total += layer.num_lanes
            total += sum(other.num_lanes for other in layer.beside)
        return tuple(offsets)

    @cached_property
    def lane_layer(self) -> tuple[int, ...]:
        """Owning layer of each lane."""
        return tuple(lanes.layer for lanes in self.lane_set)

    @property
    def num_lanes(self) -> int:
        """Lanes of one request over all layers."""
        return len(self.lane_layer)

    @cached_property
    def groups(self) -> tuple[LaneGroup, ...]:
        """Lanes by (window, block bytes, role), in the order of their first lane."""
        found: dict[tuple[int | None, int, str], list[LaneSet]] = {}
        for lanes in self.sets:
            found.setdefault((lanes.window, self._block_bytes(lanes), lanes.role), []).append(lanes)
        return tuple(
            LaneGroup(
                layers=tuple(lanes.layer for lanes in members),
                lanes=tuple(lane for lanes in members for lane in range(lanes.first, lanes.first + lanes.num_lanes)),
                window=window,
                block_bytes=size,
                role=role,
            )
            for (window, size, role), members in found.items()
        )

    @cached_property
    def bytes_per_token(self) -> int:
        """Bytes that one more token costs while no window is full, without rounding to blocks or granules."""
        spec = STORES.get(self.store)
        return sum(lanes.num_lanes * spec.payload_bytes(1, lanes.k_width, lanes.v_width) for lanes in self.sets)

    def lane_blocks(self, num_tokens: int, window: int | None, chunk: int = 1) -> int:
        r"""Return the most blocks that one lane holds at once on the way to `num_tokens`.

        Before it processes a chunk, a windowed lane still needs the `window - 1` tokens before the chunk::

            freed blocks | begin ...... window - 1 ...... | ... chunk ... |
            -------------+--------------------------------+---------------+--> tokens

        and may straddle one block more than its tokens fill.
        """
        blocks = -(-num_tokens // self.block_size)
        if window is None:
            return blocks
        span = window - 1 + min(chunk, num_tokens)
        return min(blocks, -(-(span - 1) // self.block_size) + 1)

    def request_bytes(self, num_tokens: int, chunk: int = 1) -> int:
        """Return the peak arena bytes of one request of `num_tokens`, processed in chunks of at most `chunk`."""
        return sum(
            len(group.lanes) * group.block_bytes * self.lane_blocks(num_tokens, group.window, chunk)
            for group in self.groups
        )

    def max_tokens_in(self, num_bytes: int, chunk: int = 1) -> int:
        """Return the longest request, in tokens, whose `request_bytes` are at most `num_bytes`."""
        return largest(lambda num_tokens: self.request_bytes(num_tokens, chunk) <= num_bytes, 1, 1 << 40) or 0
