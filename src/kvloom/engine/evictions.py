"""Evictions: runs cache policies after each step of the engine."""

import numpy as np

from kvloom.attention.batch import AttentionBatch
from kvloom.engine.request import Request, Sequence
from kvloom.engine.runner import Runner
from kvloom.engine.scheduler import Scheduler
from kvloom.engine.work import Work
from kvloom.errors import DoesNotFitError, MethodError
from kvloom.models.model import StepWanted
from kvloom.policies.eviction import Eviction
from kvloom.policies.replay import ReplayPass, ReplayScores

REPLAY_PIECE = 512
"""Tokens of a replay that go through the model at once: bounds the queries that are held for scoring."""


class Evictions:
    """Runs the policies of sequences, and feeds the replays that some of them need for scores."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.evicted_tokens = 0

    def evict(self, work: list[Work]) -> list[Request]:
        """Run the policies that are due; the blocks of evicted tokens are free afterwards.

        Other sequences may be preempted. Returns the requests whose method failed, with their `error` set; nothing of
        them was evicted by it. Raises `DoesNotFitError` when blocks are short for ever.
        """
        failed: list[Request] = []
        for item in work:
            sequence = item.sequence
            if sequence.eviction is None or sequence.row is None or not sequence.eviction.due(sequence.row):
                continue
            before = sequence.eviction.evicted_tokens
            try:
                self._replay(sequence)
                while not sequence.eviction.apply(sequence.row):
                    self._make_room(sequence)
            except MethodError as error:
                request = sequence.request
                request.error = MethodError(f"request {request.request_id}: {error}")
                failed.append(request)
            self.evicted_tokens += sequence.eviction.evicted_tokens - before
        return failed

    def _make_room(self, sequence: Sequence) -> None:
        if not self.scheduler.make_room(sequence):
            assert sequence.eviction is not None
            raise DoesNotFitError(
                f"{sequence.request.request_id}: no blocks are left to go on with while evicting with "
                f"{sequence.eviction.policy.spec}. Raise --kv-cache-memory-bytes"
            )

    def _replay(self, sequence: Sequence) -> None:
        """Feed the context once more to a fork of the sequence, if its policy needs it; closes the fork."""
        eviction, row, lanes = sequence.eviction, sequence.row, self.runner.cache.lanes
        assert eviction is not None and row is not None
        scores = eviction.begin_replay(row)
        if scores is None:
            return
        for now in eviction.replay_passes():
            fork = lanes.fork(row)
            try:
                for start in range(0, len(now.token_ids), REPLAY_PIECE):
                    piece = now.token_ids[start : start + REPLAY_PIECE]
                    while not lanes.extend(fork, len(piece)):
                        self._make_room(sequence)
                    held = lanes.sequence_bytes(row) + lanes.sequence_bytes(fork, beside=row)
                    sequence.kv_peak_bytes = max(sequence.kv_peak_bytes, held)
                    self._feed(eviction, scores, fork, now, piece, sequence.length_class)
            finally:
                lanes.close(fork)
        eviction.record.replay_scores = scores.best

    def _feed(
        self,
        eviction: Eviction,
        scores: ReplayScores,
        fork: int,
        now: ReplayPass,
        piece: tuple[int, ...],
        length_class: int,
    ) -> None:
        """Process `piece`, whose slots exist, and pass its queries to `scores`."""
        cache, count = self.runner.cache, len(piece)
        seen = int(cache.lanes.seen[fork])
        batch = AttentionBatch(
            token_ids=np.array(piece, np.int32),
            positions=np.arange(seen - count, seen, dtype=np.int32),
            sequences=np.array([fork], np.int32),
            cu_seqlens_q=np.array([0, count], np.int32),
            length_class=np.array([length_class], np.int32),
        )
        wanted = StepWanted(
            logit_rows=np.array([count - 1], np.int32),
            logits=False,
            query_rows=np.arange(count, dtype=np.int32),
            input_norms=eviction.policy.needs.layer_inputs,
        )
        output = self.runner.model.step(batch, cache, wanted)
        assert output.queries is not None
        for layer in eviction.layers:
            norms = None if output.input_norms is None else output.input_norms[layer]
            scores.observe(layer, fork, now, output.queries[layer], norms)
