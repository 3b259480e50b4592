"""What a block costs in each storage format: the one source of the bytes of a block."""

from dataclasses import dataclass

from kvloom.registry import Registry

GRANULE_BYTES = 128
"""Unit of arena addresses: an int32 address reaches 256 GiB, and every block starts on a cache line."""

SLAB_BYTES = 2 << 20
"""Size and alignment of a slab, one huge page; no block straddles two slabs."""


@dataclass(frozen=True)
class StoreSpec:
    """Bytes of one storage format of K and V.

    `bits` are stored per element; `scale_bytes` are added per token, once for K and once for V (a lane without V
    pays once). `group` and `residual` are in tokens: what is encoded together, and how many of the newest tokens
    stay in the native store.
    """

    name: str
    bits: int
    scale_bytes: int = 0
    group: int = 1
    residual: int = 0

    def payload_bytes(self, block_size: int, k_width: int, v_width: int) -> int:
        """Return the bytes that `block_size` tokens of one lane need, before rounding to granules."""
        sides = (k_width > 0) + (v_width > 0)
        return block_size * ((k_width + v_width) * self.bits // 8 + sides * self.scale_bytes)

    def block_bytes(self, block_size: int, k_width: int, v_width: int) -> int:
        """Return the bytes of one block of one lane in the arena: the payload in whole granules."""
        payload = self.payload_bytes(block_size, k_width, v_width)
        return -(-payload // GRANULE_BYTES) * GRANULE_BYTES


STORES: Registry[StoreSpec] = Registry("store")
STORES.register("bf16", StoreSpec("bf16", 16))
STORES.register("fp16", StoreSpec("fp16", 16))
STORES.register("fp32", StoreSpec("fp32", 32))
STORES.register("int8", StoreSpec("int8", 8, scale_bytes=4))

NATIVE_STORE = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
"""The store that keeps K and V exactly as a model of that dtype computes them."""
