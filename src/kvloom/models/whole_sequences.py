"""WholeSequences: attention without a cache, over complete sequences of one length."""

import torch

from kvloom.attention.backend import ScoreTerms
from kvloom.kernels import reference


class WholeSequences:
    """Keys and values of B sequences of T tokens, packed one after the other (see `decoder.Memory`).

    Gradients flow through; `windows` are those of the layers, None where a layer has no window.
    """

    def __init__(self, num_sequences: int, windows: tuple[int | None, ...]) -> None:
        self._num_sequences = num_sequences
        self._windows = windows
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keep k and v [B T, G, D] until the layer attends."""
        self._held[layer] = (k, v)

    def attend(self, layer: int, q: torch.Tensor, scale: float, terms: ScoreTerms) -> torch.Tensor:
        """Return causal attention [B T, H, D] of q [B T, H, D], each sequence over its own keys."""
        queries, keys, values = (x.view(self._num_sequences, -1, *x.shape[1:]) for x in (q, *self._held.pop(layer)))
        held = torch.full((keys.shape[2],), keys.shape[1], device=q.device)
        positions = torch.arange(keys.shape[1], device=q.device)
        first = None if terms.chunk is None else positions // terms.chunk * terms.chunk
        outputs = [
            reference.attention(
                queries[b],
                keys[b].transpose(0, 1),
                values[b].transpose(0, 1),
                held,
                scale,
                self._windows[layer],
                cap=terms.cap,
                slopes=terms.slopes,
                sinks=terms.sinks,
                first=first,
            )[0]
            for b in range(self._num_sequences)
        ]
        return torch.cat(outputs)
