"""Encodings: blocks that are due are encoded at the end of a step, when its tokens are committed and evictions done."""

from kvloom.cache.encoder import BlockEncoder
from kvloom.engine.request import Sequence
from kvloom.engine.scheduler import Scheduler
from kvloom.engine.work import Work
from kvloom.errors import DoesNotFitError


class Encodings:
    """Encodes the blocks of sequences whose policy has a store, and enters them into the prefix index."""

    def __init__(self, encoder: BlockEncoder, scheduler: Scheduler) -> None:
        self.encoder = encoder
        self.scheduler = scheduler

    def encode(self, work: list[Work]) -> None:
        """Encode what is due in the sequences of `work`; they and others may be preempted.

        Raises `DoesNotFitError` when blocks are short for ever.
        """
        for item in work:
            sequence = item.sequence
            encoding, row = sequence.encoding, sequence.row
            if encoding is None or row is None or sequence.request.error is not None:
                continue
            due = encoding.due(row)
            for lanes, first, last in due:
                native = sequence.chain.digests[int(first.min()) : int(last.max())]
                while sequence.row is not None and not self.encoder.encode(
                    row, lanes, encoding.store.name, first, last, native
                ):
                    self._make_room(sequence)
            if due:
                self.scheduler.prefixes.publish_encoded(sequence)

    def _make_room(self, sequence: Sequence) -> None:
        if not self.scheduler.make_room(sequence):
            assert sequence.encoding is not None
            raise DoesNotFitError(
                f"{sequence.request.request_id}: no blocks are left to encode in {sequence.encoding.store.name}. "
                "Raise --kv-cache-memory-bytes"
            )
