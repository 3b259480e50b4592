"""Runner: turns scheduled work into one forward pass and returns logits, a tile of rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvloom.attention.batch import AttentionBatch
from kvloom.cache.kvcache import KVCache
from kvloom.engine.distribution import best
from kvloom.engine.request import Logprob
from kvloom.engine.work import Work
from kvloom.models.model import Model, StepOutput, StepWanted

LOGITS_TILE_BYTES = 64 << 20
"""Float32 logits held at once for prompt log-probabilities (64 rows of a 262k vocabulary)."""


@dataclass(frozen=True)
class Forward:
    """The model's output for some work, and for each observed item the number of its newest tokens with queries."""

    output: StepOutput
    watched: list[tuple[Work, int]]


class Runner:
    """The model and its cache; owns no request state."""

    def __init__(self, model: Model, cache: KVCache) -> None:
        self.model = model
        self.cache = cache

    def forward(self, work: list[Work], *, logits: bool) -> Forward:
        """Process the tokens of `work`; one row of output for every item that samples, in order.

        Prompt log-probabilities are appended. `logits` says that the best tokens alone would not do.
        """
        starts = np.cumsum([0, *(w.num_tokens for w in work)])
        weighs = False
        watched: list[tuple[Work, int]] = []
        rows: list[NDArray[np.int32]] = []
        for item, start in zip(work, starts.tolist(), strict=False):
            if item.sequence.eviction is not None:
                first = item.sequence.eviction.first_watched(item.start, item.num_tokens)
                if first is not None:
                    watched.append((item, item.num_tokens - first))
                    needs = item.sequence.eviction.policy.needs
                    weighs |= needs.key_mass or needs.queries > 0
                    rows.append(np.arange(start + first, start + item.num_tokens, dtype=np.int32))
        output = self.model.step(
            self._batch(work, starts.astype(np.int32)),
            self.cache,
            StepWanted(
                logit_rows=np.array([e - 1 for e, w in zip(starts[1:], work, strict=True) if w.samples], np.int32),
                logits=logits,
                hidden=any(self._wants_prompt_logprobs(w) for w in work),
                query_rows=np.concatenate(rows) if rows else None,
                lse=weighs,
            ),
        )
        self._add_prompt_logprobs(work, output.hidden)
        return Forward(output, watched)

    def _batch(self, work: list[Work], starts: NDArray[np.int32]) -> AttentionBatch:
        ids: list[int] = []
        for item in work:
            ids += item.sequence.token_ids[item.start : item.start + item.num_tokens]
        return AttentionBatch(
            token_ids=np.array(ids, np.int32),
            positions=np.concatenate([np.arange(w.start, w.start + w.num_tokens, dtype=np.int32) for w in work]),
            sequences=np.array([w.sequence.row for w in work], np.int32),
            cu_seqlens_q=starts,
            length_class=np.array([w.sequence.length_class for w in work], np.int32),
        )

    def observe(self, work: list[Work], forward: Forward) -> None:
        """Pass the queries [L, n, H, D] of each sequence in committed `work` to its policy."""
        first, output, committed = 0, forward.output, set(map(id, work))
        for item, count in forward.watched:
            if id(item) not in committed:
                first += count
                continue
            assert output.queries is not None and item.sequence.eviction is not None and item.sequence.row is not None
            rows = slice(first, first + count)
            lse = None if output.lse is None else output.lse[:, rows]
            item.sequence.eviction.observe(item.sequence.row, output.queries[:, rows], lse)
            first += count

    @staticmethod
    def _wants_prompt_logprobs(item: Work) -> bool:
        found = item.sequence.request.prompt_logprobs
        return found is not None and len(found) < len(item.sequence.request.prompt_token_ids)

    def _add_prompt_logprobs(self, work: list[Work], hidden: torch.Tensor | None) -> None:
        """Append to `prompt_logprobs` of requests that ask for them, without the whole logits matrix in memory."""
        if hidden is None:
            return
        start = 0
        for item in work:
            rows = hidden[start : start + item.num_tokens]
            start += item.num_tokens
            request = item.sequence.request
            wanted = request.prompt_logprobs
            if wanted is None or not self._wants_prompt_logprobs(item):
                continue
            targets = request.prompt_token_ids[item.start + 1 : item.start + item.num_tokens + 1]
            skip = len(wanted) - 1 - item.start  # rows that an earlier run of a preempted request has done
            for tile, ids in self._tiles(rows[max(skip, 0) : len(targets)], targets[max(skip, 0) :]):
                values = tile.float().cpu().numpy()
                count = request.params.prompt_logprobs or 0
                wanted.extend(top_logprobs(row, token, count) for row, token in zip(values, ids, strict=True))

    def _tiles(self, hidden: torch.Tensor, targets: list[int]) -> Iterator[tuple[torch.Tensor, list[int]]]:
        step = max(1, LOGITS_TILE_BYTES // (4 * self.model.config.vocab_size))
        for first in range(0, len(targets), step):
            yield self.model.logits(hidden[first : first + step]), targets[first : first + step]


def top_logprobs(logits: NDArray[np.float32], chosen: int, count: int) -> dict[int, Logprob]:
    """Return the `count` best tokens of logits [V] and the chosen one, with log-probability and rank."""
    top = logits.max()
    total = top + np.log(np.exp(logits - top).sum())
    tokens = best(logits, count)
    scores = (logits[tokens] - total).tolist()
    entry = {
        token: Logprob(score, place + 1)
        for place, (token, score) in enumerate(zip(tokens.tolist(), scores, strict=True))
    }
    if chosen not in entry:
        own = logits[chosen]
        entry[chosen] = Logprob(float(own - total), int(np.count_nonzero(logits > own)) + 1)
    return entry
