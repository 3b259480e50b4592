"""KVPolicies: the engine's own cache policy, those that requests may ask for, and whether one can run."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace

from kvloom.engine.request import Sequence
from kvloom.engine.runner import Runner
from kvloom.engine.scheduler import Scheduler
from kvloom.errors import UnsupportedError
from kvloom.policies.allowlist import AllowList
from kvloom.policies.eviction import Eviction
from kvloom.policies.modelfacts import ModelFacts
from kvloom.policies.policy import Policy
from kvloom.policies.tokenkinds import TokenKinds
from kvloom.spec.policy import PolicySpec


class KVPolicies:
    """Chooses the policy of each request, admits it, and puts it in charge of the request's first sequence."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        own: PolicySpec,
        allowed: AllowList,
        token_kinds: Callable[[], TokenKinds] | None,
        replay_instruction: Callable[[Seq[int]], list[int]] | None,
    ) -> None:
        """Requests that name no policy get `own`; raises as `Policy.of` does where that cannot be."""
        Policy.of(own)
        self.own = own
        self.allowed = allowed
        self.runner = runner
        self.scheduler = scheduler
        model = runner.model
        self.facts = ModelFacts(
            num_query_heads=model.config.num_heads,
            query_scale=model.config.query_scale,
            inverse_frequencies=[model.inverse_frequencies(i) for i in range(model.config.num_layers)],
            output_weight=model.output_weight,
            max_position=model.config.max_position,
            token_kinds=token_kinds,
            replay_instruction=replay_instruction,
        )

    def policy_of(self, asked: PolicySpec | None) -> Policy | None:
        """Return the policy of a request that asks for `asked`, the engine's own for None; None keeps everything.

        Raises `UnsupportedError` for what is not allowed or possible, and as `Policy.of` does.
        """
        if asked is None:
            return Policy.of(self.own)
        self.allowed.check(asked, self.own)
        return Policy.of(asked)

    def check_policy(self, policy: Policy, prompt: Seq[int], num_tokens: int, sequences: int) -> None:
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
            self.scheduler.capacity.check_tokens(num_tokens, what)
            return
        needed = eviction.occupancy.peak_bytes(num_tokens, self.scheduler.max_num_batched_tokens, sequences)
        self.scheduler.capacity.check_bytes(needed, num_tokens, what)

    def _unlike_weights(self, policy: Policy) -> list[str]:
        """Return why attention weights that `policy` would compute from queries and keys are not the model's own."""
        config = self.runner.model.config
        if not policy.needs.weighs:
            return []
        name = policy.spec.selector.name
        return [f"{name} scores by softmax(q.k), and scores of this model have {term}" for term in config.score_terms]

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
