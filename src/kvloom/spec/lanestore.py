"""LaneStore: the bytes of one lane for a number of tokens, encoded or not.

A lane under a store keeps its first sinks and newest tokens in the native store, the rest encoded in whole blocks::

    | sinks, native | e blocks, encoded | residual and open block, native |
    0 ------------- ks ---------------- ks + e P ------------------------ n --> tokens held
"""

from dataclasses import dataclass

from kvloom.errors import InvalidInputError
from kvloom.spec.bounds import Bounds
from kvloom.spec.format import store_format
from kvloom.spec.kv import KVSpec, LaneGroup
from kvloom.spec.policy import PolicySpec

COLUMNS_AT_ONCE = 8
"""Most blocks of a lane that are encoded together: while they are, both copies exist."""


@dataclass(frozen=True)
class LaneStore:
    """How one lane stores tokens: bytes of a native and of an encoded block, and the tokens that stay native."""

    block_size: int
    native_bytes: int
    encoded_bytes: int | None
    sinks: int = 0
    residual: int = 0

    def blocks(self, held: int) -> tuple[int, int]:
        """Return the (native, encoded) blocks of a lane that holds `held` tokens."""
        if self.encoded_bytes is None:
            return -(-held // self.block_size), 0
        kept = min(held, -(-self.sinks // self.block_size) * self.block_size)
        rest = held - kept
        encoded = max(0, rest - self.residual) // self.block_size
        return -(-kept // self.block_size) + -(-(rest - encoded * self.block_size) // self.block_size), encoded

    def lane_bytes(self, held: int) -> int:
        """Return the bytes of a lane that holds `held` tokens."""
        native, encoded = self.blocks(held)
        return native * self.native_bytes + encoded * (self.encoded_bytes or 0)

    def fewest(self, low: int, high: int) -> int:
        """Return the least bytes of a lane that holds from `low` to `high` tokens; encoding a block may save some."""
        if self.encoded_bytes is None:
            return self.lane_bytes(low)
        return min(self.lane_bytes(held) for held in range(low, min(high, low + self.block_size) + 1))

    def most(self, low: int, high: int) -> int:
        """Return the most bytes of a lane that holds from `low` to `high` tokens, between two steps."""
        if self.encoded_bytes is None:
            return self.lane_bytes(high)
        return max(self.lane_bytes(held) for held in range(max(low, high - self.block_size), high + 1))

    def peak(self, low: int, high: int) -> int:
        """Return the most bytes of a lane on the way from `low` to `high` tokens, within steps too."""
        if self.encoded_bytes is None:
            return self.lane_bytes(high)
        first = max(low, high - self.block_size)
        return max(self.lane_bytes(first), *(self.step_bytes(held) for held in range(first, high + 1)))

    def step_bytes(self, held: int) -> int:
        """Return the most bytes of a lane in the step that brings it to `held` tokens.

        A block that this step completes is encoded at its end, and until then both copies exist.
        """
        if self.encoded_bytes is None or not held:
            return self.lane_bytes(held)
        before, encoded = self.blocks(held - 1)[1], self.blocks(held)[1]
        native = -(-held // self.block_size) - before
        return native * self.native_bytes + encoded * self.encoded_bytes

    def turning_bytes(self, held: int) -> int:
        """Return the most bytes of a native lane of `held` tokens while its blocks are encoded, a few at a time."""
        native = -(-held // self.block_size) * self.native_bytes
        return native + min(COLUMNS_AT_ONCE, self.blocks(held)[1]) * (self.encoded_bytes or 0)

    def ragged_bytes(self, lanes: int, total: int, least: int, most: int) -> Bounds:
        """Return bounds over all ways in which `lanes` lanes hold `total` tokens, each from `least` to `most`."""
        size = self.block_size
        blocks = min(lanes * -(-most // size), (total + lanes * (size - 1)) // size)
        if self.encoded_bytes is None:
            low = max(lanes * -(-least // size), -(-total // size))
            return Bounds(low * self.native_bytes, blocks * self.native_bytes)
        open_blocks = -(-self.sinks // size) + -(-(self.residual + size - 1) // size)
        native = min(blocks, lanes * open_blocks)
        cheapest = min(self.native_bytes, self.encoded_bytes)
        high = native * self.native_bytes + min(blocks, total // size) * self.encoded_bytes
        return Bounds(-(-total // size) * cheapest, min(high, blocks * max(self.native_bytes, self.encoded_bytes)))


def lane_store(kv: KVSpec, group: LaneGroup, policy: PolicySpec) -> LaneStore:
    """Return how lanes of `group` are stored under `policy`; windowed lanes stay native.

    Raises `InvalidInputError` when the block size does not suit the store.
    """
    if policy.store is None or policy.store.name == kv.store or group.window is not None:
        return LaneStore(kv.block_size, group.block_bytes, None)
    lanes = kv.lane_set[group.lanes[0]]
    store = store_format(policy.store.name)
    if kv.block_size % store.group:
        raise InvalidInputError(
            f"store {store.name} encodes {store.group} tokens together, and block size {kv.block_size} is not a "
            f"multiple of that. Use --block-size {-(-kv.block_size // store.group) * store.group}"
        )
    encoded = store.block_bytes(kv.block_size, lanes.k_width, lanes.v_width)
    return LaneStore(kv.block_size, group.block_bytes, encoded,
                     policy.store.number("sinks"), policy.store.number("residual"))
