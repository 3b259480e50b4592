"""ReferenceBackend: gathers each sequence's lanes and calls the definition of attention. Exact and slow."""

import numpy as np
import torch

from kvloom.attention.backend import NO_TERMS, ScoreTerms
from kvloom.attention.batch import AttentionBatch
from kvloom.cache.kvcache import KVCache
from kvloom.kernels import reference

QUERY_TILE = 512
"""Query rows that are computed at a time: scores take at most H x 512 x S numbers."""


class ReferenceBackend:
    """Attention by gathering, one sequence at a time; so no sequence's result depends on the batch."""

    name = "reference"

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, batch: AttentionBatch, cache: KVCache) -> None:
        """Write the batch's K and V into the lanes of `layer` (see `AttentionBackend`)."""
        for sequence, start, end in batch.spans():
            cache.append(layer, sequence, k[start:end], v[start:end])

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        scale: float,
        batch: AttentionBatch,
        cache: KVCache,
        terms: ScoreTerms = NO_TERMS,
    ) -> torch.Tensor:
        """Return attention [T, H, Dv] (see `AttentionBackend`)."""
        window = cache.layers[layer].window
        out = q.new_empty(q.shape[0], q.shape[1], cache.layers[layer].v_width)
        for sequence, start, end in batch.spans():
            k, v, held = cache.read_layer(layer, sequence)
            bias = cache.read_log_counts(layer, sequence)
            lanes_held = torch.from_numpy(held).to(q.device)
            distance = None if terms.slopes is None else self._distance(layer, sequence, batch, start, end, cache)
            for first in range(start, end, QUERY_TILE):
                last = min(first + QUERY_TILE, end)
                begin = None  # the first slot of each query's chunk: in such lanes slots follow positions
                if terms.chunk is not None:
                    places = torch.from_numpy(batch.positions[first:last].astype(np.int64))
                    begin = places // terms.chunk * terms.chunk - (int(batch.positions[end - 1]) + 1 - k.shape[1])
                later = end - last  # newer tokens of this chunk, which these queries do not attend to
                slots = k.shape[1] - later
                out[first:last], _ = reference.attention(
                    q[first:last],
                    k[:, :slots],
                    v[:, :slots],
                    lanes_held - later,
                    scale,
                    window,
                    None if bias is None else bias[:, :slots],
                    cap=terms.cap,
                    slopes=terms.slopes,
                    distance=None if distance is None else distance[:, first - start : last - start, :slots],
                    sinks=terms.sinks,
                    first=None if begin is None else begin.to(q.device),
                )
        return out

    @staticmethod
    def _distance(
        layer: int, sequence: int, batch: AttentionBatch, start: int, end: int, cache: KVCache
    ) -> torch.Tensor | None:
        """Return the distances in tokens between queries and keys [G, n, S], None where slots give them.

        Slots are aligned as in `KVCache.read_layer`; evicted tokens of a lane still count in its distances.
        """
        lanes = cache.lanes
        if sequence not in lanes.positions:
            return None
        view = cache.layers[layer]
        rows = range(view.first, view.first + view.num_lanes)
        slots = int(lanes.held[sequence, view.first : view.first + view.num_lanes].max())
        keys = np.zeros((view.num_lanes, slots), np.int64)
        for row, lane in zip(keys, rows, strict=True):
            positions = lanes.positions_of(sequence, lane)
            row[slots - len(positions) :] = positions
        return torch.from_numpy(batch.positions[start:end].astype(np.int64)[None, :, None] - keys[:, None, :])
