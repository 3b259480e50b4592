"""LanePrefixes: blocks that the prefix index gives to sequences, and that sequences give to it. Torch-free."""

from collections.abc import Sequence

from kvloom.cache.arena import Addresses
from kvloom.cache.lanes import LaneTable
from kvloom.cache.prefix import PrefixChain, PrefixMatch


class LanePrefixes:
    """Shares blocks between the sequences of `lanes` and the prefix index of their pool."""

    def __init__(self, lanes: LaneTable) -> None:
        self.lanes = lanes
        self.index = lanes.pool.index

    def adopt(self, sequence: int, match: PrefixMatch) -> None:
        """Start an empty `sequence` with the blocks of a matched prefix, shared with the prefix index."""
        lanes, size = self.lanes, self.lanes.spec.block_size
        tokens = match.num_blocks * size
        lanes.widen(match.num_blocks)
        for number, (group, members) in enumerate(zip(lanes.spec.groups, lanes.group_lanes, strict=True)):
            first = 0 if group.window is None else max(0, tokens - (group.window - 1))
            for block in range(first // size, match.num_blocks):
                addresses = self.index.blocks(match.digests[block], number)
                assert addresses is not None, "a match names only blocks in the index"
                lanes.pool.arena.share(addresses)
                lanes.table[sequence, members, block] = addresses
            lanes.begin[sequence, members] = first
            lanes.held[sequence, members] = tokens - first
        lanes.seen[sequence] = tokens
        self.index.touch(match.digests)

    def publish(self, sequence: int, chain: PrefixChain, tokens: Sequence[int], first: int, last: int) -> None:
        """Enter the full blocks `first .. last - 1` of a sequence that has lost nothing into the prefix index."""
        if not self.lanes.is_lossy(sequence):  # what is computed from lossy lanes is no prefix of anything else
            self._publish(sequence, chain, tokens, first, last)

    def publish_encoded(
        self, sequence: int, chain: PrefixChain, tokens: Sequence[int], first: int, last: int, native: PrefixChain
    ) -> None:
        """Enter blocks `first .. last - 1`, encoded where lanes are, into the prefix index, under a chain of the store.

        The entries of the `native` chain leave to them what both would list: blocks of windows and of sinks. Nothing
        happens where tokens were lost.
        """
        if sequence not in self.lanes.positions:
            for block, blocks in self._publish(sequence, chain, tokens, first, last):
                self.index.leave(native, block, blocks)

    def _publish(
        self, sequence: int, chain: PrefixChain, tokens: Sequence[int], first: int, last: int
    ) -> list[tuple[int, list[Addresses | None]]]:
        """Enter blocks into the prefix index; returns each with its addresses by group."""
        size, found = self.lanes.spec.block_size, []
        chain.extend(tokens, size, last)
        for block in range(first, last):
            blocks: list[Addresses | None] = []
            for members in self.lanes.group_lanes:
                addresses = self.lanes.table[sequence, members, block]
                blocks.append(addresses if (addresses >= 0).all() else None)
            self.index.publish(chain, block, tokens[block * size : (block + 1) * size], blocks)
            found.append((block, blocks))
        return found
