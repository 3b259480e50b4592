"""Replay: feeds the context once more, chunk by chunk, and records the attention to it (KVzip).

    lanes    | context: sinks ... chunk first .. last - 1 ... | instruction, chunk again |
    softmax    ^^^^^          ^^^^^^^^^^^^^^^^^^^^^^^^^^^^      ^^^^^^^ causal ^^^^^^^^^^

The replayed tokens are discarded afterwards; only the scores of the context remain.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvloom.cache.kvcache import KVCache
from kvloom.policies.context import output_norms
from kvloom.policies.modelfacts import ModelFacts

HINT = 8
"""Tokens of the chunk before that mark where to continue."""

TILE = 128
"""Queries at a time: bounds the scores to H x 128 x (chunk + replay)."""


@dataclass(frozen=True)
class ReplayPass:
    """Tokens to feed after the context so that positions `first .. last - 1` of it are scored."""

    first: int
    last: int
    token_ids: tuple[int, ...]


def replay_passes(
    prompt: Sequence[int], chunk: int, instruction: Callable[[Sequence[int]], list[int]]
) -> list[ReplayPass]:
    """Return the passes over a prompt in chunks of `chunk` tokens; later ones get the end of the chunk before."""
    passes = []
    for first in range(0, len(prompt), chunk):
        part = prompt[first : first + chunk]
        hint = prompt[max(0, first - HINT) : first]
        passes.append(ReplayPass(first, first + len(part), (*instruction(hint), *part)))
    return passes


class ReplayScores:
    """Most attention that any query of a replay paid each token of the context: [G, n] for each of `layers`."""

    def __init__(
        self, cache: KVCache, model: ModelFacts, layers: Sequence[int], context: int, sinks: int, normalised: bool
    ) -> None:
        """Score `context` tokens; with `normalised` weights count times ||W_O v|| / ||h|| (KVzip+)."""
        self.cache = cache
        self.model = model
        self.context = context
        self.sinks = sinks
        self.normalised = normalised
        self.best = {layer: torch.zeros(cache.layers[layer].num_lanes, context) for layer in layers}

    def observe(
        self, layer: int, sequence: int, now: ReplayPass, q: torch.Tensor, input_norms: torch.Tensor | None
    ) -> None:
        """Take in rotated queries q [n, H, D] of the newest n tokens of a pass; norms [n] of the layer's input.

        `sequence` holds the context, uncompressed, and the pass so far; its K and V are in the lanes already.
        """
        if layer not in self.best:
            return
        k, v, _ = self.cache.read_layer(layer, sequence)
        fed = k.shape[1] - self.context
        sinks = min(self.sinks, now.first)
        slots = torch.cat(
            (torch.arange(sinks), torch.arange(now.first, now.last), torch.arange(self.context, self.context + fed))
        )
        k, part = k[:, slots].float(), slice(sinks, sinks + now.last - now.first)
        lanes = k.shape[0]
        norms = None
        if self.normalised:
            assert input_norms is not None, "declared in needs"
            values = v[:, now.first : now.last].float()
            norms = output_norms(self.model.output_weight(layer), values, self.model.num_query_heads, 2)
        known = self.best[layer][:, now.first : now.last]
        shown = sinks + now.last - now.first  # slots that every query sees; those fed again follow, causally
        for start in range(0, len(q), TILE):
            rows = q[start : start + TILE]
            query = (rows.float() * self.model.query_scale).transpose(0, 1).reshape(lanes, -1, rows.shape[2])
            scores = torch.bmm(query, k.transpose(1, 2)).view(lanes, -1, len(rows), k.shape[1])
            own = fed - len(q) + start + torch.arange(len(rows))[:, None]
            scores[..., shown:].masked_fill_(torch.arange(fed) > own, float("-inf"))
            share = scores[..., part] - torch.logsumexp(scores, dim=-1, keepdim=True)  # ln of the weights
            if norms is not None and input_norms is not None:
                share += norms.view(lanes, -1, 1, norms.shape[1]).log()
                share -= input_norms[start : start + len(rows)].log()[:, None]
            known = torch.maximum(known, share.flatten(1, 2).amax(1).exp())
        self.best[layer][:, now.first : now.last] = known
