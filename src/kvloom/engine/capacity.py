"""Capacity: whether requests fit into the arena, alone and beside running ones. Torch-free."""

from collections.abc import Iterable

from kvloom.cache.lanes import LaneTable
from kvloom.engine.request import Sequence
from kvloom.errors import DoesNotFitError
from kvloom.policies.encoding import Encoding
from kvloom.spec.policy import Term
from kvloom.spec.slabs import longest_request, slabs_of_request, sure_bytes
from kvloom.units import format_bytes


class Capacity:
    """Arithmetic over the arena for requests that are processed in chunks of at most `chunk` tokens."""

    def __init__(self, lanes: LaneTable, chunk: int) -> None:
        self.lanes = lanes
        self.chunk = chunk

    def sure_bytes(self, stores: Iterable[Term | None]) -> int:
        """Return the bytes of blocks, native and in `stores`, that are sure to fit into the evacuated arena."""
        names = {store.name for store in stores if store is not None}
        return sure_bytes(self.lanes.spec, self.lanes.pool.arena.num_bytes, names)

    def check_tokens(self, num_tokens: int, what: str) -> None:
        """Raise `DoesNotFitError` unless one sequence of `num_tokens` fits into the empty arena, in whole slabs."""
        needed = slabs_of_request(self.lanes.spec, num_tokens, self.chunk)
        if needed > self.lanes.pool.arena.num_slabs:
            self._refuse(self._peak_bytes(num_tokens), num_tokens, what)

    def check_bytes(self, needed: int, num_tokens: int, what: str, store: Term | None = None) -> None:
        """Raise `DoesNotFitError` unless `needed` bytes for `num_tokens`, some in `store`, fit an empty arena."""
        if needed > self.sure_bytes([store]):
            self._refuse(needed, num_tokens, what)

    def _refuse(self, needed: int, num_tokens: int, what: str) -> None:
        arena, spec = self.lanes.pool.arena, self.lanes.spec
        raise DoesNotFitError(
            f"{what}: {num_tokens} tokens need {format_bytes(needed)} of KV cache; "
            f"the arena has {format_bytes(arena.num_bytes)}, room for about "
            f"{longest_request(spec, arena.num_bytes, self.chunk)} tokens. Shorten the prompt, "
            "lower max_tokens, raise --kv-cache-memory-bytes or choose a policy that evicts during prefill"
        )

    def pending_tokens(self, sequence: Sequence) -> int:
        """Return the number of tokens of a running sequence that the model has not processed."""
        assert sequence.row is not None
        return len(sequence.token_ids) - int(self.lanes.seen[sequence.row])

    def is_lossy(self, sequence: Sequence) -> bool:
        """Return whether the lanes of this sequence have lost data."""
        return sequence.row is not None and self.lanes.is_lossy(sequence.row)

    def stays(self, sequence: Sequence) -> bool:
        """Return whether a sequence may not be preempted: it is lossy, or is one of beams that may become so.

        Computed again, it would give other tokens, unless it does no more than encode (`Encoding.replayable`). Beams
        wait for one another. A beam that had to be computed again beside lossy ones might never fit, so all of them
        keep the memory that admission set aside.
        """
        beam = sequence.request.beams is not None and sequence.request.forked
        loses = sequence.eviction is not None or sequence.encoding is not None
        return (self.is_lossy(sequence) and not _replayable(sequence)) or (beam and loses)

    def has_room(self, sequence: Sequence, running: list[Sequence]) -> bool:
        """Return whether the rest of the prompt fits beside the needs of running prefills and unpreemptible sequences.

        Sequences that may become lossy and cannot be replayed cannot be preempted afterwards. So the most bytes that
        all of them may hold, each with its own blocks, must fit into the arena together. Where blocks are encoded, only
        bytes count that blocks of any size can take: a slab holds blocks of one size.
        """
        assert sequence.row is not None
        together = [*running, sequence]
        lasting = [self._lasting_bytes(s) for s in together]
        stores = [None if s.encoding is None else s.encoding.store for s in together]
        sure = self.sure_bytes(stores)
        if lasting[-1] and sum(lasting) > sure:
            return False
        counted = [s for s in running if self.pending_tokens(s) > 1 or self.stays(s)]
        needed = sum(self._bytes_to_come(s) for s in [*counted, sequence])
        arena, index = self.lanes.pool.arena, self.lanes.pool.index
        free = (sure if any(stores) else arena.num_bytes) - arena.used_bytes
        return needed <= free or needed <= free + index.idle_bytes

    def _lasting_bytes(self, sequence: Sequence) -> int:
        """Return the most bytes that a sequence which may come to stay (`stays`) ever holds; 0 for all others."""
        eviction, encoding, request = sequence.eviction, sequence.encoding, sequence.request
        total, rows = len(request.prompt_token_ids) + request.max_tokens, 1 if request.forked else request.params.n
        if sequence.row is None:
            return 0
        if eviction is not None and eviction.occupancy.may_drop(total):
            if self._is_settled(sequence):
                return eviction.future_bytes(sequence.row, total, self.chunk)
            return eviction.occupancy.peak_bytes(total, self.chunk, rows)
        if encoding is None or (_replayable(sequence) and request.beams is None):
            return 0
        return self._encoded_bytes(sequence, encoding, total, rows)

    def _encoded_bytes(self, sequence: Sequence, encoding: Encoding, total: int, rows: int) -> int:
        """Return the most bytes of an encoded sequence, or of the `rows` that it forks into, up to `total` tokens."""
        assert sequence.row is not None
        if self._is_settled(sequence) and self.lanes.seen[sequence.row] >= encoding.prompt_tokens:
            return encoding.future_bytes(sequence.row, total)
        return encoding.peak_bytes(total, self.chunk, rows)

    def _is_settled(self, sequence: Sequence) -> bool:
        """Return whether a sequence has lost data and forks no more: what it holds says what it comes to hold."""
        return self.is_lossy(sequence) and sequence.request.forked

    def _bytes_to_come(self, sequence: Sequence) -> int:
        assert sequence.row is not None
        total, soon = self._lasting_bytes(sequence), len(sequence.token_ids) + 1
        if not total and sequence.encoding is not None:
            total = self._encoded_bytes(sequence, sequence.encoding, soon, 1)
        total = total or self._peak_bytes(soon)
        return max(0, total - self.lanes.sequence_bytes(sequence.row))

    def _peak_bytes(self, num_tokens: int) -> int:
        return self.lanes.spec.request_bytes(num_tokens, self.chunk)


def _replayable(sequence: Sequence) -> bool:
    """Return whether a sequence that encodes blocks does no more, and can be computed again with the same result."""
    return sequence.eviction is None and sequence.encoding is not None and sequence.encoding.replayable
