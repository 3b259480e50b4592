"""Capacity of an arena of slabs of 2 MiB, each of which holds blocks of one size at a time."""

from collections.abc import Iterable

from kvloom.spec.kv import KVSpec
from kvloom.spec.search import largest
from kvloom.spec.store import SLAB_BYTES


def slabs_of_request(kv: KVSpec, num_tokens: int, chunk: int) -> int:
    """Return the slabs that one request of `num_tokens` takes in an empty arena: each holds blocks of one size."""
    needs: dict[int, int] = {}
    for group in kv.groups:
        blocks = len(group.lanes) * kv.lane_blocks(num_tokens, group.window, chunk)
        needs[group.block_bytes] = needs.get(group.block_bytes, 0) + blocks
    return sum(-(-count // (SLAB_BYTES // size)) for size, count in needs.items())


def longest_request(kv: KVSpec, num_bytes: int, chunk: int) -> int:
    """Return the longest request, in tokens, that fits alone into an empty arena of `num_bytes`."""
    slabs = num_bytes // SLAB_BYTES
    most = kv.max_tokens_in(num_bytes, chunk)  # rounding to slabs only shortens it
    return largest(lambda num_tokens: slabs_of_request(kv, num_tokens, chunk) <= slabs, 1, most) or 0


def sure_bytes(kv: KVSpec, num_bytes: int, stores: Iterable[str] = ()) -> int:
    """Return the bytes of blocks, of any mixture of sizes, that are sure to fit into an evacuated arena.

    Lanes without a window may also have blocks in any of `stores`.
    """
    sizes = {group.block_bytes for group in kv.groups}
    for store in stores:
        sizes |= {kv.lane_block_bytes(lanes.first, store) for lanes in kv.sets if lanes.window is None}
    slabs = num_bytes // SLAB_BYTES - (len(sizes) - 1)  # the last slab of each further size may be almost empty
    return max(0, slabs) * min(SLAB_BYTES // size * size for size in sizes)
