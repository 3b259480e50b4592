"""Dense attention over explicit lists of (k, v, position): the oracle for all operations of the paged cache on lanes.

Nothing here knows blocks, slots or stores. A query at position p sees the entries of its lane with position <= p, and
with position > p - window where the layer has a window. Arithmetic is float64.
"""

from dataclasses import dataclass, field

import torch

from kvloom.attention.batch import AttentionBatch
from kvloom.spec.decoder import DecoderConfig

Entry = tuple[torch.Tensor, torch.Tensor, int]


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax(scale q k' + bias) v [n, Dv] and its log-sum-exp [n] in float64, for one query head.

    q [n, D], k [S, D], v [S, Dv]; query i sees entry s where visible[i, s]. `bias` [S] or [n, S] holds slopes, or the
    logarithms of the numbers of tokens that entries stand for.
    """
    scores = scale * (q.double() @ k.double().T)
    if bias is not None:
        scores = scores + bias.double()
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    return torch.exp(scores - lse[:, None]) @ v.double(), lse


def through_int8(x: torch.Tensor) -> torch.Tensor:
    """What a vector is after symmetric rounding to 127 steps, in its own dtype."""
    scale = x.float().abs().max() / 127
    return (torch.round(x.float() / scale) * scale).to(x.dtype)


@dataclass
class DenseLanes:
    """Entries of every lane of every sequence, in order of arrival; lane (sequence, layer, head)."""

    config: DecoderConfig
    lanes: dict[tuple[int, int, int], list[Entry]] = field(default_factory=dict)

    def fork(self, parent: int, child: int) -> None:
        """Give `child` what `parent` holds."""
        for (sequence, layer, head), entries in list(self.lanes.items()):
            if sequence == parent:
                self.lanes[child, layer, head] = list(entries)

    def keep(self, sequence: int, layer: int, head: int, chosen: list[int]) -> None:
        """Drop all entries of a lane but the `chosen` ones (by place in the list)."""
        entries = self.lanes[sequence, layer, head]
        self.lanes[sequence, layer, head] = [entries[i] for i in chosen]

    def encode(self, sequence: int, layer: int, head: int, first: int, last: int) -> None:
        """Send the entries at places first .. last - 1 through int8."""
        entries = self.lanes[sequence, layer, head]
        for i in range(first, last):
            k, v, position = entries[i]
            entries[i] = (through_int8(k), through_int8(v), position)


class DenseBackend:
    """An attention backend over `DenseLanes`; it looks at no cache."""

    name = "dense"

    def __init__(self, config: DecoderConfig) -> None:
        self.dense = DenseLanes(config)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, batch: AttentionBatch, cache: object) -> None:
        """Add the batch's entries to their lists."""
        for sequence, start, end in batch.spans():
            for head in range(k.shape[1]):
                entries = self.dense.lanes.setdefault((sequence, layer, head), [])
                entries += [
                    (k[i, head].clone(), v[i, head].clone(), int(batch.positions[i])) for i in range(start, end)
                ]

    def attend(
        self, layer: int, q: torch.Tensor, scale: float, batch: AttentionBatch, cache: object, terms: object = None
    ) -> torch.Tensor:
        """Return softmax over the visible entries, one lane at a time; distances are those of the config's ALiBi."""
        config = self.dense.config
        window = config.layers[layer].window
        group = config.num_heads // config.num_kv_heads
        out = torch.empty_like(q)
        for sequence, start, end in batch.spans():
            at = torch.from_numpy(batch.positions[start:end]).long()[:, None]
            for head in range(config.num_kv_heads):
                entries = self.dense.lanes[sequence, layer, head]
                k = torch.stack([entry[0] for entry in entries])
                v = torch.stack([entry[1] for entry in entries])
                position = torch.tensor([entry[2] for entry in entries])[None, :]
                seen = (position <= at) if window is None else (position <= at) & (position > at - window)
                for h in range(head * group, (head + 1) * group):
                    bias = -config.slopes[h] * (at - position) if config.slopes else None
                    out[start:end, h] = dense_attention(q[start:end, h], k, v, seen, scale, bias)[0].to(q.dtype)
        return out


class CheckedBackend:
    """A backend whose every output is compared with the dense one, given the same queries, keys and values."""

    name = "checked"

    def __init__(self, inner: object, config: DecoderConfig, tolerance: float) -> None:
        self.inner = inner
        self.beside = DenseBackend(config)
        self.tolerance = tolerance
        self.compared = 0

    def append(self, layer, k, v, batch, cache):  # type: ignore[no-untyped-def]
        """Append to both."""
        self.inner.append(layer, k, v, batch, cache)  # type: ignore[attr-defined]
        self.beside.append(layer, k, v, batch, cache)

    def attend(self, layer, q, scale, batch, cache):  # type: ignore[no-untyped-def]
        """Return the inner result, once it agrees."""
        out = self.inner.attend(layer, q, scale, batch, cache)  # type: ignore[attr-defined]
        expected = self.beside.attend(layer, q, scale, batch, cache)
        assert (out.float() - expected.float()).abs().max() < self.tolerance
        self.compared += 1
        return out
