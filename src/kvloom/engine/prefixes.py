"""Prefixes: adoption of cached prefixes by sequences, and publication of their blocks. Torch-free."""

from kvloom.cache.lanes import LaneTable
from kvloom.engine.request import Sequence
from kvloom.engine.work import Work


class Prefixes:
    """The prefix index for sequences; counts prompt tokens looked up and found."""

    def __init__(self, lanes: LaneTable, enabled: bool) -> None:
        self.lanes = lanes
        self.enabled = enabled
        self.queries = 0
        self.hits = 0

    def adopt(self, sequence: Sequence) -> None:
        """Start the sequence from cached blocks; at least its last token is left to compute."""
        if not self.enabled or sequence.request.prompt_logprobs is not None:
            return
        limit = len(sequence.token_ids) - 1
        if sequence.eviction is not None:
            limit = min(limit, sequence.eviction.schedule.usable_prefix)
        match = self.lanes.pool.index.match(sequence.token_ids, sequence.chain, limit)
        if match.num_blocks:
            assert sequence.row is not None
            self.lanes.adopt(sequence.row, match)

    def note_adopted(self, sequence: Sequence, cached: int) -> None:
        """Count the `cached` tokens with which a sequence was started."""
        sequence.num_published = cached // self.lanes.spec.block_size
        if sequence.num_preemptions == 0:
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
                self.lanes.publish(sequence.row, sequence.chain, tokens, first, closed)
                sequence.num_published = closed

    def forget(self, sequence: Sequence) -> bool:
        """Drop the entries of the sequence's own blocks; False when it has none."""
        if not sequence.num_published:
            return False
        self.lanes.pool.index.forget(sequence.chain.digests[: sequence.num_published])
        sequence.num_published = 0
        return True
