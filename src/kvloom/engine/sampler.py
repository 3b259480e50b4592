"""Sampler: logits in, one token per sequence out; no sequence's token depends on the others."""

import numpy as np
import torch
from numpy.random import Generator, Philox

from kvloom.engine.params import SamplingParams
from kvloom.engine.request import Logprob, Sequence
from kvloom.engine.runner import top_logprobs


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
    def sample(
        self, greedy: list[int], logits: torch.Tensor | None, sequences: list[Sequence]
    ) -> tuple[list[int], list[dict[int, Logprob] | None]]:
        """Return the next token of each of N sequences, and its log-probabilities.

        `greedy` [N] are the most likely tokens; logits [N, V] float32 may be None when nobody needs them.
        Log-probabilities are those of the raw logits. Forced tokens are taken as given.
        """
        tokens: list[int] = []
        found: list[dict[int, Logprob] | None] = []
        for row, sequence in enumerate(sequences):
            forced, params = sequence.request.forced_token_ids, sequence.request.params
            if forced is not None:
                tokens.append(forced[sequence.num_output_tokens])
            elif params.greedy and not self._changes(sequence):
                tokens.append(greedy[row])
            else:
                assert logits is not None
                tokens.append(self._choose(logits[row], sequence))
            if params.logprobs is None:
                found.append(None)
            else:
                assert logits is not None
                found.append(top_logprobs(logits[row : row + 1], [tokens[row]], params.logprobs)[0])
        return tokens, found

    def _choose(self, logits: torch.Tensor, sequence: Sequence) -> int:
        logits = self._adjusted(logits, sequence)
        return int(torch.argmax(logits)) if sequence.request.params.greedy else self._draw(logits, sequence)

    def _changes(self, sequence: Sequence) -> bool:
        """Return whether processors, penalties or forbidden tokens apply to the next token."""
        params = sequence.request.params
        penalised = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        early = sequence.num_output_tokens < params.min_tokens
        return bool(penalised or early or sequence.request.processors)

    def _adjusted(self, logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
        """Return logits [V] after forbidden tokens, processors and penalties; a copy where anything applies.

        The order is vLLM's: what is forbidden, then biases and the caller's processors, then penalties, so that a
        repetition penalty scales the biased logit.
        """
        if not self._changes(sequence):
            return logits
        changed = logits.clone()
        forbidden = self._forbidden(sequence)
        if forbidden:
            changed[forbidden] = float("-inf")
        self._process(changed, sequence)
        penalise(changed, sequence)
        if self.eos_token_ids and bool(torch.isneginf(changed).all()):
            changed[self.eos_token_ids[0]] = 0.0  # nothing is allowed: the sequence ends
        return changed

    @staticmethod
    def _process(logits: torch.Tensor, sequence: Sequence) -> None:
        """Let the request's processors change logits [V] in place."""
        request = sequence.request
        if request.processors and not sequence.processors:
            sequence.processors = [processor.start() for processor in request.processors]
        for processor in sequence.processors:
            processor(request.prompt_token_ids, sequence.output_token_ids, logits)

    def _forbidden(self, sequence: Sequence) -> list[int]:
        """Return the tokens that would end the sequence before `min_tokens`."""
        params = sequence.request.params
        if sequence.num_output_tokens >= params.min_tokens:
            return []
        ends = list(params.stop_token_ids)
        return ends if params.ignore_eos else [*ends, *self.eos_token_ids]

    def _draw(self, logits: torch.Tensor, sequence: Sequence) -> int:
        params = sequence.request.params
        uniform = uniform_at(sequence.request.seed, sequence.index, sequence.num_output_tokens)
        return draw(logits, params, uniform)


def penalise(logits: torch.Tensor, sequence: Sequence) -> None:
    """Apply repetition (prompt and output), presence and frequency (output) penalties to logits [V] in place."""
    params = sequence.request.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(sequence.token_ids)), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    output = sequence.output_token_ids
    if output and (params.presence_penalty or params.frequency_penalty):
        tokens, counts = np.unique(output, return_counts=True)
        ids = torch.from_numpy(tokens).to(logits.device)
        times = torch.from_numpy(counts).to(logits.device, torch.float32)
        logits[ids] -= params.frequency_penalty * times + params.presence_penalty


def uniform_at(seed: int, index: int, place: int) -> float:
    """Return the uniform number in [0, 1) that belongs to output token `place` of sequence `index`."""
    key = np.array([seed % 2**64, index], np.uint64)  # a list would go through float64 where a seed exceeds int64
    bits = Philox(key=key, counter=[place, 0, 0, 0])
    return float(Generator(bits).random())


def draw(logits: torch.Tensor, params: SamplingParams, uniform: float) -> int:
    """Return the token at `uniform` of the cumulative distribution, after temperature, top-k, top-p and min-p.

    The order of the filters, each on what the one before it left, is that of vLLM: temperature, min-p, top-k, top-p.
    """
    scaled = logits.double() / params.temperature
    order: torch.Tensor | None = None
    if 0 < params.top_k < len(scaled):
        scaled, order = torch.topk(scaled, params.top_k)
    elif params.top_p < 1 or params.min_p > 0:
        scaled, order = torch.sort(scaled, descending=True, stable=True)
    weights = torch.exp(scaled - scaled.max())
    if params.min_p > 0:
        weights = torch.where(weights >= params.min_p, weights, 0.0)
    cumulative = torch.cumsum(weights, dim=0)
    if params.top_p < 1:
        # keep the smallest set that reaches top_p: a token stays while the mass before it is below top_p
        before = cumulative - weights
        weights = torch.where(before < params.top_p * cumulative[-1], weights, 0.0)
        cumulative = torch.cumsum(weights, dim=0)
    place = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    place = min(place, int(torch.nonzero(weights)[-1]))
    return place if order is None else int(order[place])
