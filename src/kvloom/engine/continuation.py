"""Continuation: the next tokens of sequences, and the sequences that a request branches into."""

from collections.abc import Callable

import torch

from kvloom.engine.answers import Answers
from kvloom.engine.beamsteps import BeamSteps
from kvloom.engine.queues import Queues
from kvloom.engine.request import Sequence
from kvloom.engine.runner import Forward
from kvloom.engine.sampler import Draw, Sampler
from kvloom.engine.work import Work

LogitsObserver = Callable[[list[Sequence], torch.Tensor], None]
"""Called before sampling with N sequences and their logits [N, V] float32, which it must not change."""


class Continuation:
    """Draws tokens by `sampler`, shows their logits to `observer`, and forks requests whose prompt is done."""

    def __init__(self, sampler: Sampler, beams: BeamSteps, answers: Answers, queues: Queues) -> None:
        self.sampler = sampler
        self.beams = beams
        self.answers = answers
        self.queues = queues
        self.observer: LogitsObserver | None = None

    def needs_logits(self, work: list[Work]) -> bool:
        """Return whether the tokens of `work` are chosen from logits, rather than by the model's own greedy choice."""
        if self.observer is not None:
            return True
        return any(item.samples and self.sampler.needs_logits(item.sequence) for item in work)

    def draw(self, work: list[Work], forward: Forward) -> list[Draw]:
        """Return the next token of each sequence of `work` that samples."""
        return self._draw([(w.sequence, row) for row, w in enumerate(w for w in work if w.samples)], forward)

    def branch(self, draws: list[Draw], forward: Forward) -> list[Draw]:
        """Fork requests whose prompt is done and advance beams; returns the draws of the new sequences.

        This comes after evictions, so that a prompt is evicted once for all its sequences. A beam that was preempted in
        this step offers its tokens when it is computed again.
        """
        there = [d for d in draws if d.error is None and d.sequence.request.error is None]
        there = [d for d in there if d.sequence.request.beams is None or d.sequence.row is not None]
        children: list[tuple[Sequence, int]] = []
        for draw in there:
            while not draw.sequence.request.forked:
                child = self.queues.fork(draw.sequence.request)
                self.answers.start_text(child)
                children.append((child, draw.row))
        more = self._draw(children, forward)
        self.answers.commit([], more)
        beams = [draw for draw in there + more if draw.error is None and draw.sequence.request.beams is not None]
        if beams:
            assert forward.output.logits is not None
            rows = forward.output.logits[[draw.row for draw in beams]]
            self.answers.num_generated_tokens += self.beams.advance_all([draw.sequence for draw in beams], rows)
        return more

    def _draw(self, rows: list[tuple[Sequence, int]], forward: Forward) -> list[Draw]:
        """Return the next token of each sequence, by the given row of what the model returned."""
        if not rows:
            return []
        sequences, numbers = [sequence for sequence, _ in rows], [row for _, row in rows]
        logits = forward.output.logits
        if logits is not None and numbers != list(range(len(logits))):
            logits = logits[numbers]
        if self.observer is not None:
            assert logits is not None
            self.observer(sequences, logits)
        return self.sampler.draw([forward.output.greedy[row] for row in numbers], logits, rows)
