"""Queues: the sequences that wait and those that run, and their rows of the lane table. Torch-free."""

from kvloom.cache.lanes import LaneTable
from kvloom.engine.request import Request, Sequence, Status
from kvloom.spec.store import STORES


def service_order(sequence: Sequence) -> tuple[tuple[int, int], int]:
    """Return the key by which sequences are served: priority, arrival, then place in the request."""
    return sequence.request.sort_key, sequence.index


class Queues:
    """Moves sequences between waiting, running and finished; a running one has a row, the others have none."""

    def __init__(self, lanes: LaneTable) -> None:
        self.lanes = lanes
        groups = lanes.spec.groups
        whole = [group for group in groups if group.window is None] or groups
        self._spread_lanes = [lane for group in whole for lane in group.lanes]  # lanes whose length a policy decides
        self._native_bits = STORES.get(lanes.spec.store).bits
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def enqueue(self, sequence: Sequence) -> None:
        """Add a sequence without a row to the waiting ones."""
        if sequence.encoding is not None:
            sequence.encoding.restart()
        sequence.kv_bits = sequence.kv_bits or self._native_bits
        sequence.status = Status.WAITING
        self.waiting.append(sequence)
        self.waiting.sort(key=service_order)

    def start(self, sequence: Sequence) -> None:
        """Run a sequence that has its row, and waited if it is not a new one."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.status = Status.RUNNING
        self.running.append(sequence)

    def finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End a sequence, from whatever state, and free its blocks."""
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
        if sequence.row is not None:  # also when an interrupt fell between opening the row and running
            self._close(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason

    def park(self, beam: Sequence) -> None:
        """Free the blocks of a beam that has offered its tokens, so that another beam of its search fits."""
        self.running.remove(beam)
        self._close(beam)
        beam.status = Status.WAITING
        beam.num_preemptions += 1
        self.num_preemptions += 1

    def preempt(self, victim: Sequence) -> None:
        """Free the blocks of a running sequence for others; it waits and is computed again from its tokens."""
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self.restart(victim)

    def restart(self, sequence: Sequence) -> None:
        """Free the blocks of a running sequence, which waits again and is computed again from its tokens."""
        self.running.remove(sequence)
        self._close(sequence)
        if sequence.eviction is not None:
            sequence.eviction.restart()
        self.enqueue(sequence)

    def fork(self, request: Request) -> Sequence:
        """Make one more sequence of a request whose prompt is computed; it shares all blocks of the first.

        Where the first has lost its row meanwhile, the new one waits to be computed from its tokens.
        """
        leader, child = request.sequences[0], request.add_sequence()
        child.num_cached_tokens = leader.num_cached_tokens
        child.follow(leader)
        if leader.eviction is not None:
            seed = request.seed + (child.index if request.beams is None else 0)
            child.eviction = leader.eviction.fork(child.token_ids, seed)
        if leader.encoding is not None:
            child.encoding = leader.encoding.fork()
        if leader.row is None:
            self.enqueue(child)
        else:
            child.row = self.lanes.fork(leader.row)
            child.num_published = leader.num_published
            self.start(child)
        return child

    def reparent(self, child: Sequence, parent: Sequence) -> None:
        """Continue the beam `child` from the state of `parent`, sharing its blocks; releases the child's own.

        Where one of the two has no blocks now, the child waits to be computed from its tokens.
        """
        if child is not parent:
            child.follow(parent)
            if child.eviction is not None and parent.eviction is not None:
                before = child.eviction.evicted_tokens
                child.eviction = parent.eviction.fork(child.token_ids, parent.eviction.record.seed)
                child.eviction.evicted_tokens = before
            if parent.encoding is not None:
                child.encoding = parent.encoding.fork()
            if child.row is not None:
                self._close(child)
            if parent.row is not None and child.status is Status.RUNNING:
                child.row = self.lanes.fork(parent.row)
                child.num_published = parent.num_published
                return
            if child.status is Status.RUNNING:
                self.running.remove(child)
        if child.row is None and child not in self.waiting:
            self.enqueue(child)

    def _close(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self.note_bytes(sequence)
        self.lanes.close(sequence.row)
        self.lanes.pool.index.touch(sequence.chain.digests[: sequence.num_published])
        if sequence.encoding is not None:
            self.lanes.pool.index.touch(sequence.encoding.chain.digests[: sequence.encoding.num_published])
        sequence.row = None
        sequence.kv_bytes = 0

    def note_bytes(self, sequence: Sequence) -> None:
        """Update the present and peak KV bytes of a running sequence."""
        assert sequence.row is not None
        sequence.kv_bytes = self.lanes.sequence_bytes(sequence.row)
        sequence.kv_bits = self._native_bits
        if sequence.encoding is not None:
            sequence.kv_bits = sequence.encoding.bits_per_element(sequence.row)
        held = self.lanes.held[sequence.row, self._spread_lanes]
        sequence.kv_spread = (int(held.min()), int(held.max()))
        sequence.kv_peak_bytes = max(sequence.kv_peak_bytes, self.lanes.peak_bytes[sequence.row], sequence.kv_bytes)
