"""Sampler: logits in, one token per sequence out; no sequence's token depends on the others."""

import numpy as np
import torch

from kvloom.engine.params import SamplingParams
from kvloom.engine.request import Logprob, Sequence
from kvloom.engine.runner import top_logprobs


class Sampler:
    """Applies bias and penalties, filters, draws. Random numbers come from (seed, sequence index, place) alone."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self.eos_token_ids = eos_token_ids

    @torch.inference_mode()
    def sample(
        self, logits: torch.Tensor, sequences: list[Sequence]
    ) -> tuple[list[int], list[dict[int, Logprob] | None]]:
        """Return the next token of each of N sequences from logits [N, V] float32, and its log-probabilities.

        Log-probabilities are those of the raw logits. Forced tokens are taken as given.
        """
        adjusted = [self._adjusted(row, sequence) for row, sequence in zip(logits, sequences, strict=True)]
        greedy = torch.argmax(logits, dim=-1).tolist()
        tokens = []
        for row, sequence in enumerate(sequences):
            forced = sequence.request.forced_token_ids
            if forced is not None:
                tokens.append(forced[sequence.num_output_tokens])
            elif sequence.request.params.greedy:
                changed = adjusted[row]
                tokens.append(greedy[row] if changed is None else int(torch.argmax(changed)))
            else:
                changed = adjusted[row]
                tokens.append(self._draw(logits[row] if changed is None else changed, sequence))
        return tokens, [
            None
            if sequence.request.params.logprobs is None
            else top_logprobs(logits[row : row + 1], [tokens[row]], sequence.request.params.logprobs)[0]
            for row, sequence in enumerate(sequences)
        ]

    def _adjusted(self, logits: torch.Tensor, sequence: Sequence) -> torch.Tensor | None:
        """Return a changed copy of logits [V], or None when nothing applies to this sequence."""
        params = sequence.request.params
        forbidden = self._forbidden(sequence)
        penalised = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        if not (params.logit_bias or forbidden or penalised):
            return None
        changed = logits.clone()
        if penalised:
            penalise(changed, sequence)
        for token, bias in params.logit_bias.items():
            changed[token] += bias
        if forbidden:
            changed[forbidden] = float("-inf")
        return changed

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
    bits = np.random.Philox(key=[seed % 2**64, index], counter=[place, 0, 0, 0])
    return float(np.random.Generator(bits).random())


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
