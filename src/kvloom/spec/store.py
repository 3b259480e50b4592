"""Bytes of a block in each storage format; all other modules take them from here."""

from dataclasses import dataclass

from kvloom.registry import Registry

GRANULE_BYTES = 128
"""Unit of arena addresses: an int32 address reaches 256 GiB, and every block starts on a cache line."""

SLAB_BYTES = 2 << 20
"""Size and alignment of a slab, one huge page; no block straddles two slabs."""

HEAD_STEP = 16
"""Blocks hold heads in multiples of this many elements, the last ones zeros: kernels read that many at once."""


def held_width(width: int) -> int:
    """Return how many elements a head of `width` takes in a block; 0 where there is none."""
    return -(-width // HEAD_STEP) * HEAD_STEP


@dataclass(frozen=True)
class Side:
    """How one of K and V is stored.

    `bits` are stored per element; `scale_bytes` are added per token of a lane. `group` tokens are encoded together;
    with `group_bytes` every `group` elements add that many bytes of scale and zero point, in either direction. `code`
    names what the bits mean, "" that of the model's dtype.
    """

    bits: int
    scale_bytes: int = 0
    group: int = 1
    group_bytes: int = 0
    code: str = ""

    def payload_bytes(self, num_tokens: int, width: int) -> int:
        """Return the bytes of `num_tokens` tokens of `width` elements; 0 where the lane has none."""
        if not width:
            return 0
        groups = -(-num_tokens * width // self.group) if self.group_bytes else 0
        return num_tokens * (-(-width * self.bits // 8) + self.scale_bytes) + groups * self.group_bytes


@dataclass(frozen=True)
class StoreSpec:
    """Bytes of one storage format; K and V may be stored differently.

    `residual` is in tokens: how many of the newest stay in the native store.
    """

    name: str
    k: Side
    v: Side
    residual: int = 0

    @classmethod
    def alike(cls, name: str, side: Side, residual: int = 0) -> "StoreSpec":
        """Return a format that stores K and V in the same way."""
        return cls(name, side, side, residual)

    @property
    def bits(self) -> float:
        """Bits per element without scales, mean of K and V."""
        return (self.k.bits + self.v.bits) / 2

    @property
    def group(self) -> int:
        """Tokens that are encoded together: blocks hold a multiple of it."""
        return max(self.k.group, self.v.group)

    def payload_bytes(self, block_size: int, k_width: int, v_width: int) -> int:
        """Return the bytes that `block_size` tokens of one lane need, heads in `held_width`, before rounding."""
        k, v = held_width(k_width), held_width(v_width)
        return self.k.payload_bytes(block_size, k) + self.v.payload_bytes(block_size, v)

    def block_bytes(self, block_size: int, k_width: int, v_width: int) -> int:
        """Return the bytes of one block of one lane in the arena: the payload in whole granules."""
        payload = self.payload_bytes(block_size, k_width, v_width)
        return -(-payload // GRANULE_BYTES) * GRANULE_BYTES


INT8 = Side(8, scale_bytes=4, code="int8")
"""Symmetric codes with a float32 scale for each token."""

E4M3 = Side(8, scale_bytes=4, code="e4m3")
"""FP8 numbers of 4 bits of exponent and 3 of mantissa, with a float32 scale for each token."""

STORES: Registry[StoreSpec] = Registry("store")
STORES.register("bf16", StoreSpec.alike("bf16", Side(16)))
STORES.register("fp16", StoreSpec.alike("fp16", Side(16)))
STORES.register("fp32", StoreSpec.alike("fp32", Side(32)))
STORES.register("int8", StoreSpec.alike("int8", INT8))
STORES.register("fp8_e4m3", StoreSpec.alike("fp8_e4m3", E4M3))

ALIASES = {"fp8": "fp8_e4m3", "int8_per_token_head": "int8"}
"""Other spellings of stores."""

NATIVE_STORE = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
"""The store that keeps K and V exactly as a model of that dtype computes them."""
