"""BeamSteps: advances the beams among a step's sequences."""

from collections.abc import Callable
from dataclasses import replace

import torch

from kvloom.engine.beam import BeamSearch, BeamSearchParams, Continuation
from kvloom.engine.params import SamplingParams
from kvloom.engine.queues import Queues
from kvloom.engine.request import Request, Sequence, Status


class BeamSteps:
    """Feeds logits to beam searches and moves beams to the lanes of their parents."""

    def __init__(
        self, queues: Queues, eos_token_ids: tuple[int, ...], start_text: Callable[[Sequence], None]
    ) -> None:
        """`start_text` gives a sequence its detokenizer, if there is one."""
        self.queues = queues
        self.eos_token_ids = eos_token_ids
        self.start_text = start_text

    @staticmethod
    def sampling_params(params: BeamSearchParams) -> SamplingParams:
        """Return the options with which a beam search is admitted: as many greedy sequences as it has beams."""
        return SamplingParams(
            n=params.beam_width,
            temperature=0,
            max_tokens=params.max_tokens,
            ignore_eos=params.ignore_eos,
            stop_token_ids=params.stop_token_ids,
            logprobs=params.logprobs,
            skip_special_tokens=params.skip_special_tokens,
        )

    def start(self, request: Request, params: BeamSearchParams) -> None:
        """Make a new request a beam search."""
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else self.eos_token_ids)}
        request.beams = BeamSearch(params, request.max_tokens, frozenset(ends))
        request.sequences[0].detokenizer = None

    def advance_all(self, sequences: list[Sequence], logits: torch.Tensor) -> int:
        """Take logits [N, V] of beams and advance each search whose beams are all there; returns tokens generated."""
        width = logits.shape[1]
        scores = torch.log_softmax(logits.float(), dim=-1)
        for sequence, row in zip(sequences, scores, strict=True):
            search = sequence.request.beams
            assert search is not None
            best = torch.topk(row, min(search.num_offers, width))
            search.offer(sequence, list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
        generated = 0
        for request in dict.fromkeys(sequence.request for sequence in sequences):
            assert request.beams is not None
            if request.forked and request.beams.is_ready(request):
                generated += self._advance(request, request.beams)
        return generated

    def _advance(self, request: Request, search: BeamSearch) -> int:
        following = search.advance(request)
        if not following:
            return self._end(request, search)
        chosen = self._seats(request, following)
        grown = {seat: [*found.parent.token_ids, found.token] for seat, found in chosen.items()}
        for seat, found in chosen.items():
            self.queues.reparent(seat, found.parent)
        for seat, found in chosen.items():
            seat.token_ids = grown[seat]
            if seat.eviction is not None:
                seat.eviction.record.token_ids = seat.token_ids
            seat.cumulative_logprob = found.logprob
        search.take_over(chosen)
        return len(chosen)

    @staticmethod
    def _seats(request: Request, following: list[Continuation]) -> dict[Sequence, Continuation]:
        """Return the next beam of each sequence: a parent becomes one of its own children, others any that is left."""
        chosen: dict[Sequence, Continuation] = {}
        others: list[Continuation] = []
        for found in following:
            if found.parent in chosen:
                others.append(found)
            else:
                chosen[found.parent] = found
        free = [sequence for sequence in request.sequences if sequence not in chosen]
        return {**chosen, **dict(zip(free, others, strict=False))}

    def _end(self, request: Request, search: BeamSearch) -> int:
        """Free all beams and put the best finished sequences in their place, best first."""
        beams, request.sequences = request.sequences, []
        for beam in beams:
            self.queues.finish(beam, "stop")
        best = search.finished[: search.params.n]
        request.params = replace(request.params, n=len(best))
        for hypothesis in best:
            sequence = request.add_sequence()
            sequence.token_ids += hypothesis.token_ids
            sequence.cumulative_logprob = hypothesis.logprob
            sequence.logprobs = list(hypothesis.logprobs)
            if hypothesis.token_ids[-1] in search.params.stop_token_ids:
                sequence.stop_reason = hypothesis.token_ids[-1]
            sequence.status, sequence.finish_reason = Status.FINISHED, hypothesis.finish_reason
            sequence.num_cached_tokens = beams[0].num_cached_tokens
            sequence.eviction = beams[sequence.index].eviction
            sequence.kv_peak_bytes = beams[sequence.index].kv_peak_bytes
            sequence.num_preemptions = beams[sequence.index].num_preemptions
            self._spell(sequence, hypothesis.token_ids, search.ends)
        return sum(len(hypothesis.token_ids) for hypothesis in best)

    def _spell(self, sequence: Sequence, tokens: tuple[int, ...], ends: frozenset[int]) -> None:
        self.start_text(sequence)
        if sequence.detokenizer is not None:
            for token in tokens[:-1] if tokens[-1] in ends else tokens:
                sequence.detokenizer.append(token)
            sequence.detokenizer.finish()
