"""Choice: the slots of each lane to keep, by scores, budget, refinements and merging."""

from collections.abc import Callable, Sequence
from itertools import chain, islice

import numpy as np
import torch
from numpy.typing import NDArray

from kvloom.cache.keptslots import KeptSlots
from kvloom.cache.kvcache import KVCache
from kvloom.cache.survivors import Survivors
from kvloom.errors import MethodError
from kvloom.policies.budgets import LayerScores
from kvloom.policies.context import ScoreContext
from kvloom.policies.contexts import Contexts
from kvloom.policies.policy import Policy
from kvloom.policies.scorer import Scorer, Selector, checked_mask, checked_scores
from kvloom.policies.selection import keep_best, standardised

STACKED = 1 << 15
"""Numbers in a stack of layers: torch computes fewer than this on the calling thread alone. Its own threads would spin
for milliseconds afterwards, on cores that the kernels use."""

State = dict[int, dict[str, torch.Tensor]]
"""State of a method, by layer."""


class Choice:
    """Chooses for `policy` among what the lanes of its `layers` hold; changes nothing."""

    def __init__(
        self, policy: Policy, cache: KVCache, contexts: Contexts, layers: Sequence[int], lanes: NDArray[np.int64]
    ) -> None:
        """`lanes` are those of `layers`, in their order."""
        self.policy = policy
        self.cache = cache
        self.contexts = contexts
        self.layers = layers
        self.lanes = lanes

    def make(self, row: int) -> tuple[KeptSlots, dict[int, Survivors], State]:
        """Return the slots to keep, changed survivors by lane, and the new state of the method by layer."""
        remembered = self.contexts.record.remembered
        state = {layer: dict(remembered.get(layer, {})) for layer in self.layers}
        stacks, rule = self._stacks(row), self.policy.rule
        parts: list[LayerScores] = []
        if isinstance(rule, Selector):
            masks = [torch.stack([self._select_by(rule, i, row, state[i]) for i in layers]) for layers in stacks]
        else:
            # keys and values of one layer at a time: no context is kept
            parts = [self._score_stack(rule, layers, row, state) for layers in stacks]
            masks = self._select(row, stacks, parts, state)
        keep = self._kept(row, masks)
        return keep, self._merged(row, keep, parts, masks, state) if self.policy.merges else {}, state

    def _select_by(self, rule: Selector, layer: int, row: int, state: dict[str, torch.Tensor]) -> torch.Tensor:
        context = self.contexts.of_layer(layer, row, state)
        return checked_mask(context, _result(context, rule.keep, "keep"), "keep") & context.valid

    def _merged(
        self, row: int, keep: KeptSlots, parts: list[LayerScores], masks: list[torch.Tensor], state: State
    ) -> dict[int, Survivors]:
        """Return the content of survivors after evicted tokens are merged into them, by lane."""
        changed: dict[int, Survivors] = {}
        scores = dict(zip(self.layers, (own for part in parts for own in part.scores), strict=bool(parts)))
        for layer, mask in zip(self.layers, (own for stack in masks for own in stack), strict=True):
            lanes = range(self.cache.layers[layer].first, self.cache.layers[layer].first + len(mask))
            if any(lane in keep for lane in lanes):
                context = self.contexts.of_layer(layer, row, state[layer])
                merged = self.policy.action.merge(context, mask, scores.get(layer, context.positions.double()))
                if merged is not None:
                    changed |= {lane: own for lane, own in zip(lanes, merged, strict=True) if lane in keep}
        return changed

    def _stacks(self, row: int) -> list[list[int]]:
        """Return the layers in stacks of neighbours with equal lanes, equally long now."""
        stacks: list[list[int]] = []
        last: object = None
        held = self.cache.lanes.held[row].tolist()
        for layer in self.layers:
            view = self.cache.layers[layer]
            longest = max(held[view.first : view.first + view.num_lanes])
            kind = (view.num_lanes, view.k_width, view.v_width, longest)
            if kind == last and (len(stacks[-1]) + 1) * view.num_lanes * longest < STACKED:
                stacks[-1].append(layer)
            else:
                stacks.append([layer])
            last = kind
        return stacks

    def _kept(self, row: int, masks: list[torch.Tensor]) -> KeptSlots:
        """Return by slot what the masks [L, G, S] say of lanes that lose something."""
        held, size = self.cache.lanes.held[row, self.lanes], self.cache.spec.block_size
        stays = np.zeros((len(held), max(1, -(-int(held.max()) // size)) * size), np.bool_)
        first = 0
        for mask in masks:
            own = mask.flatten(0, 1).numpy()
            rows = slice(first, first + len(own))
            padding = own.shape[1] - held[rows]
            if padding.any():
                index, place = np.nonzero(own)
                stays[first + index, place - padding[index]] = True
            else:
                stays[rows, : own.shape[1]] = own
            first += len(own)
        losing = np.count_nonzero(stays, axis=1) < held
        return KeptSlots(self.lanes[losing], stays if losing.all() else stays[losing], size)

    def _select(
        self, row: int, stacks: list[list[int]], parts: list[LayerScores], state: State
    ) -> list[torch.Tensor]:
        """Return [L, G, S] bool for each stack: the tokens that stay by scores, budget and refinements."""
        record, budget, see = self.contexts.record, self.policy.budget, self.contexts.of_layer
        sharing, chooser = self.policy.spec.sharing, self.policy.chooser
        protected = self.policy.num_protected(record.budget)
        if sharing.stacks:
            counts = [budget.counts([part], record.budget, protected, record.prompt_tokens)[0] for part in parts]
        else:
            layers = [layer for part in parts for layer in part.layers]
            together = [layers] if sharing.spans_layers else [[layer] for layer in layers]
            shares = [budget.counts(each, record.budget, protected, record.prompt_tokens) for each in together]
            of_layer = chain.from_iterable(shares)
            counts = [torch.stack(list(islice(of_layer, len(stack)))) for stack in stacks]
        if chooser is not None:
            return [
                torch.stack([
                    chooser.choose(p.scores, p.protected, count, see(layer, row, state[layer]))
                    for layer, p, count in zip(stack, part.layers, number, strict=True)
                ])
                for stack, part, number in zip(stacks, parts, counts, strict=True)
            ]  # fmt: skip
        masks = []
        for part, number in zip(parts, counts, strict=True):
            scores, protects, valid = (x.flatten(0, 1) for x in (part.scores, part.protected, part.valid))
            masks.append(keep_best(scores, protects, valid, number.flatten()).view(part.valid.shape))
        return masks

    def _score_stack(self, rule: Scorer, layers: list[int], row: int, state: State) -> LayerScores:
        """Return the scores [L, G, S] of layers that look alike."""
        if self.policy.stacks:
            return self._score(rule, self.contexts.of_stack(layers, row))
        parts = [self._score(rule, self.contexts.of_layer(layer, row, state[layer])) for layer in layers]
        return LayerScores(*(torch.stack([getattr(p, x) for p in parts]) for x in ("scores", "protected", "valid")))

    def _score(self, rule: Scorer, context: ScoreContext) -> LayerScores:
        scores = checked_scores(context, _result(context, rule.score, "score"))
        protected = checked_mask(context, _result(context, rule.protected, "protected"), "protected")
        for refinement in self.policy.refinements:
            scores = refinement.reweigh(scores, context)
            protected = protected | refinement.protected(context)
        if not self.policy.spec.method.comparable and not self.policy.spec.sharing.even:
            scores = standardised(scores, context.valid)
        return LayerScores(scores, protected & context.valid, context.valid)


def _result(context: ScoreContext, function: Callable[[ScoreContext], torch.Tensor], what: str) -> torch.Tensor:
    """Return the result of a method's own code; an exception becomes a `MethodError` that names the method."""
    try:
        return function(context)
    except MethodError:
        raise
    except Exception as error:
        raise MethodError(f"{what} of {context.method} raised {type(error).__name__}: {error}") from error
