"""Runner: turns scheduled work into one forward pass and hands out logits, a tile of rows at a time."""

from collections.abc import Iterator

import numpy as np
import torch

from kvloom.attention.backend import AttentionBackend
from kvloom.attention.batch import AttentionBatch
from kvloom.cache.kvcache import KVCache
from kvloom.engine.request import Logprob
from kvloom.engine.scheduler import Work
from kvloom.models.decoder import Decoder, QueryObserver

LOGITS_TILE_BYTES = 64 << 20
"""Float32 logits held at once for prompt log-probabilities (64 rows of a 262k vocabulary)."""


class Runner:
    """The model, its cache and its attention backend; owns no request state."""

    def __init__(self, decoder: Decoder, cache: KVCache, backend: AttentionBackend) -> None:
        self.decoder = decoder
        self.cache = cache
        self.backend = backend

    def forward(self, work: list[Work]) -> torch.Tensor:
        """Process the tokens of `work`; returns final hidden states [T, hidden] and fills the lanes."""
        return self.decoder.forward(self._batch(work), self.cache, self.backend, self._observer(work))

    def _observer(self, work: list[Work]) -> QueryObserver | None:
        """Return what shows each policy the queries of its own sequence, None when none wants to see any."""
        watched = []
        start = 0
        for item in work:
            end = start + item.num_tokens
            if item.sequence.eviction is not None and item.sequence.eviction.watches:
                watched.append((item.sequence.eviction, item.sequence.row, slice(start, end)))
            start = end
        if not watched:
            return None

        def observe(layer: int, q: torch.Tensor) -> None:
            for eviction, row, rows in watched:
                assert row is not None
                eviction.observe(layer, row, q[rows])

        return observe

    def _batch(self, work: list[Work]) -> AttentionBatch:
        device = self.decoder.device
        ids: list[int] = []
        for item in work:
            ids += item.sequence.token_ids[item.start : item.start + item.num_tokens]
        positions = np.concatenate([np.arange(w.start, w.start + w.num_tokens) for w in work])
        return AttentionBatch(
            token_ids=torch.tensor(ids, device=device),
            positions=torch.from_numpy(positions).to(device),
            sequences=np.array([w.sequence.row for w in work], np.int32),
            cu_seqlens_q=np.cumsum([0, *(w.num_tokens for w in work)], dtype=np.int32),
        )

    def last_rows(self, work: list[Work], hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [N, vocab] float32 of the last token of every item that samples, in order."""
        ends = np.cumsum([w.num_tokens for w in work]) - 1
        rows = [int(end) for end, item in zip(ends, work, strict=True) if item.samples]
        return self.decoder.logits(hidden[rows])

    def prompt_logprobs(self, work: list[Work], hidden: torch.Tensor) -> None:
        """Append to `prompt_logprobs` of the requests that want them; the whole logits matrix never exists."""
        start = 0
        for item in work:
            rows = hidden[start : start + item.num_tokens]
            start += item.num_tokens
            request = item.sequence.request
            wanted = request.prompt_logprobs
            if wanted is None or len(wanted) >= len(request.prompt_token_ids):
                continue
            targets = request.prompt_token_ids[item.start + 1 : item.start + item.num_tokens + 1]
            skip = len(wanted) - 1 - item.start  # rows that an earlier run of a preempted request has done
            for tile, ids in self._tiles(rows[max(skip, 0) : len(targets)], targets[max(skip, 0) :]):
                wanted.extend(top_logprobs(tile, ids, request.params.prompt_logprobs or 0))

    def _tiles(self, hidden: torch.Tensor, targets: list[int]) -> Iterator[tuple[torch.Tensor, list[int]]]:
        step = max(1, LOGITS_TILE_BYTES // (4 * self.decoder.config.vocab_size))
        for first in range(0, len(targets), step):
            yield self.decoder.logits(hidden[first : first + step]), targets[first : first + step]


def top_logprobs(logits: torch.Tensor, chosen: list[int], count: int) -> list[dict[int, Logprob]]:
    """Return, for each row of logits [N, V], the `count` best tokens and the chosen one with logprob and rank."""
    logits = logits.float()
    total = torch.logsumexp(logits, dim=-1, keepdim=True)
    ids = torch.tensor(chosen, device=logits.device)[:, None]
    own = logits.gather(1, ids)
    ranks = (logits > own).sum(dim=1) + 1
    best = torch.topk(logits, min(count, logits.shape[1]), dim=-1)
    found: list[dict[int, Logprob]] = []
    for row, token in enumerate(chosen):
        scores = (best.values[row] - total[row]).tolist()
        entry = {
            t: Logprob(s, place + 1)
            for place, (t, s) in enumerate(zip(best.indices[row].tolist(), scores, strict=True))
        }
        entry.setdefault(token, Logprob(float(own[row] - total[row]), int(ranks[row])))
        found.append(entry)
    return found
