"""Prefixes: adoption of cached prefixes by sequences, and publication of their blocks. Torch-free."""

from kvloom.cache.laneprefixes import LanePrefixes
from kvloom.cache.lanes import LaneTable
from kvloom.engine.request import Sequence
from kvloom.engine.work import Work


class Prefixes:
    """The prefix index for sequences; counts prompt tokens looked up and found."""

    def __init__(self, lanes: LaneTable, enabled: bool) -> None:
        self.lanes = lanes
        self._shared = LanePrefixes(lanes)
        self.enabled = enabled
        self.queries = 0
        self.hits = 0

    def adopt(self, sequence: Sequence) -> None:
        """Start the sequence from cached blocks, encoded ones if these are more; its last token is left to compute."""
        if sequence.encoding is not None:
            sequence.encoding.restart()
        if not self.enabled or sequence.request.prompt_logprobs is not None:
            return
        limit = len(sequence.token_ids) - 1
        encoding = sequence.encoding
        if encoding is not None:
            limit = min(limit, encoding.prompt_tokens)  # in a replay, blocks of generated tokens are not 16-bit ones
        cached = None
        if sequence.eviction is not None and sequence.eviction.schedule.usable_prefix < limit:
            cached = self.lanes.pool.index.match(sequence.token_ids, sequence.chain, limit)
            limit = sequence.eviction.schedule.usable_prefix
        match = self.lanes.pool.index.match(sequence.token_ids, sequence.chain, limit)
        if cached is not None and sequence.is_new:
            unused = cached.num_blocks - match.num_blocks
            sequence.request.unused_prefix = unused * self.lanes.spec.block_size
        assert sequence.row is not None
        if encoding is not None and sequence.eviction is None:
            limit = min(limit, encoding.usable_prefix(len(sequence.token_ids)))
            encoded = self.lanes.pool.index.match(sequence.token_ids, encoding.chain, limit)
            if encoded.num_blocks > match.num_blocks:
                self._shared.adopt(sequence.row, encoded)
                encoding.adopt(sequence.row, encoded.num_blocks)
                return
        if match.num_blocks:
            self._shared.adopt(sequence.row, match)

    def note_adopted(self, sequence: Sequence, cached: int) -> None:
        """Count the `cached` tokens with which a sequence was started."""
        sequence.num_published = cached // self.lanes.spec.block_size
        if sequence.is_new:
            self.queries += len(sequence.token_ids)
            self.hits += cached
            sequence.num_cached_tokens = cached

    def publish(self, work: list[Work]) -> None:
        """Enter the blocks that closed in this step into the prefix index: committed tokens only."""
        if not self.enabled:
            return
        for item in work:
            sequence = item.sequence
            if sequence.row is None:
                continue
            closed = int(self.lanes.seen[sequence.row]) // self.lanes.spec.block_size
            if closed > sequence.num_published:
                tokens, first = sequence.token_ids, sequence.num_published
                self._shared.publish(sequence.row, sequence.chain, tokens, first, closed)
                sequence.num_published = closed

    def publish_encoded(self, sequence: Sequence) -> None:
        """Enter the blocks of a sequence that are encoded in all lanes into the prefix index, under its store."""
        encoding = sequence.encoding
        if not self.enabled or encoding is None or sequence.row is None:
            return
        first, last = encoding.num_published, int(encoding.done.min())
        if last > first:
            tokens = sequence.token_ids
            self._shared.publish_encoded(sequence.row, encoding.chain, tokens, first, last, sequence.chain)
            encoding.num_published = last

    def drop(self, sequence: Sequence) -> bool:
        """Drop the entries of the sequence's own blocks; False when it has none."""
        index, encoding = self.lanes.pool.index, sequence.encoding
        found = bool(sequence.num_published)
        index.drop(sequence.chain.digests[: sequence.num_published])
        sequence.num_published = 0
        if encoding is not None and encoding.num_published:
            index.drop(encoding.chain.digests[: encoding.num_published])
            encoding.num_published, found = 0, True
        return found
