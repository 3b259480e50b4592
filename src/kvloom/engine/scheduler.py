"""Scheduler: which sequences process how many tokens in the next step, and whose blocks give way. Torch-free.

Running sequences come first, decodes before prefill chunks, then waiting ones, all within one budget of tokens. Blocks
that are short are looked for in this order: free, evacuated, reclaimed from the prefix index, preempted from the
sequence that would be served last. A preempted sequence is computed again from its tokens.
"""

from dataclasses import dataclass

from kvloom.cache.lanes import LaneTable
from kvloom.engine.request import Request, Sequence, Status
from kvloom.errors import DoesNotFitError
from kvloom.spec.slabs import longest_request, slabs_of_request, sure_bytes
from kvloom.units import format_bytes


@dataclass(frozen=True)
class Work:
    """`num_tokens` tokens of `sequence`, from `start`; `samples` when its next token comes out of this step."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool


class Scheduler:
    """Queues and rows; the lane table is the only thing it changes."""

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
        self.enable_prefix_caching = enable_prefix_caching
        groups = lanes.spec.groups
        whole = [group for group in groups if group.window is None] or groups
        self._spread_lanes = [lane for group in whole for lane in group.lanes]  # lanes whose length a policy decides
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0

    # ---- requests come and go -------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a new request, which the caller has found to fit (`check_fits`, `check_bytes`)."""
        self._queue(request.sequences[0])

    def check_fits(self, num_tokens: int, what: str) -> None:
        """Raise `DoesNotFitError` unless one sequence of `num_tokens` fits into the empty arena."""
        if not self.fits_alone(num_tokens):
            self._refuse(self._peak_bytes(num_tokens), num_tokens, what)

    def check_bytes(self, needed: int, num_tokens: int, what: str) -> None:
        """Raise `DoesNotFitError` unless `needed` bytes for `num_tokens` fit into the empty arena."""
        if needed > self.capacity_bytes:
            self._refuse(needed, num_tokens, what)

    @property
    def capacity_bytes(self) -> int:
        """Bytes of blocks, of whatever mixture of sizes, that are sure to fit into the arena once it is evacuated."""
        return sure_bytes(self.lanes.spec, self.lanes.pool.arena.num_bytes)

    def _refuse(self, needed: int, num_tokens: int, what: str) -> None:
        arena, spec = self.lanes.pool.arena, self.lanes.spec
        raise DoesNotFitError(
            f"{what}: {num_tokens} tokens need {format_bytes(needed)} of KV cache; "
            f"the arena has {format_bytes(arena.num_bytes)}, room for about "
            f"{longest_request(spec, arena.num_bytes, self.max_num_batched_tokens)} tokens. Shorten the prompt, "
            "lower max_tokens, raise --kv-cache-memory-bytes or choose a policy that evicts during prefill"
        )

    def fits_alone(self, num_tokens: int) -> bool:
        """Return whether one sequence of `num_tokens` fits into the empty arena, counted in whole slabs."""
        needed = slabs_of_request(self.lanes.spec, num_tokens, self.max_num_batched_tokens)
        return needed <= self.lanes.pool.arena.num_slabs

    def _peak_bytes(self, num_tokens: int) -> int:
        return self.lanes.spec.request_bytes(num_tokens, self.max_num_batched_tokens)

    def _queue(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda s: (s.request.sort_key, s.index))

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

    def _close(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self.note_bytes(sequence)
        self.lanes.close(sequence.row)
        self.lanes.pool.index.touch(sequence.chain.digests[: sequence.num_published])
        sequence.row = None
        sequence.kv_bytes = 0

    def note_bytes(self, sequence: Sequence) -> None:
        """Bring the KV bytes, now and at peak, of a running sequence up to date."""
        assert sequence.row is not None
        sequence.kv_bytes = self.lanes.sequence_bytes(sequence.row)
        held = self.lanes.held[sequence.row, self._spread_lanes]
        sequence.kv_spread = (int(held.min()), int(held.max()))
        sequence.kv_peak_bytes = max(sequence.kv_peak_bytes, self.lanes.peak_bytes[sequence.row], sequence.kv_bytes)

    # ---- one step -------------------------------------------------------------------------------------------------

    def schedule(self) -> list[Work]:
        """Choose the work of the next step and make its slots; [] when nothing can run (then nothing waits, either)."""
        work: list[Work] = []
        budget = self.max_num_batched_tokens
        chosen = sorted(self.running, key=lambda s: (self._pending(s) > 1, s.request.sort_key, s.index))
        for sequence in chosen:
            if budget == 0:
                break
            # not preempted a moment ago, and no beam that waits for the others
            if sequence.status is Status.RUNNING and self._pending(sequence):
                budget -= self._advance(sequence, budget, work)
        self._admit(budget, work)
        while self.waiting and not work and (idle := self._parkable()):
            self._park(idle[-1])
            self._admit(budget, work)
        return [w for w in work if w.sequence.status is Status.RUNNING]

    def _parkable(self) -> list[Sequence]:
        """Return the beams that have offered their tokens and may be computed again."""
        return [s for s in self.running if not self._pending(s) and not self._stays(s)]

    def _park(self, beam: Sequence) -> None:
        """Take the blocks of a beam that has offered its tokens, so that another of its search gets room."""
        self.running.remove(beam)
        self._close(beam)
        beam.status = Status.WAITING
        beam.num_preemptions += 1
        self.num_preemptions += 1

    def _pending(self, sequence: Sequence) -> int:
        assert sequence.row is not None
        return len(sequence.token_ids) - int(self.lanes.seen[sequence.row])

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
        """Return how many tokens to process now: within the budget, and not past where a policy must look again."""
        assert sequence.row is not None
        start = int(self.lanes.seen[sequence.row])
        end = min(len(sequence.token_ids), start + budget)
        boundary = None if sequence.eviction is None else sequence.eviction.schedule.next_boundary(start)
        return (end if boundary is None else min(end, boundary)) - start

    def _victim(self, sequence: Sequence) -> Sequence:
        """Return whose blocks give way to `sequence`: the last to be served, itself included.

        A sequence that has lost tokens is never a victim, since computing it again would give other tokens; admission
        has kept room for all of its kind, so they never run short of each other.
        """
        able = [s for s in self.running if not self._stays(s)]
        assert able, "sequences that cannot be preempted were admitted beyond the arena"
        return max(able, key=lambda s: (s.request.sort_key, s.index))

    def is_lossy(self, sequence: Sequence) -> bool:
        """Return whether a policy has dropped tokens of this sequence."""
        return sequence.row is not None and sequence.row in self.lanes.positions

    def _stays(self, sequence: Sequence) -> bool:
        """Return whether a sequence may not be preempted: it lost tokens, or is one of beams that may.

        Beams wait for one another. One that had to be computed again beside others that lost tokens might never find
        room, so all of them keep what admission set aside.
        """
        beam = sequence.request.beams is not None and sequence.request.forked
        return self.is_lossy(sequence) or (beam and sequence.eviction is not None)

    def make_room(self, sequence: Sequence) -> bool:
        """Free blocks for a policy that must replace shared ones; False when nothing more can be done.

        First the prefix index lets go of this sequence's own blocks, then others are preempted.
        """
        if sequence.num_published:
            self.lanes.pool.index.forget(sequence.chain.digests[: sequence.num_published])
            sequence.num_published = 0
            return True
        able = [s for s in self.running if s is not sequence and not self._stays(s)]
        if able:
            self._preempt(max(able, key=lambda s: (s.request.sort_key, s.index)), [])
        return bool(able)

    def _preempt(self, victim: Sequence, work: list[Work]) -> int:
        """Take the blocks of a running sequence; it waits again. Returns the tokens it had been given in this step."""
        self.running.remove(victim)
        self._close(victim)
        if victim.eviction is not None:
            victim.eviction.restart()
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self._queue(victim)
        mine = [w for w in work if w.sequence is victim]
        for item in mine:
            work.remove(item)
        return sum(w.num_tokens for w in mine)

    def _admit(self, budget: int, work: list[Work]) -> None:
        """Start waiting sequences, in order, while tokens, rows and blocks last."""
        while self.waiting and budget > 0:
            sequence = self.waiting[0]
            rows = 1 if sequence.request.forked else sequence.request.params.n
            if len(self.running) + self._promised_rows() + rows > self.max_num_seqs:
                return
            sequence.row = self.lanes.open()
            self._adopt_prefix(sequence)
            start = int(self.lanes.seen[sequence.row])
            number = self._next_tokens(sequence, budget)
            roomy = not self.running or self._has_room(sequence)
            if not roomy or not self.lanes.extend(sequence.row, number):
                self.lanes.close(sequence.row)
                sequence.row = None
                if not self.running and not work:
                    raise AssertionError(f"{sequence.request.request_id} was admitted but does not fit alone")
                return
            self._count_prefix(sequence, start)
            self.waiting.pop(0)
            sequence.status = Status.RUNNING
            self.running.append(sequence)
            work.append(Work(sequence, start, number, start + number == len(sequence.token_ids)))
            budget -= number

    def _promised_rows(self) -> int:
        return sum(s.request.params.n - 1 for s in self.running if s.index == 0 and not s.request.forked)

    def _has_room(self, sequence: Sequence) -> bool:
        """Return whether the rest of the prompt fits beside what running prefills and unpreemptible ones still need.

        Sequences that may lose tokens cannot be preempted from then on. So that they never run short of each other,
        all that they may come to hold must fit into the arena together, each with blocks of its own.
        """
        assert sequence.row is not None
        lasting = [self._lasting_bytes(s) for s in (*self.running, sequence)]
        if lasting[-1] and sum(lasting) > self.capacity_bytes:
            return False
        counted = [s for s in self.running if self._pending(s) > 1 or self._stays(s)]
        needed = sum(self._bytes_to_come(s) for s in [*counted, sequence])
        arena, index = self.lanes.pool.arena, self.lanes.pool.index
        free = arena.num_bytes - arena.used_bytes
        return needed <= free or needed <= free + index.idle_bytes

    def _lasting_bytes(self, sequence: Sequence) -> int:
        """Return the most bytes that a sequence which may lose tokens comes to hold; 0 for all others."""
        eviction, request = sequence.eviction, sequence.request
        total = len(request.prompt_token_ids) + request.max_tokens
        if eviction is None or sequence.row is None or not eviction.occupancy.may_drop(total):
            return 0
        chunk = self.max_num_batched_tokens
        if self.is_lossy(sequence) and request.forked:
            return eviction.future_bytes(sequence.row, total, chunk)
        return eviction.occupancy.peak_bytes(total, chunk, 1 if request.forked else request.params.n)

    def _bytes_to_come(self, sequence: Sequence) -> int:
        assert sequence.row is not None
        total = self._lasting_bytes(sequence) or self._peak_bytes(len(sequence.token_ids) + 1)
        return max(0, total - self.lanes.sequence_bytes(sequence.row))

    def _adopt_prefix(self, sequence: Sequence) -> None:
        """Start the sequence from cached blocks; at least its last token is left to compute."""
        wanted = self.enable_prefix_caching and sequence.request.prompt_logprobs is None
        if not wanted:
            return
        index = self.lanes.pool.index
        limit = len(sequence.token_ids) - 1
        if sequence.eviction is not None:
            limit = min(limit, sequence.eviction.schedule.usable_prefix)
        match = index.match(sequence.token_ids, sequence.chain, limit)
        if match.num_blocks:
            assert sequence.row is not None
            self.lanes.adopt(sequence.row, match)

    def _count_prefix(self, sequence: Sequence, cached: int) -> None:
        sequence.num_published = cached // self.lanes.spec.block_size
        if sequence.num_preemptions == 0:
            self.prefix_queries += len(sequence.token_ids)
            self.prefix_hits += cached
            sequence.num_cached_tokens = cached

    # ---- after a step ---------------------------------------------------------------------------------------------

    def fork(self, request: Request) -> list[Sequence]:
        """Make the other sequences of a request whose prompt is computed; they share all its blocks."""
        leader = request.sequences[0]
        assert leader.row is not None
        children = []
        while not request.forked:
            child = request.add_sequence()
            child.row = self.lanes.fork(leader.row)
            child.status = Status.RUNNING
            child.num_cached_tokens = leader.num_cached_tokens
            child.num_published = leader.num_published
            child.chain.digests = list(leader.chain.digests)
            if leader.eviction is not None:
                seed = request.seed + (child.index if request.beams is None else 0)
                child.eviction = leader.eviction.fork(child.token_ids, seed)
            self.running.append(child)
            children.append(child)
        return children

    def reparent(self, child: Sequence, parent: Sequence) -> None:
        """Let the beam `child` go on from where `parent` stands, sharing its blocks; the child's own are released.

        Where one of the two has no blocks now, the child waits to be computed from its tokens.
        """
        if child is not parent:
            child.chain.digests = list(parent.chain.digests)
            if child.eviction is not None and parent.eviction is not None:
                before = child.eviction.evicted_tokens
                child.eviction = parent.eviction.fork(child.token_ids, parent.eviction.record.seed)
                child.eviction.evicted_tokens = before
            if child.row is not None:
                self._close(child)
            if parent.row is not None and child.status is Status.RUNNING:
                child.row = self.lanes.fork(parent.row)
                child.num_published = parent.num_published
                return
            if child.status is Status.RUNNING:
                self.running.remove(child)
        if child.row is None and child not in self.waiting:
            self._queue(child)

    def publish(self, work: list[Work]) -> None:
        """Enter the blocks that closed in this step into the prefix index."""
        if not self.enable_prefix_caching:
            return
        for item in work:
            sequence = item.sequence
            closed = (item.start + item.num_tokens) // self.lanes.spec.block_size
            if sequence.row is not None and closed > sequence.num_published:
                tokens, first = sequence.token_ids, sequence.num_published
                self.lanes.publish(sequence.row, sequence.chain, tokens, first, closed)
                sequence.num_published = closed

    @property
    def has_work(self) -> bool:
        """True while any sequence waits or runs."""
        return bool(self.waiting or self.running)
