"""Beam search: the most likely sequences as a whole, not token by token. Torch-free.

All beams of a request are at the same length. Each gets a step of the model and offers its most likely next tokens;
when all have offered, the best continuations over all beams become the next beams, which share the blocks of their
parents. Selection, length penalty and end are those of transformers' `generate` with `num_beams`.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from kvloom.engine.params import MAX_LOGPROBS
from kvloom.engine.request import Logprob, Request, Sequence
from kvloom.errors import InvalidInputError


@dataclass(frozen=True)
class BeamSearchParams:
    """Options of a beam search; checked on construction (`InvalidInputError`).

    `beam_width` sequences are followed and `n` of them returned, best first (None: all). Finished ones are ranked by
    the sum of their log-probabilities over length ** `length_penalty`. The search ends when `beam_width` have finished
    and no beam can do better; with `early_stopping` as soon as that many have finished. `stop_token_ids` finish a beam
    as the model's own end does, and are kept in its tokens. `logprobs=k` returns the k best and the chosen token's at
    each place. Stop strings are refused.
    """

    beam_width: int = 4
    max_tokens: int = 16
    n: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.stop:
            raise InvalidInputError(
                "stop strings are not looked for in a beam search; give stop_token_ids, or cut the texts afterwards"
            )
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in self.stop_token_ids):
            raise InvalidInputError(f"stop_token_ids must be token ids (integers from 0); got {self.stop_token_ids!r}")
        for name, least, most in (
            ("beam_width", 2, 64),
            ("max_tokens", 1, 1 << 31),
            ("n", 1, self.beam_width),
            ("logprobs", 0, MAX_LOGPROBS),
        ):
            value = getattr(self, name)
            if value is None and name in ("n", "logprobs"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise InvalidInputError(f"{name} is {value!r}; it must be an integer from {least} to {most}")
        penalty = self.length_penalty
        if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not abs(penalty) <= 10:
            raise InvalidInputError(f"length_penalty is {penalty!r}; it must be a number from -10 to 10")


Path = tuple[dict[int, Logprob], ...]
"""Log-probabilities of every place of a beam."""


@dataclass(frozen=True)
class Hypothesis:
    """A finished beam: its output tokens, the sum of their log-probabilities, its rank's score, and why it ended.

    `logprobs` are those of each place, if they were asked for.
    """

    token_ids: tuple[int, ...]
    logprob: float
    score: float
    finish_reason: str
    logprobs: Path = ()


@dataclass(frozen=True)
class Continuation:
    """One of the next beams: `parent` and one more token, the `rank`-th of its offers (from 1).

    `logprob` is the sum over all its output tokens.
    """

    parent: Sequence
    token: int
    logprob: float
    rank: int


@dataclass
class BeamSearch:
    """The state of one request's search; `ends` are the tokens that finish a beam."""

    params: BeamSearchParams
    max_tokens: int
    ends: frozenset[int]
    logprob: dict[Sequence, float] = field(default_factory=dict)
    finished: list[Hypothesis] = field(default_factory=list)
    paths: dict[Sequence, Path] = field(default_factory=dict)
    _offers: dict[Sequence, list[tuple[int, float]]] = field(default_factory=dict)

    @property
    def num_candidates(self) -> int:
        """Number of candidates: enough that `beam_width` continue however many end."""
        return max(2, 1 + len(self.ends)) * self.params.beam_width

    @property
    def num_offers(self) -> int:
        """Tokens that each beam offers: those, and as many as `logprobs` asks for."""
        return max(self.num_candidates, self.params.logprobs or 0)

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
            Continuation(beam, token, self.logprob.get(beam, 0.0) + logprob, rank)
            for beam in (beams if started else beams[:1])  # before the first token all beams are one
            for rank, (token, logprob) in enumerate(self._offers[beam], start=1)
        ]
        best = sorted(options, key=lambda c: -c.logprob)[: self.num_candidates]
        length = beams[0].num_output_tokens + 1
        going_on = [c for c in best if not self._ends(c, length)]
        self._finish([c for c in best[: self.params.beam_width] if self._ends(c, length)], length)
        if self._is_over(going_on, length):
            return []
        return going_on[: self.params.beam_width]

    def take_over(self, chosen: Mapping[Sequence, Continuation]) -> None:
        """Record which sequence becomes which of the next beams; mutates the search."""
        paths = {seat: self._path(found) for seat, found in chosen.items()}
        self.logprob = {seat: found.logprob for seat, found in chosen.items()}
        self.paths = paths
        self._offers.clear()

    def _path(self, found: Continuation) -> Path:
        """Return the log-probabilities up to and with `found`; () unless they were asked for."""
        count = self.params.logprobs
        if count is None:
            return ()
        offers = self._offers[found.parent]
        entry = {token: Logprob(logprob, place) for place, (token, logprob) in enumerate(offers[:count], start=1)}
        entry.setdefault(found.token, Logprob(offers[found.rank - 1][1], found.rank))
        return (*self.paths.get(found.parent, ()), entry)

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
                    self._path(option),
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
