"""Bytes of the blocks that the lane table names, added up address by address: the oracle of every formula of bytes."""

import torch

from kvloom.cache.kvcache import KVCache
from kvloom.spec.kv import KVSpec
from kvloom.spec.store import SLAB_BYTES

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GEOMETRIES = [("bf16", 16), ("bf16", 32), ("fp16", 8), ("fp32", 16), ("fp32", 4)]
"""(store, tokens of a block) of the golden figures."""

LENGTHS = (1, 37, 100)
CHUNK = 16


def walk(cache: KVCache, row: int) -> int:
    """Return the bytes of the blocks of one sequence: unique addresses, each with the size of its lane's blocks."""
    extents = {}
    for lane, addresses in enumerate(cache.lanes.table[row]):
        for address in addresses[addresses >= 0]:
            assert int(address) not in extents, "two lanes of one sequence name one block"
            extents[int(address)] = cache.spec.layer_block_bytes(cache.spec.lane_layer[lane])
    return sum(extents.values())


def walked_bytes(spec: KVSpec) -> list[int]:
    """Return the walked bytes of one sequence of `LENGTHS` tokens, which arrive `CHUNK` at a time."""
    cache = KVCache(spec, 8 * SLAB_BYTES, 2, DTYPES[spec.store])
    row, found = cache.lanes.open(), []
    for length in LENGTHS:
        while (seen := int(cache.lanes.seen[row])) < length:
            assert cache.lanes.extend(row, min(CHUNK, length - seen))
        found.append(walk(cache, row))
    return found
