"""Eviction: one policy for one sequence. It records queries, and after each step returns blocks to the arena."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from kvloom.cache.kvcache import KVCache
from kvloom.policies.cachepositions import MovedSinks
from kvloom.policies.choice import Choice
from kvloom.policies.contexts import Contexts
from kvloom.policies.modelfacts import ModelFacts
from kvloom.policies.observation import Observation
from kvloom.policies.occupancy import Occupancy
from kvloom.policies.policy import Policy
from kvloom.policies.record import Record
from kvloom.policies.replay import ReplayPass, ReplayScores, replay_passes
from kvloom.policies.schedule import Schedule

__all__ = ["Eviction", "ModelFacts"]


class Eviction:
    """`policy` on one sequence; `row` is the sequence's row set in the lane table.

    `record` holds its observations, `schedule` its times of acting, `contexts` its method's inputs, `choice` the
    selection.
    """

    def __init__(
        self,
        policy: Policy,
        cache: KVCache,
        model: ModelFacts,
        token_ids: Sequence[int],
        prompt_tokens: int,
        seed: int = 0,
        *,
        record: Record | None = None,
    ) -> None:
        """Observe `token_ids`, of which the first `prompt_tokens` are the prompt; continue from `record` if given."""
        self.policy = policy
        self.cache = cache
        self.model = model
        self.layers = [i for i in range(len(cache.layers)) if policy.acts_on(cache.spec, i)]
        views = [cache.layers[i] for i in self.layers]
        lanes = np.array([view.first + g for view in views for g in range(view.num_lanes)], np.int64)
        self.schedule = Schedule(policy, cache.lanes, lanes, prompt_tokens)
        if record is None:
            thetas = model.inverse_frequencies
            seen = Observation(policy.needs, cache, model.query_scale, prompt_tokens, self.layers, thetas)
            record = Record(token_ids, prompt_tokens, self.schedule.budget, seed, seen)
        self.record = record
        self.contexts = Contexts(policy.spec.selector.name, policy.needs, cache, model, record)
        self.choice = Choice(policy, cache, self.contexts, self.layers, lanes)
        self.evicted_tokens = 0
        self._sinks = MovedSinks(cache, policy.spec.moved_sinks or 0)

    def fork(self, token_ids: Sequence[int], seed: int) -> "Eviction":
        """Return an independent copy for a forked sequence with its own tokens; it has evicted nothing itself."""
        record = self.record.fork(token_ids, seed)
        other = Eviction(self.policy, self.cache, self.model, token_ids, record.prompt_tokens, record=record)
        other._sinks = self._sinks.fork()
        return other

    def restart(self) -> None:
        """Discard all observations: the sequence is computed again from its tokens."""
        assert not self.evicted_tokens, "a sequence that lost tokens is never computed again"
        self.record.clear()

    # ---- while the model runs -------------------------------------------------------------------------------------

    def first_watched(self, start: int, count: int) -> int | None:
        """Return the first of the `count` tokens from `start` on whose query is needed, None for none."""
        return self.record.observation.first_needed(start, count, self.policy.triggers.while_decoding)

    def observe(self, row: int, q: torch.Tensor, lse: torch.Tensor | None = None) -> None:
        """Take in the rotated queries q [L, n, H, D] of the newest n tokens, and lse [L, n, H] if there are any."""
        self.record.observation.observe(row, q, lse)

    # ---- acting ---------------------------------------------------------------------------------------------------

    def due(self, row: int) -> bool:
        """Return whether the policy has to act now, after a forward pass."""
        return self.schedule.due(row, self.record.acted_at)

    def replay_passes(self) -> list[ReplayPass]:
        """Return what a replay feeds after the prompt; [] for policies without one."""
        if not self.policy.needs.replay:
            return []
        instruction, chunk = self.model.replay_instruction, self.policy.needs.replay
        assert instruction is not None, "refused at admission"
        return replay_passes(self.record.token_ids[: self.record.prompt_tokens], chunk, instruction)

    def begin_replay(self, row: int) -> ReplayScores | None:
        """Return an empty collector of scores if a replay must be run now, before `apply`; None when not."""
        if not self.policy.needs.replay or self.record.replay_scores or self.schedule.nothing_to_drop(row):
            return None
        return ReplayScores(
            self.cache,
            self.model,
            self.layers,
            int(self.cache.lanes.seen[row]),
            self.policy.needs.replay_sinks,
            self.policy.needs.layer_inputs,
        )

    def apply(self, row: int) -> bool:
        """Evict the tokens that the policy chooses; False, and no change, when shared blocks cannot be replaced now."""
        record, lanes = self.record, self.cache.lanes
        if not self.schedule.nothing_to_drop(row):
            keep, survivors, state = self.choice.make(row)
            lost = int(lanes.held[row, keep.lanes].sum() - keep.counts.sum())
            if self.policy.spec.moved_sinks is not None and keep:
                for layer in self.layers:
                    survivors |= self._sinks.survivors(layer, row, self.model.inverse_frequencies[layer], keep)
            if not self.cache.compact(row, keep, survivors):
                return False
            record.observation.keep(keep)
            self.evicted_tokens += lost
            record.remembered.update(state)
            record.acted_at = int(lanes.seen[row])
        record.replay_scores.clear()
        if not self.policy.triggers.while_decoding and lanes.seen[row] >= record.prompt_tokens:
            record.observation.clear()
        return True

    # ---- bytes for admission --------------------------------------------------------------------------------------

    @cached_property
    def occupancy(self) -> Occupancy:
        """Bounds on the bytes of this request."""
        longest = max((len(p.token_ids) for p in self.replay_passes()), default=0)
        return Occupancy(self.policy, self.cache.spec, self.record.prompt_tokens, self.layers, longest)

    def future_bytes(self, row: int, num_tokens: int, chunk: int) -> int:
        """Return the most bytes that a sequence that has lost tokens needs until its text has `num_tokens`."""
        lanes = self.cache.lanes
        found = self.occupancy.future_bytes(lanes.held[row].tolist(), int(lanes.seen[row]), num_tokens, chunk)
        return max(found, lanes.sequence_bytes(row))
