"""Answers: appends chosen tokens to their sequences, and ends sequences."""

import torch

from kvloom.cache.kvcache import KVCache
from kvloom.engine.detokenizer import IncrementalDetokenizer
from kvloom.engine.request import Request, Sequence
from kvloom.engine.sampler import Draw
from kvloom.engine.scheduler import Scheduler
from kvloom.engine.work import Work
from kvloom.errors import RequestFailedError
from kvloom.models.tokenizer import Tokenizer


class Answers:
    """Commits the tokens of a step and ends finished sequences; only this class and beam search do either."""

    def __init__(
        self, scheduler: Scheduler, cache: KVCache, tokenizer: Tokenizer | None, eos_token_ids: tuple[int, ...]
    ) -> None:
        self.scheduler = scheduler
        self.cache = cache
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.num_generated_tokens = 0

    def start_text(self, sequence: Sequence) -> None:
        """Create the detokenizer of a sequence, if its text is wanted."""
        params = sequence.request.params
        if self.tokenizer is not None and params.detokenize:
            sequence.detokenizer = IncrementalDetokenizer(
                self.tokenizer,
                sequence.request.prompt_token_ids,
                stop=params.stop,
                skip_special_tokens=params.skip_special_tokens,
                include_stop_str_in_output=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
            )

    def commit(self, work: list[Work], draws: list[Draw]) -> list[Work]:
        """Append the drawn tokens; returns the committed work.

        Where no token could be drawn, the step's tokens are removed from the lanes and the request's blocks from the
        prefix index, so that no policy and no other request gets them. The request ends in `settle`.
        """
        failed: set[Request] = set()
        for draw in draws:
            if draw.error is not None:
                request = draw.sequence.request
                request.error = request.error or self._located(draw)
                failed.add(request)
        for item in work:
            if item.sequence.request in failed and item.sequence.row is not None:
                self.cache.lanes.truncate(item.sequence.row, item.num_tokens)
                self.scheduler.prefixes.drop(item.sequence)
        self.append(draws)
        return [item for item in work if item.sequence.request not in failed]

    def append(self, draws: list[Draw]) -> None:
        """Add each token to its sequence, and record whether that ends it."""
        for draw in draws:
            sequence, token = draw.sequence, draw.token
            if token is None:
                continue
            sequence.token_ids.append(token)
            self.num_generated_tokens += 1
            if draw.logprob is not None:
                sequence.logprobs.append(draw.logprob)
                sequence.cumulative_logprob += draw.logprob[token].logprob
            draw.end = self._ending(sequence, token)
            if draw.end is not None and sequence.detokenizer is not None:
                sequence.detokenizer.finish()

    def settle(self, draws: list[Draw], failed: list[Request]) -> None:
        """End the sequences whose last token this was, and all sequences of failed requests; frees their blocks.

        `failed` are the requests that failed while evicting.
        """
        for draw in draws:
            if draw.end is not None:
                self.scheduler.queues.finish(draw.sequence, *draw.end)
        for request in dict.fromkeys([*(draw.sequence.request for draw in draws), *failed]):
            if request.error is not None:
                for sequence in request.sequences:
                    if not sequence.finished:
                        self.scheduler.queues.finish(sequence, "error")

    def _ending(self, sequence: Sequence, token: int) -> tuple[str, int | str | None] | None:
        """Return (finish reason, stop reason) when `token` ends the sequence."""
        params, request = sequence.request.params, sequence.request
        count = sequence.num_output_tokens
        stops = request.forced_token_ids is None and count > params.min_tokens - 1
        ends = stops and (token in params.stop_token_ids or (not params.ignore_eos and token in self.eos_token_ids))
        if sequence.detokenizer is not None and (not ends or params.include_stop_str_in_output):
            sequence.detokenizer.append(token)
            if sequence.detokenizer.stop_hit is not None:
                return "stop", sequence.detokenizer.stop_hit
        if ends:
            return "stop", token if token in params.stop_token_ids else None
        return ("length", None) if count >= request.max_tokens else None

    def _located(self, draw: Draw) -> RequestFailedError:
        """Return the error of a draw, with the layer in which numbers stopped being finite where that is the cause."""
        assert draw.error is not None
        sequence = draw.sequence
        message = f"request {sequence.request.request_id}: {draw.error}"
        if draw.finite or sequence.row is None:
            return RequestFailedError(message)
        for layer in range(len(self.cache.layers)):
            k, v, _ = self.cache.read_layer(layer, sequence.row)
            if not (torch.isfinite(k).all() and torch.isfinite(v).all()):
                return RequestFailedError(f"{message}. The keys or values of layer {layer} are the first that are not")
        return RequestFailedError(f"{message}. All keys and values are: it is the end of the last layer or the head")
