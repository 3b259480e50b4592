"""Sampler: logits in, one token per sequence out; no sequence's token depends on the others."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvloom.engine.distribution import Distribution
from kvloom.engine.occurrences import Occurrences
from kvloom.engine.race import race_seed
from kvloom.engine.request import Logprob, Sequence
from kvloom.engine.runner import top_logprobs
from kvloom.errors import RequestFailedError


@dataclass
class Draw:
    """The next token of a sequence, from `row` of the model's output; None for beams, and where there is an `error`.

    `finite` is False when the logits are the cause of it. `end` becomes (finish reason, stop reason) when the token
    ends the sequence.
    """

    sequence: Sequence
    row: int
    token: int | None = None
    logprob: dict[int, Logprob] | None = None
    error: RequestFailedError | None = None
    finite: bool = True
    end: tuple[str, int | str | None] | None = None


class Sampler:
    """Applies processors and penalties, filters, draws. Random numbers: of (seed, sequence index, place) alone."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self.eos_token_ids = eos_token_ids

    def needs_logits(self, sequence: Sequence) -> bool:
        """Return whether more than the most likely token must be known to choose the next one."""
        request = sequence.request
        if request.params.logprobs is not None or request.beams is not None:
            return True
        if request.forced_token_ids is not None:
            return False
        return not request.params.greedy or self._changes(sequence)

    @torch.inference_mode()
    def draw(
        self, greedy: list[int], logits: torch.Tensor | None, rows: list[tuple[Sequence, int]]
    ) -> list[Draw]:
        """Return the next token of each of N sequences, and its log-probabilities; `rows` become those of the draws.

        `greedy` [N] are the most likely tokens, -1 where the largest logit is not finite; logits [N, V] float32 may be
        None when no sequence needs them. Log-probabilities are those of the raw logits. Forced tokens are taken as
        given. A sequence whose token cannot be chosen gets an error; the others get their tokens.
        """
        values = None if logits is None else logits.detach().float().cpu().numpy()
        draws = []
        for number, (sequence, row) in enumerate(rows):
            draw = Draw(sequence, row)
            own = None if values is None else values[number]
            if greedy[number] < 0 or (own is not None and not np.isfinite(own.max())):
                draw.error, draw.finite = RequestFailedError("the largest logit is not a finite number"), False
            elif sequence.request.beams is None:
                try:
                    draw.token = self._token(greedy[number], own, sequence)
                except RequestFailedError as error:
                    draw.error = error
                else:
                    if sequence.request.params.logprobs is not None:
                        assert own is not None
                        draw.logprob = top_logprobs(own, draw.token, sequence.request.params.logprobs)
            draws.append(draw)
        return draws

    def _token(self, greedy: int, logits: NDArray[np.float32] | None, sequence: Sequence) -> int:
        forced = sequence.request.forced_token_ids
        if forced is not None:
            return forced[sequence.num_output_tokens]
        if sequence.request.params.greedy and not self._changes(sequence):
            return greedy
        assert logits is not None
        return self._choose(logits, sequence)

    def _choose(self, logits: NDArray[np.float32], sequence: Sequence) -> int:
        logits = self._adjusted(logits, sequence)
        params = sequence.request.params
        if params.greedy:
            return int(logits.argmax())
        seed = race_seed(sequence.request.seed, sequence.index, sequence.num_output_tokens)
        return Distribution.of(logits, params).draw(seed)

    def _changes(self, sequence: Sequence) -> bool:
        """Return whether processors, penalties or forbidden tokens apply to the next token."""
        params = sequence.request.params
        penalised = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        early = sequence.num_output_tokens < params.min_tokens
        return bool(penalised or early or sequence.request.processors)

    def _adjusted(self, logits: NDArray[np.float32], sequence: Sequence) -> NDArray[np.float32]:
        """Return logits [V] after forbidden tokens, processors and penalties; a copy where anything applies.

        The order is vLLM's: what is forbidden, then biases and the caller's processors, then penalties, so that a
        repetition penalty scales the biased logit.
        """
        if not self._changes(sequence):
            return logits
        changed = logits.copy()
        forbidden = self._forbidden(sequence)
        if forbidden:
            changed[forbidden] = -np.inf
        self._process(torch.from_numpy(changed), sequence)
        penalise(changed, sequence)
        if self.eos_token_ids and changed.max() == -np.inf:
            changed[self.eos_token_ids[0]] = 0.0  # nothing is allowed: the sequence ends
        return changed

    @staticmethod
    def _process(logits: torch.Tensor, sequence: Sequence) -> None:
        """Let the request's processors change logits [V] in place."""
        request = sequence.request
        try:
            if request.processors and not sequence.processors:
                sequence.processors = [processor.start() for processor in request.processors]
            for processor in sequence.processors:
                processor(request.prompt_token_ids, sequence.output_token_ids, logits)
        except RequestFailedError:
            raise
        except Exception as error:  # the caller's code
            raise RequestFailedError(f"a logits processor raised {type(error).__name__}: {error}") from error
        if torch.isnan(logits).any():
            raise RequestFailedError("a logits processor left a logit that is not a number")

    def _forbidden(self, sequence: Sequence) -> list[int]:
        """Return the tokens that would end the sequence before `min_tokens`."""
        params = sequence.request.params
        if sequence.num_output_tokens >= params.min_tokens:
            return []
        ends = list(params.stop_token_ids)
        return ends if params.ignore_eos else [*ends, *self.eos_token_ids]


def penalise(logits: NDArray[np.float32], sequence: Sequence) -> None:
    """Apply repetition (prompt and output), presence and frequency (output) penalties to logits [V] in place.

    Touches only the tokens that the sequence has, which it keeps count of.
    """
    params = sequence.request.params
    repeats, counts = params.repetition_penalty != 1, bool(params.presence_penalty or params.frequency_penalty)
    if not repeats and not counts:
        return
    if sequence.occurrences is None:
        sequence.occurrences = Occurrences(len(sequence.request.prompt_token_ids))
    found = sequence.occurrences
    found.update(sequence.token_ids)
    values = logits[found.tokens]
    if repeats:
        with np.errstate(over="ignore"):  # of logits that represent minus infinity
            values = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if counts:
        times = found.counts
        values -= np.where(times > 0, params.frequency_penalty * times + params.presence_penalty, np.float32(0))
    logits[found.tokens] = values
