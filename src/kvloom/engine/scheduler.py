"""Scheduler: chooses sequences and numbers of tokens for the next step, and sequences to preempt. Torch-free.

Running sequences come first, decodes before prefill chunks, then waiting ones, all within one budget of tokens. Blocks
are taken in this order: free ones, then by evacuation, by reclaim from the prefix index, and by preemption of the
sequence that would be served last. A preempted sequence is computed again from its tokens; where its blocks are
encoded, in the steps in which they were.
"""

from kvloom.cache.lanes import LaneTable
from kvloom.engine.capacity import Capacity
from kvloom.engine.prefixes import Prefixes
from kvloom.engine.queues import Queues, service_order
from kvloom.engine.request import Sequence, Status
from kvloom.engine.work import Work


class Scheduler:
    """Chooses among `queues` within `capacity`, starting from `prefixes`; changes nothing but them and the lanes."""

    def __init__(
        self,
        lanes: LaneTable,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.lanes = lanes
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.queues = Queues(lanes)
        self.capacity = Capacity(lanes, max_num_batched_tokens)
        self.prefixes = Prefixes(lanes, enable_prefix_caching)

    @property
    def has_work(self) -> bool:
        """True while any sequence waits or runs."""
        return bool(self.waiting or self.running)

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences that wait, in the order in which they will be served."""
        return self.queues.waiting

    @property
    def running(self) -> list[Sequence]:
        """Sequences that have a row."""
        return self.queues.running

    @property
    def num_preemptions(self) -> int:
        """Number of preemptions."""
        return self.queues.num_preemptions

    def schedule(self) -> list[Work]:
        """Choose the work of the next step and make its slots; [] when nothing can run (then nothing waits, either)."""
        work: list[Work] = []
        budget = self.max_num_batched_tokens
        pending = self.capacity.pending_tokens
        for sequence in sorted(self.running, key=lambda s: (pending(s) > 1, service_order(s))):
            if budget == 0:
                break
            # not preempted in this step, and not a beam that waits for the others
            if sequence.status is Status.RUNNING and pending(sequence):
                budget -= self._advance(sequence, budget, work)
        self._admit(budget, work)
        while self.waiting and not work and (idle := self._parkable()):
            self.queues.park(idle[-1])
            self._admit(budget, work)
        return [w for w in work if w.sequence.status is Status.RUNNING]

    def make_room(self, sequence: Sequence) -> bool:
        """Free blocks for a policy that must replace blocks; False when no more can be freed.

        First the prefix index drops this sequence's own blocks. Then the sequence that would be served last is
        preempted, which may be this one, if its policy does no more than encode.
        """
        if self.prefixes.drop(sequence):
            return True
        own = sequence.eviction is None and len(self.running) > 1
        able = [s for s in self.running if (own or s is not sequence) and not self.capacity.stays(s)]
        if able:
            self.queues.preempt(max(able, key=service_order))
        return bool(able)

    def _parkable(self) -> list[Sequence]:
        """Return the beams that have offered their tokens and may be computed again."""
        return [s for s in self.running if not self.capacity.pending_tokens(s) and not self.capacity.stays(s)]

    def _advance(self, sequence: Sequence, budget: int, work: list[Work]) -> int:
        """Make slots for the next tokens of `sequence`, preempting later ones; returns tokens of budget used."""
        assert sequence.row is not None
        start = int(self.lanes.seen[sequence.row])
        number = self._next_tokens(sequence, budget)
        returned = 0
        while not self.lanes.extend(sequence.row, number):
            victim = self._victim(sequence)
            returned += self._preempt(victim, work)
            if victim is sequence:
                return -returned
        work.append(Work(sequence, start, number, start + number == len(sequence.token_ids)))
        return number - returned

    def _next_tokens(self, sequence: Sequence, budget: int) -> int:
        """Return how many tokens to process now: within the budget, and not past the next time a policy is due."""
        assert sequence.row is not None
        start = int(self.lanes.seen[sequence.row])
        end = min(len(sequence.token_ids), start + budget)
        boundary = None if sequence.eviction is None else sequence.eviction.schedule.next_boundary(start)
        if boundary is not None:
            end = min(end, boundary)
        if sequence.encoding is not None:
            end = min(end, sequence.encoding.next_boundary(start))
        return end - start

    def _victim(self, sequence: Sequence) -> Sequence:
        """Return the sequence to preempt for `sequence`: the last to be served, itself included.

        A lossy sequence is never a victim, because computing it again would give other tokens. Admission has reserved
        memory for all such sequences together.
        """
        able = [s for s in self.running if not self.capacity.stays(s)]
        assert able, "sequences that cannot be preempted were admitted beyond the arena"
        return max(able, key=service_order)

    def _preempt(self, victim: Sequence, work: list[Work]) -> int:
        """Preempt a sequence and take it out of `work`; returns the tokens it had been given in this step."""
        self.queues.preempt(victim)
        mine = [w for w in work if w.sequence is victim]
        for item in mine:
            work.remove(item)
        return sum(w.num_tokens for w in mine)

    def _admit(self, budget: int, work: list[Work]) -> None:
        """Start waiting sequences, in order, while there are tokens, rows and blocks."""
        while self.waiting and budget > 0:
            sequence = self.waiting[0]
            rows = 1 if sequence.request.forked else sequence.request.params.n
            if len(self.running) + self._promised_rows() + rows > self.max_num_seqs:
                return
            sequence.row = self.lanes.open()
            self.prefixes.adopt(sequence)
            start = int(self.lanes.seen[sequence.row])
            number = self._next_tokens(sequence, budget)
            roomy = not self.running or self.capacity.has_room(sequence, self.running)
            if not roomy or not self.lanes.extend(sequence.row, number):
                self.lanes.close(sequence.row)
                sequence.row = None
                if not self.running and not work:
                    raise AssertionError(f"{sequence.request.request_id} was admitted but does not fit alone")
                return
            self.prefixes.note_adopted(sequence, start)
            self.queues.start(sequence)
            work.append(Work(sequence, start, number, start + number == len(sequence.token_ids)))
            budget -= number

    def _promised_rows(self) -> int:
        return sum(s.request.params.n - 1 for s in self.running if s.index == 0 and not s.request.forked)
