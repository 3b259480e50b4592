"""Evictions: cache policies in the engine. Which are allowed, which fit, and what is forgotten after each step."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np

from kvloom.attention.batch import AttentionBatch
from kvloom.engine.request import Sequence
from kvloom.engine.runner import Runner
from kvloom.engine.scheduler import Scheduler, Work
from kvloom.errors import DoesNotFitError, UnsupportedError
from kvloom.models.model import StepWanted
from kvloom.policies.allowlist import AllowList
from kvloom.policies.eviction import Eviction
from kvloom.policies.modelfacts import ModelFacts
from kvloom.policies.policy import Policy
from kvloom.policies.replay import ReplayPass, ReplayScores
from kvloom.policies.tokenkinds import TokenKinds

REPLAY_PIECE = 512
"""Tokens of a replay that go through the model at once: bounds the queries that are held for scoring."""


class Evictions:
    """The engine's own policy, the list of those that requests may ask for, and their work after each step."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        own: str | None,
        allowed: Seq[str] | None,
        token_kinds: Callable[[], TokenKinds] | None,
        replay_instruction: Callable[[Seq[int]], list[int]] | None,
    ) -> None:
        """Raises `InvalidInputError` or `UnsupportedError` for an `own` or `allowed` policy that cannot be."""
        self.own = None if own is None else Policy.parse(own)
        self.allowed = AllowList(allowed, own)
        self.runner = runner
        self.scheduler = scheduler
        model = runner.model
        self.facts = ModelFacts(
            num_query_heads=model.config.num_heads,
            query_scale=model.config.query_scale,
            inverse_frequencies=[model.inverse_frequencies(i) for i in range(model.config.num_layers)],
            output_weight=model.output_weight,
            max_position=model.config.max_position,
            shows_layer_inputs=model.shows_layer_inputs,
            token_kinds=token_kinds,
            replay_instruction=replay_instruction,
        )
        self.evicted_tokens = 0

    def policy(self, asked: str | None) -> Policy | None:
        """Return the policy of a request that asks for `asked`, the engine's own for None; None keeps everything.

        Raises `InvalidInputError` for what cannot be read and `UnsupportedError` for what is not allowed or possible.
        """
        if asked is None:
            return self.own
        policy = Policy.parse(asked)
        self.allowed.check(asked)
        return policy

    def check(self, policy: Policy, prompt: Seq[int], num_tokens: int, sequences: int) -> None:
        """Raise unless a request of `num_tokens` under `policy` can run on this engine when it is alone.

        `UnsupportedError` has every reason; `DoesNotFitError` the numbers.
        """
        cache = self.runner.cache
        reasons = [*policy.refusals(cache.spec, len(prompt), self.facts), *self._unlike_weights(policy)]
        if policy.needs.replay and len(cache.lanes.seen) <= self.scheduler.max_num_seqs:
            reasons.append("a replay takes one sequence more in the lane table than max_num_seqs; there is none")
        if reasons:
            raise UnsupportedError(f"policy {policy.spec}", reasons)
        eviction = Eviction(policy, cache, self.facts, prompt, len(prompt))
        what = f"the request with {policy.spec}"
        if not eviction.occupancy.may_drop(num_tokens):
            self.scheduler.check_fits(num_tokens, what)
            return
        needed = eviction.occupancy.peak_bytes(num_tokens, self.scheduler.max_num_batched_tokens, sequences)
        self.scheduler.check_bytes(needed, num_tokens, what)

    def _unlike_weights(self, policy: Policy) -> list[str]:
        """Return why attention weights that `policy` would compute from queries and keys are not the model's own."""
        config = self.runner.model.config
        if not (policy.needs.watches_queries or policy.needs.replay):
            return []
        terms = {"a softcap": config.score_softcap is not None, "ALiBi": bool(config.slopes), "sinks": config.sinks}
        name = policy.spec.selector.name
        return [
            f"{name} scores by softmax(q.k), and scores of this model have {term}"
            for term, there in terms.items()
            if there
        ]

    def start(self, policy: Policy | None, sequence: Sequence) -> None:
        """Put `policy` in charge of the first sequence of a request; nothing for None."""
        if policy is not None:
            request, model, facts = sequence.request, self.runner.model, self.facts
            if request.length_class:
                layers = range(model.config.num_layers)
                thetas = [model.inverse_frequencies(layer, request.length_class) for layer in layers]
                facts = replace(facts, inverse_frequencies=thetas)
            sequence.eviction = Eviction(
                policy, self.runner.cache, facts, sequence.token_ids, len(request.prompt_token_ids), request.seed
            )

    def run(self, work: list[Work]) -> None:
        """Let the policies that are due forget; what they drop is back in the arena afterwards.

        Other sequences may be preempted. Raises `DoesNotFitError` when blocks are short for ever.
        """
        for item in work:
            sequence = item.sequence
            if sequence.eviction is None or sequence.row is None or not sequence.eviction.due(sequence.row):
                continue
            before = sequence.eviction.evicted_tokens
            self._replay(sequence)
            while not sequence.eviction.apply(sequence.row):
                self._make_room(sequence)
            self.evicted_tokens += sequence.eviction.evicted_tokens - before

    def _make_room(self, sequence: Sequence) -> None:
        if not self.scheduler.make_room(sequence):
            assert sequence.eviction is not None
            raise DoesNotFitError(
                f"{sequence.request.request_id}: no blocks are left to go on with while evicting with "
                f"{sequence.eviction.policy.spec}. Raise --kv-cache-memory-bytes"
            )

    def _replay(self, sequence: Sequence) -> None:
        """Feed the context once more to a fork of the sequence, if its policy scores by that; the fork is closed."""
        eviction, row, lanes = sequence.eviction, sequence.row, self.runner.cache.lanes
        assert eviction is not None and row is not None
        scores = eviction.begin_replay(row)
        if scores is None:
            return
        for now in eviction.replay_passes():
            fork = lanes.fork(row)
            try:
                for start in range(0, len(now.token_ids), REPLAY_PIECE):
                    piece = now.token_ids[start : start + REPLAY_PIECE]
                    while not lanes.extend(fork, len(piece)):
                        self._make_room(sequence)
                    held = lanes.sequence_bytes(row) + lanes.bytes_beyond(fork, row)
                    sequence.kv_peak_bytes = max(sequence.kv_peak_bytes, held)
                    self._feed(eviction, scores, fork, now, piece, sequence.request.length_class)
            finally:
                lanes.close(fork)
        eviction.replay_scores = scores.best

    def _feed(
        self,
        eviction: Eviction,
        scores: ReplayScores,
        fork: int,
        now: ReplayPass,
        piece: tuple[int, ...],
        length_class: int,
    ) -> None:
        """Process `piece`, whose slots exist, and show its queries to `scores`."""
        cache, count = self.runner.cache, len(piece)
        seen = int(cache.lanes.seen[fork])
        batch = AttentionBatch(
            token_ids=np.array(piece, np.int32),
            positions=np.arange(seen - count, seen, dtype=np.int32),
            sequences=np.array([fork], np.int32),
            cu_seqlens_q=np.array([0, count], np.int32),
            length_class=np.array([length_class], np.int32),
        )
        wanted = StepWanted(
            logit_rows=np.array([count - 1], np.int32),
            logits=False,
            query_rows=np.arange(count, dtype=np.int32),
            input_norms=eviction.policy.needs.layer_inputs,
        )
        output = self.runner.model.step(batch, cache, wanted)
        assert output.queries is not None
        for layer in eviction.layers:
            norms = None if output.input_norms is None else output.input_norms[layer]
            scores.observe(layer, fork, now, output.queries[layer], norms)
