"""LayerState: the state of one recurrent layer for one request, of the same size at any length. Torch-free."""

from dataclasses import dataclass

from kvloom.errors import InvalidInputError
from kvloom.spec.store import GRANULE_BYTES, SLAB_BYTES


@dataclass(frozen=True)
class LayerState:
    """`num_heads` states of `elements` numbers of `element_bytes` bytes, each in a block of its own.

    A head is the unit because a whole layer may exceed a slab: 32 heads of 128 x 128 float32 fill one exactly, and
    any further bytes would not fit.
    """

    layer: int
    num_heads: int
    elements: int
    element_bytes: int = 4

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.elements < 1 or self.block_bytes > SLAB_BYTES:
            raise InvalidInputError(
                f"layer {self.layer} keeps {self.num_heads} states of {self.elements} numbers of {self.element_bytes} "
                f"bytes; there must be at least one of each, and a state has at most {SLAB_BYTES} bytes"
            )

    @property
    def block_bytes(self) -> int:
        """Bytes of the state of one head in the arena, in whole granules."""
        return -(-self.elements * self.element_bytes // GRANULE_BYTES) * GRANULE_BYTES

    @property
    def request_bytes(self) -> int:
        """Bytes of the layer's states of one sequence in the arena."""
        return self.num_heads * self.block_bytes
