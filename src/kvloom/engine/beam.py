"""Beam search: the most likely sequences as a whole, not token by token. Torch-free.

All beams of a request are at the same length. Each gets a step of the model and offers its most likely next tokens;
when all have offered, the best continuations over all beams become the next beams, which share the blocks of their
parents. Selection, length penalty and end are those of transformers' `generate` with `num_beams`.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from kvloom.engine.request import Request, Sequence
from kvloom.errors import InvalidInputError


@dataclass(frozen=True)
class BeamSearchParams:
    """Options of a beam search; checked on construction (`InvalidInputError`).

    `beam_width` sequences are followed and `n` of them returned, best first (None: all). Finished ones are ranked by
    the sum of their log-probabilities over length ** `length_penalty`. The search ends when `beam_width` have finished
    and no beam can do better; with `early_stopping` as soon as that many have finished.
    """

    beam_width: int = 4
    max_tokens: int = 16
    n: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name, least, most in (("beam_width", 2, 64), ("max_tokens", 1, 1 << 31), ("n", 1, self.beam_width)):
            value = getattr(self, name)
            if value is None and name == "n":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise InvalidInputError(f"{name} is {value!r}; it must be an integer from {least} to {most}")
        penalty = self.length_penalty
        if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not abs(penalty) <= 10:
            raise InvalidInputError(f"length_penalty is {penalty!r}; it must be a number from -10 to 10")


@dataclass(frozen=True)
class Hypothesis:
    """A finished beam: its output tokens, the sum of their log-probabilities, its rank's score, and why it ended."""

    token_ids: tuple[int, ...]
    logprob: float
    score: float
    finish_reason: str


@dataclass(frozen=True)
class Continuation:
    """One of the next beams: `parent` and one more token; `logprob` is the sum over all its output tokens."""

    parent: Sequence
    token: int
    logprob: float


@dataclass
class BeamSearch:
    """The state of one request's search; `ends` are the tokens that finish a beam."""

    params: BeamSearchParams
    max_tokens: int
    ends: frozenset[int]
    logprob: dict[Sequence, float] = field(default_factory=dict)
    finished: list[Hypothesis] = field(default_factory=list)
    _offers: dict[Sequence, list[tuple[int, float]]] = field(default_factory=dict)

    @property
    def num_candidates(self) -> int:
        """Tokens that each beam offers: enough that `beam_width` go on however many end."""
        return max(2, 1 + len(self.ends)) * self.params.beam_width

    def offer(self, sequence: Sequence, candidates: Seq[tuple[int, float]]) -> None:
        """Take the best next tokens of a beam with their log-probabilities, best first."""
        self._offers[sequence] = list(candidates)

    def is_ready(self, request: Request) -> bool:
        """Return whether every beam of `request` has offered."""
        return all(sequence in self._offers for sequence in request.sequences)

    def advance(self, request: Request) -> list[Continuation]:
        """Choose among all offers; returns the next beams, best first, or nothing when the search is over."""
        beams = request.sequences
        started = bool(self.logprob)
        options = [
            Continuation(beam, token, self.logprob.get(beam, 0.0) + logprob)
            for beam in (beams if started else beams[:1])  # before the first token all beams are one
            for token, logprob in self._offers[beam]
        ]
        self._offers.clear()
        best = sorted(options, key=lambda c: -c.logprob)[: self.num_candidates]
        length = beams[0].num_output_tokens + 1
        going_on = [c for c in best if not self._ends(c, length)]
        self._finish([c for c in best[: self.params.beam_width] if self._ends(c, length)], length)
        if self._is_over(going_on, length):
            return []
        return going_on[: self.params.beam_width]

    def _ends(self, option: Continuation, length: int) -> bool:
        return option.token in self.ends or length >= self.max_tokens

    def _finish(self, options: list[Continuation], length: int) -> None:
        for option in options:
            self.finished.append(
                Hypothesis(
                    (*option.parent.output_token_ids, option.token),
                    option.logprob,
                    option.logprob / length**self.params.length_penalty,
                    "stop" if option.token in self.ends else "length",
                )
            )
        self.finished = sorted(self.finished, key=lambda h: -h.score)[: self.params.beam_width]

    def _is_over(self, going_on: list[Continuation], length: int) -> bool:
        """Return whether no beam goes on, or none could still rank, as if it ended at the present length."""
        if not going_on:
            return True
        if len(self.finished) < self.params.beam_width:
            return False
        if self.params.early_stopping:
            return True
        reachable: float = going_on[0].logprob / length**self.params.length_penalty
        return reachable <= self.finished[-1].score
