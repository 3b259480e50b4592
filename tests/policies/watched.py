"""An engine whose cache is checked: every compaction and attention is compared with lists of all tokens."""

import numpy as np
import torch

from harness.dense_attention import dense_attention
from kvloom.attention.reference import ReferenceBackend


class Shadow(ReferenceBackend):
    """Attends as usual, and compares with dense attention over explicit lists of what survived in each lane.

    Lists follow rows of the lane table: what is appended, which slots a compaction keeps, forks. Attach it to a cache
    with `watch`.
    """

    def __init__(self):
        self.cache = None
        self.lists = {}  # (row, lane) -> list of (position, k, v)
        self.freed = []  # addresses that compactions gave back
        self.compactions = 0
        self.checked = 0

    def watch(self, cache):
        """Follow everything that happens to `cache`."""
        self.cache = cache
        compact, fork, opened = cache.compact, cache.lanes.fork, cache.lanes.open
        lanes = cache.lanes

        def watched_compact(row, keep, survivors=None):
            before = {lane: self.content(row, lane) for lane in keep}
            blocks = {lane: lanes.table[row, lane][lanes.table[row, lane] >= 0].copy() for lane in keep}
            if not compact(row, keep, survivors):
                return False
            self.compactions += 1
            size = cache.spec.block_size
            for lane, slots in keep.items():
                now = self.content(row, lane)
                assert [p for p, _, _ in now] == [before[lane][s][0] for s in slots]
                changed = survivors is not None and lane in survivors
                if not changed:
                    for (_, k, v), s in zip(now, slots, strict=True):
                        assert torch.equal(k, before[lane][s][1]) and torch.equal(v, before[lane][s][2])
                kept = lanes.table[row, lane][lanes.table[row, lane] >= 0]
                assert len(kept) == -(-len(slots) // size), "as many blocks as the tokens fill, and no more"
                gone = np.setdiff1d(blocks[lane], kept)
                self.freed += gone[cache.arena.references(gone) == 0].tolist()
                if (row, lane) in self.lists:
                    self.lists[row, lane] = now if changed else [self.lists[row, lane][s] for s in slots]
            return True

        def watched_fork(row):
            child = fork(row)
            for (owner, lane), entries in list(self.lists.items()):
                if owner == row:
                    self.lists[child, lane] = list(entries)
            return child

        def watched_open():
            row = opened()
            for key in [key for key in self.lists if key[0] == row]:
                del self.lists[key]
            return row

        cache.compact, lanes.fork, lanes.open = watched_compact, watched_fork, watched_open

    def content(self, row, lane):
        """Return (position, k, v) of what a lane holds."""
        k, v = self.cache.read_lane(row, lane)
        return list(zip(self.cache.lanes.positions_of(row, lane).tolist(), k, v, strict=True))

    def append(self, layer, k, v, batch, cache):
        """Write, and note what was written."""
        super().append(layer, k, v, batch, cache)
        view = cache.layers[layer]
        for row, start, end in batch.spans():
            for g in range(view.num_lanes):
                first = int(cache.lanes.seen[row]) - (end - start)
                known = self.lists.get((row, view.first + g))
                if known is None or (first and not known):  # a prefix came from the index: take over what is there
                    known = self.content(row, view.first + g)[: -(end - start)]
                new = [(first + i, k[start + i, g].clone(), v[start + i, g].clone()) for i in range(end - start)]
                self.lists[row, view.first + g] = [*known, *new]

    def attend(self, layer, q, scale, batch, cache):
        """Attend, and compare with float64 attention over the lists, for the newest query of each sequence."""
        out = super().attend(layer, q, scale, batch, cache)
        view = cache.layers[layer]
        group = q.shape[1] // view.num_lanes
        if cache.layers[layer].window is None:
            for row, _, end in batch.spans():
                for head in range(q.shape[1]):
                    lane = view.first + head // group
                    entries = self.lists[row, lane]
                    logs = None
                    if row in cache.lanes.log_counts:
                        logs = torch.from_numpy(cache.lanes.log_counts[row][lane, : len(entries)])
                    k = torch.stack([k for _, k, _ in entries])
                    v = torch.stack([v for _, _, v in entries])
                    all_of_it = torch.ones(1, len(entries), dtype=torch.bool)
                    expected, _ = dense_attention(q[end - 1 : end, head], k, v, all_of_it, scale, logs)
                    torch.testing.assert_close(out[end - 1, head].double(), expected[0], rtol=1e-4, atol=1e-4)
                    self.checked += 1
        return out
