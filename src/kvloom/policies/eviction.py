"""Eviction: one policy at work on one sequence. It watches queries, and after each step returns blocks to the arena."""

from collections.abc import Sequence
from functools import cached_property
from itertools import chain, islice

import numpy as np
import torch

from kvloom.cache.keptslots import KeptSlots
from kvloom.cache.kvcache import KVCache
from kvloom.cache.survivors import Survivors
from kvloom.policies.budgets import LayerScores, Uniform
from kvloom.policies.cachepositions import MovedSinks
from kvloom.policies.context import ScoreContext
from kvloom.policies.modelfacts import ModelFacts
from kvloom.policies.observation import Observation
from kvloom.policies.occupancy import Occupancy
from kvloom.policies.policy import Policy
from kvloom.policies.replay import ReplayPass, ReplayScores, replay_passes
from kvloom.policies.scorer import Scorer, Selector
from kvloom.policies.selection import keep_best, standardised

__all__ = ["Eviction", "ModelFacts"]

STACKED = 1 << 15
"""Numbers in a stack of layers: torch computes fewer than this on the calling thread alone. Its own threads would go on
spinning for milliseconds, on cores that the kernels need."""


class Eviction:
    """The state of `policy` on one sequence; `row` is the sequence's row set in the lane table."""

    def __init__(
        self,
        policy: Policy,
        cache: KVCache,
        model: ModelFacts,
        token_ids: Sequence[int],
        prompt_tokens: int,
        seed: int = 0,
    ) -> None:
        """Start with nothing seen of `token_ids`; the first `prompt_tokens` are the prompt, and the list may grow."""
        self.policy = policy
        self.cache = cache
        self.model = model
        self.token_ids = token_ids
        self.prompt_tokens = prompt_tokens
        self.seed = seed
        self.budget = policy.tokens(prompt_tokens)
        self.layers = [i for i in range(len(cache.layers)) if policy.acts_on(cache.spec, i)]
        self._lanes = np.array(
            [cache.layers[i].first + g for i in self.layers for g in range(cache.layers[i].num_lanes)], np.int64
        )
        self.observation = Observation(
            policy.needs, cache, model.query_scale, prompt_tokens, self.layers, model.inverse_frequencies
        )
        self.replay_scores: dict[int, torch.Tensor] = {}
        self.evicted_tokens = 0
        self._acted_at = 0  # tokens seen when a selector last acted
        self._state: dict[int, dict[str, torch.Tensor]] = {}  # layer -> what the method remembers
        self._flags: tuple[list[bool], list[bool]] = ([], [])  # special tokens and punctuation among `token_ids`
        self._sinks = MovedSinks(cache, int(policy.spec.selector.get("sinks") or 0))

    # ---- while the model runs -------------------------------------------------------------------------------------

    def first_watched(self, start: int, count: int) -> int | None:
        """Return from which of the `count` tokens that begin at `start` on queries are wanted, None for none."""
        return self.observation.first_needed(start, count, self.policy.triggers.while_decoding)

    def observe(self, row: int, q: torch.Tensor, lse: torch.Tensor | None = None) -> None:
        """Take in the rotated queries q [L, n, H, D] of the newest n tokens, and lse [L, n, H] if there are any."""
        self.observation.observe(row, q, lse)

    @property
    def usable_prefix(self) -> int:
        """Prompt tokens that may come from the prefix cache without changing what is kept.

        A prefix is computed with everything in sight. Tokens that come after an eviction are not, so a policy that acts
        per chunk can take over no more than what comes before its first eviction.
        """
        chunk = self.policy.triggers.chunk
        end = self.prompt_tokens
        if chunk is not None:
            first = chunk if self._acts_below_budget else (self.budget // chunk + 1) * chunk
            end = min(end, first)
        usable = self.policy.needs.usable_prefix(end)
        return min(usable, end - 1) if end < self.prompt_tokens else usable

    @property
    def _acts_below_budget(self) -> bool:
        return isinstance(self.policy.rule, Selector) or self.policy.budget.acts_always

    def restart(self) -> None:
        """Forget all observations: the sequence is computed again from its tokens."""
        assert not self.evicted_tokens, "a sequence that lost tokens is never computed again"
        self.observation.clear()
        self.replay_scores.clear()
        self._state.clear()
        self._acted_at = 0

    def next_boundary(self, seen: int) -> int | None:
        """Return how many tokens may be seen before `apply` must be called again."""
        return self.policy.triggers.next_boundary(seen, self.prompt_tokens)

    def due(self, row: int) -> bool:
        """Return whether the policy has to act now, after a forward pass."""
        seen = int(self.cache.lanes.seen[row])
        over = seen - self._acted_at if isinstance(self.policy.rule, Selector) else self._excess(row)
        return self.policy.triggers.due(seen, self.prompt_tokens, over)

    def _excess(self, row: int) -> int:
        """Return by how many tokens lanes exceed their budget: on average where they share it, else the longest."""
        held = self.cache.lanes.held[row, self._lanes]
        if self.policy.budget.uneven:
            return -(-int(held.sum()) // len(held)) - self.budget
        return int(held.max()) - self.budget

    # ---- replay ---------------------------------------------------------------------------------------------------

    def replay_passes(self) -> list[ReplayPass]:
        """Return what a replay feeds after the prompt; [] for policies without one."""
        if not self.policy.needs.replay:
            return []
        instruction, chunk = self.model.replay_instruction, self.policy.spec.selector.number("chunk")
        assert instruction is not None, "refused at admission"
        return replay_passes(self.token_ids[: self.prompt_tokens], chunk, instruction)

    def begin_replay(self, row: int) -> ReplayScores | None:
        """Return an empty collector of scores if a replay must be run now, before `apply`; None when not."""
        if not self.policy.needs.replay or self.replay_scores or self._nothing_to_drop(row):
            return None
        return ReplayScores(
            self.cache,
            self.model,
            self.layers,
            int(self.cache.lanes.seen[row]),
            self.policy.spec.selector.number("sinks"),
            self.policy.needs.layer_inputs,
        )

    # ---- acting ---------------------------------------------------------------------------------------------------

    def _nothing_to_drop(self, row: int) -> bool:
        return not self._acts_below_budget and self._excess(row) <= 0

    def apply(self, row: int) -> bool:
        """Evict what the policy says; False, and no change, when shared blocks cannot be replaced now."""
        if not self._nothing_to_drop(row):
            keep, survivors, state = self._choose(row)
            lost = int(self.cache.lanes.held[row, keep.lanes].sum() - keep.counts.sum())
            if self.policy.cache_positions and keep:
                for layer in self.layers:
                    survivors |= self._sinks.survivors(layer, row, self.model.inverse_frequencies[layer], keep)
            if not self.cache.compact(row, keep, survivors):
                return False
            self.observation.keep(keep)
            self.evicted_tokens += lost
            self._state.update(state)
            self._acted_at = int(self.cache.lanes.seen[row])
        self.replay_scores.clear()
        if not self.policy.triggers.while_decoding and self.cache.lanes.seen[row] >= self.prompt_tokens:
            self.observation.clear()
        return True

    def _choose(self, row: int) -> tuple[KeptSlots, dict[int, Survivors], dict[int, dict[str, torch.Tensor]]]:
        """Return the slots that stay, changed survivors by lane, and what the method now remembers by layer."""
        state = {layer: dict(self._state.get(layer, {})) for layer in self.layers}
        stacks, rule = self._stacks(row), self.policy.rule
        parts: list[LayerScores] = []
        if isinstance(rule, Selector):
            masks = [torch.stack([self._select_by(rule, i, row, state[i]) for i in layers]) for layers in stacks]
        else:
            # keys and values of one layer at a time: nothing here holds on to a context
            parts = [self._score_stack(rule, layers, row, state) for layers in stacks]
            masks = self._select(row, stacks, parts, state)
        keep = self._kept(row, stacks, masks)
        changed: dict[int, Survivors] = {}
        if self.policy.merges:
            scores = dict(zip(self.layers, (own for part in parts for own in part.scores), strict=bool(parts)))
            for layer, mask in zip(self.layers, (own for stack in masks for own in stack), strict=True):
                lanes = range(self.cache.layers[layer].first, self.cache.layers[layer].first + len(mask))
                if any(lane in keep for lane in lanes):
                    context = self.context(layer, row, state[layer])
                    merged = self.policy.action.merge(context, mask, scores.get(layer, context.positions.double()))
                    if merged is not None:
                        changed |= {lane: own for lane, own in zip(lanes, merged, strict=True) if lane in keep}
        return keep, changed, state

    def _select_by(self, rule: Selector, layer: int, row: int, state: dict[str, torch.Tensor]) -> torch.Tensor:
        context = self.context(layer, row, state)
        return rule.keep(context) & context.valid

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

    def _kept(self, row: int, stacks: list[list[int]], masks: list[torch.Tensor]) -> KeptSlots:
        """Return by slot what the masks [L, G, S] say of lanes that lose something."""
        held, size = self.cache.lanes.held[row, self._lanes], self.cache.spec.block_size
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
        return KeptSlots(self._lanes[losing], stays if losing.all() else stays[losing], size)

    def _select(
        self, row: int, stacks: list[list[int]], parts: list[LayerScores], state: dict[int, dict[str, torch.Tensor]]
    ) -> list[torch.Tensor]:
        """Return [L, G, S] bool for each stack: the tokens that stay by scores, budget and refinements."""
        protected, budget = self.policy.num_protected(self.budget), self.policy.budget
        if budget.lanewise:
            counts = [budget.counts([part], self.budget, protected, self.prompt_tokens)[0] for part in parts]
        else:
            layers = [layer for part in parts for layer in part.layers]
            together = [layers] if budget.spans_layers else [[layer] for layer in layers]
            shares = [budget.counts(each, self.budget, protected, self.prompt_tokens) for each in together]
            of_layer = chain.from_iterable(shares)
            counts = [torch.stack(list(islice(of_layer, len(stack)))) for stack in stacks]
        for refinement in self.policy.refinements:
            if refinement.chooses:
                return [
                    torch.stack([
                        refinement.choose(p.scores, p.protected, count, self.context(layer, row, state[layer]))
                        for layer, p, count in zip(stack, part.layers, number, strict=True)
                    ])
                    for stack, part, number in zip(stacks, parts, counts, strict=True)
                ]  # fmt: skip
        masks = []
        for part, number in zip(parts, counts, strict=True):
            scores, protects, valid = (x.flatten(0, 1) for x in (part.scores, part.protected, part.valid))
            masks.append(keep_best(scores, protects, valid, number.flatten()).view(part.valid.shape))
        return masks

    def _score_stack(
        self, rule: Scorer, layers: list[int], row: int, state: dict[int, dict[str, torch.Tensor]]
    ) -> LayerScores:
        """Return the scores [L, G, S] of layers that look alike."""
        if self.policy.stacks:
            return self._score(rule, self._stack_context(layers, row))
        parts = [self._score(rule, self.context(layer, row, state[layer])) for layer in layers]
        return LayerScores(*(torch.stack([getattr(p, x) for p in parts]) for x in ("scores", "protected", "valid")))

    def _score(self, rule: Scorer, context: ScoreContext) -> LayerScores:
        scores = rule.score(context)
        protected = rule.protected(context)
        for refinement in self.policy.refinements:
            scores = refinement.reweigh(scores, context)
            protected = protected | refinement.protected(context)
        if not rule.comparable and not isinstance(self.policy.budget, Uniform):
            scores = standardised(scores, context.valid)
        return LayerScores(scores, protected & context.valid, context.valid)

    def context(self, layer: int, row: int, state: dict[str, torch.Tensor] | None = None) -> ScoreContext:
        """Return what a method may see of one layer now; it may change `state`, a copy of what it remembers."""
        needs, mass = self.policy.needs, self.observation.mass
        positions, valid = self._places([layer], row)
        queries = self.observation.queries(layer)
        seen = int(self.cache.lanes.seen[row])
        special, punctuation = self._kinds(positions) if needs.token_kinds else (None, None)
        return ScoreContext(
            layer=layer,
            num_layers=len(self.cache.layers),
            num_query_heads=self.model.num_query_heads,
            scale=self.model.query_scale,
            read=lambda: self.cache.read_layer(layer, row)[:2],
            positions=positions,
            valid=valid,
            seen=seen,
            prompt_tokens=self.prompt_tokens,
            budget=self.budget,
            request_seed=self.seed,
            queries=None if queries is None else queries.float(),
            query_positions=None if queries is None else torch.arange(seen - len(queries), seen),
            key_mass=mass.of_layers([layer], row) if needs.key_mass else None,
            near_mass=mass.of_layers([layer], row, near=True) if needs.near is not None else None,
            log_count=self.cache.read_log_counts(layer, row),
            query_moments=self.observation.moments(layer) if needs.query_moments else None,
            inverse_frequencies=self.model.inverse_frequencies[layer],
            output_weight=self.model.output_weight(layer) if needs.output_weights else None,
            replay=self.replay_scores.get(layer),
            special=special,
            punctuation=punctuation,
            weigh=lambda window: self.observation.window_mass([layer], row, window),
            state=dict(self._state.get(layer, {})) if state is None else state,
        )

    def _stack_context(self, layers: list[int], row: int) -> ScoreContext:
        """Return what a rule that `stacks` may see of layers that look alike, [L, G, S]."""
        needs, mass = self.policy.needs, self.observation.mass
        shape = (len(layers), self.cache.layers[layers[0]].num_lanes, -1)

        def read() -> tuple[torch.Tensor, torch.Tensor]:
            keys, values, _ = zip(*(self.cache.read_layer(layer, row) for layer in layers), strict=True)
            return torch.stack(keys), torch.stack(values)

        def weigh(window: int) -> torch.Tensor:
            found = self.observation.window_mass(layers, row, window)
            if found is None:
                return torch.stack([self.context(layer, row).window_mass(window) for layer in layers])
            return found.view(shape)

        positions, valid = (x.view(shape) for x in self._places(layers, row))
        return ScoreContext(
            layer=layers[0],
            num_layers=len(self.cache.layers),
            num_query_heads=self.model.num_query_heads,
            scale=self.model.query_scale,
            read=read,
            positions=positions,
            valid=valid,
            seen=int(self.cache.lanes.seen[row]),
            prompt_tokens=self.prompt_tokens,
            budget=self.budget,
            request_seed=self.seed,
            key_mass=mass.of_layers(layers, row).view(shape) if needs.key_mass else None,
            near_mass=mass.of_layers(layers, row, near=True).view(shape) if needs.near is not None else None,
            weigh=weigh,
        )

    def _places(self, layers: Sequence[int], row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return positions (-1: padding) and what is there [L * G, S] of lanes that are padded in front."""
        lanes, table = self.cache.lanes_of(layers), self.cache.lanes
        held = table.held[row, lanes]
        slots = int(held.max())
        if int(held.min()) == slots:
            own = table.positions[row][lanes, :slots] if row in table.positions else np.arange(slots)
            positions = np.broadcast_to(own, (len(held), slots)).astype(np.int64)
            return torch.from_numpy(positions), torch.ones(positions.shape, dtype=torch.bool)
        source = np.arange(slots)[None, :] - (slots - held[:, None])  # slots of each lane, negative where it is padded
        places = source
        if row in table.positions:
            places = np.take_along_axis(table.positions[row][lanes], np.maximum(source, 0), 1)
        positions = np.where(source >= 0, places, -1).astype(np.int64)
        return torch.from_numpy(positions), torch.from_numpy(source >= 0)

    def _kinds(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return [G, S] bool twice: special tokens and punctuation among the tokens at `positions` (-1: none)."""
        assert self.model.token_kinds is not None, "refused at admission"
        kinds, seen = self.model.token_kinds(), int(positions.max()) + 1
        for store, more in zip(self._flags, kinds.flags(self.token_ids[len(self._flags[0]) : seen]), strict=True):
            store.extend(more.tolist())
        special, punctuation = (torch.tensor(flags[:seen]) for flags in self._flags)
        at = positions.clamp(min=0)
        return special[at] & (positions >= 0), punctuation[at] & (positions >= 0)

    # ---- bytes to plan with ---------------------------------------------------------------------------------------

    @cached_property
    def occupancy(self) -> Occupancy:
        """Bounds on the bytes of this request."""
        longest = max((len(p.token_ids) for p in self.replay_passes()), default=0)
        return Occupancy(self.policy, self.cache.spec, self.prompt_tokens, self.layers, longest)

    def future_bytes(self, row: int, num_tokens: int, chunk: int) -> int:
        """Return the most bytes that a sequence that has lost tokens needs until its text has `num_tokens`."""
        lanes = self.cache.lanes
        found = self.occupancy.future_bytes(lanes.held[row].tolist(), int(lanes.seen[row]), num_tokens, chunk)
        return max(found, lanes.sequence_bytes(row))

    def fork(self, token_ids: Sequence[int], seed: int) -> "Eviction":
        """Return an independent copy for a forked sequence with its own tokens; it has evicted nothing itself."""
        other = Eviction(self.policy, self.cache, self.model, token_ids, self.prompt_tokens, seed)
        other.observation = self.observation.fork()
        other._acted_at = self._acted_at
        other._state = {layer: dict(known) for layer, known in self._state.items()}
        other._sinks = self._sinks.fork()
        return other
