"""Eviction: one policy at work on one sequence. It watches queries, and after each step returns blocks to the arena."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvloom.cache.kvcache import KVCache
from kvloom.cache.survivors import Survivors
from kvloom.kernels import reference
from kvloom.policies.budgets import LayerScores, Uniform
from kvloom.policies.context import ScoreContext
from kvloom.policies.observation import Observation
from kvloom.policies.policy import Policy
from kvloom.policies.scorer import Scorer, Selector
from kvloom.policies.selection import keep_best, standardised


@dataclass(frozen=True)
class ModelFacts:
    """What policies may know of a model: query heads, query scale, rope per layer, and its output projections."""

    num_query_heads: int
    query_scale: float
    inverse_frequencies: Sequence[torch.Tensor | None]
    output_weight: Callable[[int], torch.Tensor]


class Eviction:
    """The state of `policy` on one sequence; `row` is the sequence's row set in the lane table."""

    def __init__(self, policy: Policy, cache: KVCache, model: ModelFacts, prompt_tokens: int) -> None:
        self.policy = policy
        self.cache = cache
        self.model = model
        self.prompt_tokens = prompt_tokens
        self.budget = policy.tokens(prompt_tokens)
        self.layers = [i for i in range(len(cache.layers)) if policy.acts_on(cache.spec, i)]
        self._lanes = np.array(
            [cache.layers[i].first + g for i in self.layers for g in range(cache.layers[i].num_lanes)], np.int64
        )
        self.observation = Observation(policy.needs, cache, model.query_scale)
        self.replay_scores: dict[int, torch.Tensor] = {}
        self.token_ids: Sequence[int] | None = None
        self.evicted_tokens = 0
        self._sinks: dict[int, torch.Tensor] = {}  # layer -> unrotated keys [G, sinks, D], for positions in the cache

    # ---- while the model runs -------------------------------------------------------------------------------------

    @property
    def watches(self) -> bool:
        """True when `observe` must be called with the queries of every layer."""
        return self.policy.needs.watches_queries

    def first_watched(self, start: int, count: int) -> int | None:
        """Return from which of the `count` tokens that begin at `start` on queries are wanted, None for none."""
        needs = self.policy.needs
        if not self.watches:
            return None
        if needs.key_mass or (needs.query_moments and start < self.prompt_tokens):
            return 0
        done = self.prompt_tokens if not self.policy.triggers.while_decoding else start + count
        first = max(0, count - needs.queries)
        return first if needs.queries and start < done else None

    def observe(self, layer: int, row: int, q: torch.Tensor) -> None:
        """Take in the rotated queries q [n, H, D] of the newest n tokens of a layer, after the step."""
        if layer in self.layers:
            first = int(self.cache.lanes.seen[row]) - len(q)
            prompt_rows = min(len(q), max(0, self.prompt_tokens - first))
            self.observation.observe(layer, row, q, prompt_rows, self.model.inverse_frequencies[layer])

    @property
    def usable_prefix(self) -> int:
        """Prompt tokens that may come from the prefix cache without changing what is kept."""
        return self.policy.needs.usable_prefix(self.prompt_tokens)

    def restart(self) -> None:
        """Forget all observations: the sequence is computed again from its tokens."""
        assert not self.evicted_tokens, "a sequence that lost tokens is never computed again"
        self.observation = Observation(self.policy.needs, self.cache, self.model.query_scale)
        self.replay_scores.clear()

    def next_boundary(self, seen: int) -> int | None:
        """Return how many tokens may be seen before `apply` must be called again."""
        return self.policy.triggers.next_boundary(seen, self.prompt_tokens)

    def due(self, row: int) -> bool:
        """Return whether the policy has to act now, after a forward pass."""
        seen = int(self.cache.lanes.seen[row])
        over = int(self.cache.lanes.held[row, self._lanes].max()) - self.budget
        return self.policy.triggers.due(seen, self.prompt_tokens, over)

    # ---- acting ---------------------------------------------------------------------------------------------------

    def apply(self, row: int) -> bool:
        """Evict what the policy says; False, and no change, when shared blocks cannot be replaced now."""
        held_before = self.cache.lanes.held[row, self._lanes]
        if isinstance(self.policy.rule, Scorer) and int(held_before.max()) <= self.budget:
            return True
        keep, survivors = self._choose(row)
        if not keep:
            return True
        dropped = sum(int(self.cache.lanes.held[row, lane]) - len(slots) for lane, slots in keep.items())
        if self.policy.cache_positions:
            survivors |= self._moved_sinks(row, keep)
        if not self.cache.compact(row, keep, survivors):
            return False
        for lane, slots in keep.items():
            self.observation.keep(lane, slots)
        self.evicted_tokens += dropped
        return True

    def _choose(self, row: int) -> tuple[dict[int, NDArray[np.int64]], dict[int, Survivors]]:
        """Return the slots that stay of every lane that loses something, and changed survivors by lane."""
        keep: dict[int, NDArray[np.int64]] = {}
        changed: dict[int, Survivors] = {}
        rule = self.policy.rule
        scored = (
            [] if isinstance(rule, Selector) else [self._score(rule, self.context(layer, row)) for layer in self.layers]
        )
        counts: list[torch.Tensor] = []
        if scored:
            protected = self.policy.num_protected(self.budget)
            counts = self.policy.budget.counts(scored, self.budget, protected, self.prompt_tokens)
        for index, layer in enumerate(self.layers):
            context = self.context(layer, row)
            if isinstance(rule, Selector):
                mask, scores = rule.keep(context) & context.valid, context.positions.double()
            else:
                part = scored[index]
                scores = part.scores
                mask = self._select(part, counts[index], context)
            if bool((mask == context.valid).all()):
                continue
            merged = self.policy.action.merge(context, mask, scores)
            for head in range(context.num_lanes):
                lane = self.cache.layers[layer].first + head
                pad = int((~context.valid[head]).sum())
                slots = torch.nonzero(mask[head]).flatten().numpy() - pad
                if len(slots) < int(self.cache.lanes.held[row, lane]):
                    keep[lane] = slots.astype(np.int64)
                    if merged is not None:
                        changed[lane] = merged[head]
        return keep, changed

    def _score(self, rule: Scorer, context: ScoreContext) -> LayerScores:
        scores = rule.score(context)
        protected = rule.protected(context)
        for refinement in self.policy.refinements:
            scores = refinement.reweigh(scores, context)
            protected = protected | refinement.protected(context)
        if not rule.comparable and not isinstance(self.policy.budget, Uniform):
            scores = standardised(scores, context.valid)
        return LayerScores(scores, protected & context.valid, context.valid)

    def _select(self, part: LayerScores, counts: torch.Tensor, context: ScoreContext) -> torch.Tensor:
        for refinement in self.policy.refinements:
            if refinement.chooses:
                return refinement.choose(part.scores, part.protected, counts, context)
        return keep_best(part.scores, part.protected, part.valid, counts)

    def context(self, layer: int, row: int) -> ScoreContext:
        """Return what a scorer may see of one layer now."""
        view, needs = self.cache.layers[layer], self.policy.needs
        k, v, held = self.cache.read_layer(layer, row)
        slots = k.shape[1]
        valid = torch.arange(slots)[None, :] >= slots - torch.from_numpy(held)[:, None]
        positions = torch.full((view.num_lanes, slots), -1, dtype=torch.int64)
        mass = torch.zeros(view.num_lanes, slots, dtype=torch.float64) if needs.key_mass else None
        for head in range(view.num_lanes):
            count = int(held[head])
            places = self.cache.lanes.positions_of(row, view.first + head)
            positions[head, slots - count :] = torch.from_numpy(places.astype(np.int64))
            if mass is not None:
                mass[head, slots - count :] = self.observation.mass[view.first + head]
        queries = self.observation.queries.get(layer)
        seen = int(self.cache.lanes.seen[row])
        return ScoreContext(
            layer=layer,
            num_layers=len(self.cache.layers),
            num_query_heads=self.model.num_query_heads,
            scale=self.model.query_scale,
            keys=k.float(),
            values=v.float(),
            positions=positions,
            valid=valid,
            seen=seen,
            prompt_tokens=self.prompt_tokens,
            budget=self.budget,
            queries=None if queries is None else queries.float(),
            query_positions=None if queries is None else torch.arange(seen - len(queries), seen),
            key_mass=mass,
            query_moments=self.observation.moments(layer) if needs.query_moments else None,
            inverse_frequencies=self.model.inverse_frequencies[layer],
            output_weight=self.model.output_weight(layer) if needs.output_weights else None,
            replay_scores=self.replay_scores.get(layer),
            token_ids=self.token_ids if needs.token_ids else None,
        )

    # ---- bytes to plan with ---------------------------------------------------------------------------------------

    def peak_bytes(self, num_tokens: int, chunk: int) -> int:
        """Return the most arena bytes that a sequence of `num_tokens` needs at any time under this policy."""
        triggers = self.policy.triggers
        before = min(num_tokens, self.prompt_tokens)
        prefill = before if triggers.chunk is None else min(before, self.budget + triggers.chunk)
        decode = self._bound(num_tokens)
        return max(self._bytes(prefill, num_tokens, chunk), self._bytes(decode, num_tokens, chunk))

    def future_bytes(self, row: int, num_tokens: int) -> int:
        """Return the most bytes that a sequence that has lost tokens needs until its text has `num_tokens`."""
        remaining = num_tokens - int(self.cache.lanes.seen[row])
        held = self.cache.lanes.held[row, self._lanes]
        if self.policy.triggers.while_decoding:
            grown = np.minimum(held + remaining, np.maximum(held, self._bound(num_tokens)))
        else:
            grown = held + remaining
        own = sum(
            int(-(-int(count) // self.cache.spec.block_size)) * self._block_bytes(int(lane))
            for count, lane in zip(grown, self._lanes, strict=True)
        )
        return own + self._bytes(0, num_tokens, 1)

    def _bound(self, num_tokens: int) -> int:
        """Return the most tokens that a lane holds after the prompt, on average over lanes."""
        generated = num_tokens - self.prompt_tokens
        start = min(self.budget, self.prompt_tokens)
        triggers = self.policy.triggers
        if triggers.while_decoding:
            return min(start + max(generated, 0), max(start, self.budget + triggers.excess()))
        return start + max(generated, 0)

    def _bytes(self, tokens: int, num_tokens: int, chunk: int) -> int:
        """Return the bytes of `tokens` in each lane that the policy acts on (ragged or not) and all of the others."""
        size, spec = self.cache.spec.block_size, self.cache.spec
        total = 0
        for layer, view in enumerate(self.cache.layers):
            if spec.layers[layer].source is not None:
                continue
            if layer in self.layers:
                # n lanes with n * tokens between them fill at most that many blocks and one more each, partly
                ragged = self.policy.budget.ragged or isinstance(self.policy.rule, Selector)
                blocks = tokens // size + 1 if ragged and tokens else -(-tokens // size)
            else:
                blocks = spec.lane_blocks(num_tokens, view.window, chunk)
            total += view.num_lanes * blocks * spec.layer_block_bytes(layer)
        return total

    def _block_bytes(self, lane: int) -> int:
        return self.cache.spec.layer_block_bytes(self.cache.spec.lane_layer[lane])

    # ---- positions in the cache -----------------------------------------------------------------------------------

    def _moved_sinks(self, row: int, keep: dict[int, NDArray[np.int64]]) -> dict[int, Survivors]:
        """Return survivors whose sinks are rotated to where the cache says they are.

        Rope is relative, so the window's keys stay at their true positions and only the few sinks move: with `seen`
        tokens processed and `held` kept, cache index i is true position i + seen - held. Sinks are always rotated from
        an unrotated copy, taken before the first eviction, never from a rotated one.
        """
        sinks = int(self.policy.spec.selector.get("sinks") or 0)
        changed: dict[int, Survivors] = {}
        for layer in self.layers:
            theta = self.model.inverse_frequencies[layer]
            view = self.cache.layers[layer]
            if theta is None or sinks == 0:
                continue
            k, v, _ = self.cache.read_layer(layer, row)
            if layer not in self._sinks:
                self._sinks[layer] = rotated(k[:, :sinks].float(), theta, -torch.arange(sinks))
            kept = len(keep[view.first])
            places = torch.arange(sinks) + int(self.cache.lanes.seen[row]) - kept
            moved = rotated(self._sinks[layer], theta, places).to(k.dtype)
            for head in range(view.num_lanes):
                slots = torch.from_numpy(keep[view.first + head])
                keys = k[head, slots].clone()
                keys[:sinks] = moved[head]
                changed[view.first + head] = Survivors(keys, v[head, slots])
        return changed

    def fork(self) -> "Eviction":
        """Return an independent copy for a forked sequence."""
        other = Eviction(self.policy, self.cache, self.model, self.prompt_tokens)
        other.observation = self.observation.fork()
        other.replay_scores = dict(self.replay_scores)
        other.evicted_tokens = self.evicted_tokens
        other.token_ids = self.token_ids
        other._sinks = dict(self._sinks)
        return other


def rotated(keys: torch.Tensor, theta: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return keys [G, n, D] rotated by positions [n] (negative: back); angles in float64."""
    angles = positions.double()[:, None] * theta.double()[None, :]
    return reference.apply_rope(keys.transpose(0, 1), angles.cos().float(), angles.sin().float()).transpose(0, 1)
