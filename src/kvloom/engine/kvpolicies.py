"""KVPolicies: the engine's own cache policy, those that requests may name, and their admission."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace

from kvloom.engine.request import Sequence
from kvloom.engine.runner import Runner
from kvloom.engine.scheduler import Scheduler
from kvloom.errors import UnsupportedError
from kvloom.policies.allowlist import AllowList
from kvloom.policies.encoding import Encoding, encoded_peak
from kvloom.policies.eviction import Eviction
from kvloom.policies.modelfacts import ModelFacts
from kvloom.policies.policy import Policy
from kvloom.policies.tokenkinds import TokenKinds
from kvloom.spec.encoding import encoded_only, encoding_refusals
from kvloom.spec.policy import FULL, PolicySpec, Term


class KVPolicies:
    """Chooses the policy of each request, admits it, and attaches it to the request's first sequence."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        own: PolicySpec,
        allowed: AllowList,
        store: Term | None,
        token_kinds: Callable[[], TokenKinds] | None,
        replay_instruction: Callable[[Seq[int]], list[int]] | None,
    ) -> None:
        """Requests that name no policy get `own`, and those whose policy has no store get `store`.

        One that names the store in which the model computes keeps its blocks as they are.
        Raises as `Policy.of` does where the own policy cannot be.
        """
        self.store = store
        self.runner = runner
        self.own = self._stored(own)
        Policy.of(self.own)
        if reasons := encoding_refusals(self.own, runner.cache.spec):
            raise UnsupportedError(f"policy {self.own}", reasons)
        self.allowed = allowed
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

    def _stored(self, spec: PolicySpec) -> PolicySpec:
        if spec.store is None:
            return replace(spec, store=self.store)
        return encoded_only(spec, self.runner.cache.spec.store)

    def policy_for(self, asked: PolicySpec | None) -> PolicySpec:
        """Return the policy of a request that asks for `asked`, the engine's own for None.

        Raises `UnsupportedError` for what is not allowed, and as `Policy.of` does.
        """
        if asked is None:
            return self.own
        self.allowed.check(asked, self.own)
        spec = self._stored(asked)
        Policy.of(spec)
        return spec

    def check_policy(self, spec: PolicySpec, prompt: Seq[int], num_tokens: int, sequences: int) -> None:
        """Raise unless a request of `num_tokens` under `spec` can run on this engine when it is alone.

        `UnsupportedError` has every reason; `DoesNotFitError` the numbers.
        """
        policy, cache, capacity = Policy.of(spec), self.runner.cache, self.scheduler.capacity
        reasons = encoding_refusals(spec, cache.spec)
        if policy is not None:
            reasons += [*policy.refusals(cache.spec, len(prompt), self.facts), *self._unlike_weights(policy)]
            if policy.needs.replay and len(cache.lanes.seen) <= self.scheduler.max_num_seqs:
                reasons.append("a replay takes one sequence more in the lane table than max_num_seqs; there is none")
        if reasons:
            raise UnsupportedError(f"policy {spec}", reasons)
        what = "the request" if spec == FULL else f"the request with {spec}"
        occupancy = None if policy is None else Eviction(policy, cache, self.facts, prompt, len(prompt)).occupancy
        if occupancy is not None and occupancy.may_drop(num_tokens):
            needed = occupancy.peak_bytes(num_tokens, capacity.chunk, sequences)
        elif spec.store is not None:
            output = num_tokens - len(prompt)
            needed = encoded_peak(cache.spec, spec.store, len(prompt), output, capacity.chunk, sequences)
        else:
            capacity.check_tokens(num_tokens, what)
            return
        capacity.check_bytes(needed, num_tokens, what, spec.store)

    def _unlike_weights(self, policy: Policy) -> list[str]:
        """Return why attention weights that `policy` computes from queries and keys differ from the model's."""
        config = self.runner.model.config
        if not policy.needs.weighs:
            return []
        name = policy.spec.selector.name
        return [f"{name} scores by softmax(q.k), and scores of this model have {term}" for term in config.score_terms]

    def start(self, spec: PolicySpec, sequence: Sequence) -> None:
        """Put `spec` in charge of the first sequence of a request."""
        policy = Policy.of(spec)
        if spec.store is not None:
            prompt, lanes = len(sequence.request.prompt_token_ids), self.runner.cache.lanes
            sequence.encoding = Encoding(spec.store, lanes, prompt, sequence.chain.salt)
        if policy is not None:
            request, model, facts = sequence.request, self.runner.model, self.facts
            if sequence.length_class:
                layers = range(model.config.num_layers)
                thetas = [model.inverse_frequencies(layer, sequence.length_class) for layer in layers]
                facts = replace(facts, inverse_frequencies=thetas)
            sequence.eviction = Eviction(
                policy, self.runner.cache, facts, sequence.token_ids, len(request.prompt_token_ids), request.seed
            )
